# SPDX-License-Identifier: Apache-2.0
"""Verify steps of speculative decoding: whatever is rejected, accepted tokens read and leave what decoding would."""

from __future__ import annotations

import dataclasses
import itertools
from functools import partial

import pytest
import torch
from builders import (
    PAGE,
    RELATIVE_RMS,
    Request,
    attention_for,
    make_cache,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_decode,
)
from kvarn_kernels import torch_form
from kvarn_kernels.attention import TORCH, TRITON
from kvarn_kernels.config import KVarNConfig
from test_decode import TOLERANCE

KVARN = KVarNConfig.from_preset("kvarn")
CANONICAL = KVarNConfig.from_preset("kvarn_canonical")
HEADS, HEAD_DIM, DTYPE = (4, 2), 64, torch.float32
# tokens of a page of a ring
PAGE_TOKENS = KVARN.record_bytes(HEAD_DIM) // (2 * HEAD_DIM * DTYPE.itemsize)

in_both_presets = pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)


def chain(request: Request, seq_len: int, accepted: int, drafts: int) -> Request:
    """Return a request whose tokens from seq_len + accepted on are drafts that will be rejected, 100 times as large."""
    at, end = seq_len + accepted, seq_len + drafts
    rows = {}
    for name in "qkv":
        rows[name] = getattr(request, name).clone()
        rows[name][at:end] = 100 * torch.randn_like(rows[name][at:end])
    return dataclasses.replace(request, **rows)


def speculate(
    config: KVarNConfig,
    drafts: int,
    start: int,
    end: int,
    *,
    exact_start: int = 0,
    most: int | None = None,
    ring_pages: int | None = None,
    kernels=TORCH,
    bound: float = RELATIVE_RMS[DTYPE],
) -> None:
    """Verify chains from a prompt of `start` tokens on until `end`, and decode the same tokens beside it.

    After every step the outputs of accepted tokens are the oracle's, and the records of full pages those of the decode.

    Args:
        exact_start: tokens from the prefix cache; most: accepted of a step at most, by default all of them.
        ring_pages: of the ring, by default what the configuration says.
    """
    needed = config.ring_pages(HEAD_DIM, DTYPE.itemsize, drafts) if ring_pages is None else ring_pages
    more = needed - config.ring_pages(HEAD_DIM, DTYPE.itemsize)
    request = make_request(end + drafts, HEADS, HEAD_DIM, DTYPE)
    cache = make_cache(config, HEADS[1], HEAD_DIM, DTYPE, 24, 5, more_ring_pages=more)
    plain = make_cache(config, HEADS[1], HEAD_DIM, DTYPE, 24, 5)
    for memory in (cache, plain):
        if exact_start:
            prefill(torch_form.attend_extend, request, [exact_start], memory, config)
        resumed = dataclasses.replace(request, exact_start=exact_start, row=2)
        prefill(torch_form.attend_extend, resumed, [start - exact_start], memory, config)
    attend = torch_form.attend_decode
    if kernels is not TORCH:
        attend = attention_for(cache, HEADS[0], config, kernels, max_batch=drafts)
    seq_len, expected = start, oracle(resumed, config)
    while seq_len < end:
        accepted = int(torch.randint(1, (most or drafts) + 1, ()))
        drafted = chain(resumed, seq_len, accepted, drafts)
        got = run_decode(attend, [drafted] * drafts, range(seq_len, seq_len + drafts), cache, config, drafts=drafts)
        for position in range(seq_len, seq_len + accepted):
            run_decode(torch_form.attend_decode, [resumed], [position], plain, config)
        error = relative_rms(torch.stack(got[:accepted]), expected[seq_len : seq_len + accepted])
        assert error < bound, f"at {seq_len}, {accepted} accepted: error {error:.1e}"
        seq_len += accepted
        full = request.pages[: seq_len // PAGE]
        assert torch.equal(cache.records[full], plain.records[full]), f"records differ at {seq_len}"


@pytest.mark.parametrize("exact_start", [0, PAGE])
@pytest.mark.parametrize("drafts", [1, 4, 16])
@in_both_presets
def test_rejected_drafts_leave_no_trace(config, drafts, exact_start):
    speculate(config, drafts, 200, 530, exact_start=exact_start)


def test_pages_are_decoded_once_for_the_drafts_of_a_request(monkeypatch):
    decoded, decode = [], torch_form._decode_pages
    monkeypatch.setattr(torch_form, "_decode_pages", lambda *args: decoded.append(args[1].tolist()) or decode(*args))
    cache = make_cache(KVARN, HEADS[1], HEAD_DIM, DTYPE, 24, 5)
    requests = [make_request(3 * PAGE + 1, HEADS, HEAD_DIM, DTYPE, first_page=p, row=n) for p, n in ((1, 1), (8, 3))]
    for request in requests:
        prefill(torch_form.attend_extend, request, [3 * PAGE - 2], cache, KVARN)
    decoded.clear()
    # the second and the third draft are in another page, from which one more page is read
    rows, places = [r for r in requests for _ in range(3)], [*range(3 * PAGE - 2, 3 * PAGE + 1)] * 2
    run_decode(torch_form.attend_decode, rows, places, cache, KVARN, drafts=3)
    assert decoded == [request.pages[:2] for request in requests]


@in_both_presets
def test_rejected_drafts_leave_no_trace_in_the_kernels(config):
    # the page's last token is a draft in several steps, rejected and accepted
    speculate(config, 4, 2 * PAGE - 4, 2 * PAGE, most=2, kernels=TRITON, bound=TOLERANCE[DTYPE])


# one token of each step accepted, so that every length before the end of a page occurs
one_by_one = partial(speculate, start=200, end=270, most=1)


def drafts_that_fill(config: KVarNConfig, over: int) -> tuple[int, int]:
    """Return (drafts, pages) of a ring of whole pages that is `over` tokens too short."""
    for pages in itertools.count(config.ring_pages(HEAD_DIM, DTYPE.itemsize)):
        drafts = pages * PAGE_TOKENS + over - config.ring_len + 1
        if drafts > 1:
            return drafts, pages


@in_both_presets
def test_the_ring_is_as_long_as_it_must_be(config):
    drafts, pages = drafts_that_fill(config, 0)
    assert config.ring_pages(HEAD_DIM, DTYPE.itemsize, drafts) == pages
    one_by_one(config, drafts)
    drafts, pages = drafts_that_fill(config, 1)
    assert config.ring_pages(HEAD_DIM, DTYPE.itemsize, drafts) == pages + 1
    with pytest.raises(AssertionError):
        one_by_one(config, drafts, ring_pages=pages)
