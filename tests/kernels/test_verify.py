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
    in_layer,
    make_cache,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_decode,
)
from kvarn_kernels import torch_form
from kvarn_kernels.attention import TORCH, TRITON, Kernels
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100, Gpu
from kvarn_kernels.read import decode
from test_decode import TOLERANCE, make_requests

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


def verify_together(
    requests: list[Request],
    starts: list[int],
    heads: tuple[int, int],
    config: KVarNConfig,
    drafts: int,
    kernels: Kernels,
    *,
    padding: int = 0,
    gpu: Gpu | None = None,
    sliding_window: int = 0,
) -> None:
    """Verify drafts of requests that have `starts` tokens, those of a request together; compare with the oracle."""
    kv_heads, head_dim, dtype = requests[0].k.shape[1], requests[0].k.shape[2], requests[0].k.dtype
    pages = 1 + max(max(request.pages) for request in requests)
    more = config.ring_pages(head_dim, 2, drafts) - config.ring_pages(head_dim, 2)
    cache = make_cache(config, kv_heads, head_dim, dtype, pages, len(requests) + 1, more_ring_pages=more)
    cache.records[0] = 0
    for request, start in zip(requests, starts, strict=True):
        unhit = dataclasses.replace(request, exact_start=0)
        prefill(torch_form.attend_extend, unhit, [start], cache, config)
    rows = [(request, start + n) for request, start in zip(requests, starts, strict=True) for n in range(drafts)]
    size = len(rows) + padding * drafts
    attention = attention_for(
        cache, heads[0], config, kernels, max_batch=size, drafts=drafts, gpu=gpu, sliding_windows=[sliding_window]
    )
    attend = in_layer(attention, sliding_window=sliding_window)
    outs = run_decode(attend, *zip(*rows, strict=True), cache, config, padding=padding * drafts, drafts=drafts)
    for (request, position), out in zip(rows, outs, strict=True):
        expected = oracle(request, config, position, position + 1, sliding_window)[0]
        assert relative_rms(out, expected) < TOLERANCE[dtype], position


@pytest.mark.parametrize(
    ("preset", "dtype", "head_dim", "heads", "drafts"),
    [
        ("kvarn", torch.bfloat16, 128, (4, 1), 4),
        # 24 columns of two KV heads, in blocks of 16
        ("kvarn", torch.float16, 64, (6, 2), 8),
        ("kvarn_k4v4_g128", torch.float16, 64, (18, 1), 2),
        ("kvarn_k3v2_g128", torch.bfloat16, 256, (1, 1), 16),
    ],
)
def test_drafts_that_share_their_splits_match_the_oracle_in_triton(preset, dtype, head_dim, heads, drafts):
    config = KVarNConfig.from_preset(preset)
    # a page ends among the drafts of the first, in its middle and just before its end; not with the others
    starts = [3 * PAGE - drafts // 2, 2 * PAGE - drafts, 3 * PAGE - 1, 70]
    requests = make_requests([n + drafts for n in starts], heads, head_dim, dtype)
    verify_together(requests, starts, heads, config, drafts, TRITON)


@pytest.mark.parametrize("exact_start", [PAGE, 2 * PAGE, 3 * PAGE])
def test_drafts_read_the_tokens_of_the_prefix_from_records_in_triton(exact_start):
    (owner,) = make_requests([4 * PAGE + 2], (4, 1), 64, torch.float16)
    guest = dataclasses.replace(owner, exact_start=exact_start)
    verify_together([guest], [4 * PAGE - 2], (4, 1), KVARN, 4, TRITON)


@pytest.mark.parametrize("programs", [2, 40])
def test_drafts_of_many_pages_in_many_splits_and_padded_requests_in_triton(programs, monkeypatch):
    monkeypatch.setattr(decode, "resident_programs", lambda gpu: programs)
    starts = [6 * PAGE - 2, 130]
    requests = make_requests([n + 4 for n in starts], (4, 1), 64, torch.float16)
    verify_together(requests, starts, (4, 1), KVARN, 4, TRITON, padding=2, gpu=H100)


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
