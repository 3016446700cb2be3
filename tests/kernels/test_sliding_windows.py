# SPDX-License-Identifier: Apache-2.0
"""Sliding windows over records and rings in every form: oracle, torch, Triton's kernels, dense steps."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial

import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    attention_for,
    between_stores,
    cache_for,
    in_layer,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_decode,
    run_extend,
)
from kvarn_kernels import reference, torch_form
from kvarn_kernels.attention import TRITON
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense.extend_dense import extend_dense, plan_dense
from kvarn_kernels.dense.segments import fewest_pages
from kvarn_kernels.device.gpu import gpu_of
from kvarn_kernels.extend_choice import DENSE
from kvarn_kernels.read import extend as extend_module
from test_decode import TOLERANCE, decode_step, make_requests
from test_extend import BOUND, rotated_extend
from test_extend_dense import BOUND as DENSE_BOUND
from test_extend_dense import FA3, FLASHINFER, both_libraries, workspace_for
from test_position_rule import chunks_of, prompt
from test_verify import verify_together

KVARN, CANONICAL = KVarNConfig.from_preset("kvarn"), KVarNConfig.from_preset("kvarn_canonical")
both_rules = pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)
# the own token alone; within the own page, within the exact pages, over a page end of records
WINDOWS = [1, 100, PAGE + 1, 300]
in_every_window = pytest.mark.parametrize("window", WINDOWS)


def extend_kernel(window: int):
    """Return the kernel for short extend steps, between the store steps of the torch form."""
    return partial(between_stores, partial(rotated_extend, sliding_window=window))


@in_every_window
def test_reference_attention_reads_the_newest_tokens_alone(window):
    # a page of which nothing is read from a record
    request = make_request(PAGE, (4, 2), 64, torch.float32)
    expected = []
    for i in range(PAGE):
        seen = slice(max(i - window + 1, 0), i + 1)
        k, v = (x[seen].double().repeat_interleave(2, 1) for x in (request.k, request.v))
        weights = (torch.einsum("hd,khd->hk", request.q[i].double(), k) / 8).softmax(-1)
        expected.append(torch.einsum("hk,khd->hd", weights, v))
    assert relative_rms(oracle(request, KVARN, sliding_window=window), torch.stack(expected)) < 5e-6


@both_rules
def test_reference_attention_reads_tokens_in_a_window_as_without_one(config):
    request = make_request(3 * PAGE + 40, (2, 1), 64, torch.float32)
    assert torch.equal(oracle(request, config, sliding_window=len(request.q)), oracle(request, config))
    # whatever is older changes nothing: not a token, and not by the record of its page
    window, at = 200, len(request.q) - 1
    first = at - window + 1
    changed = replace(request, k=request.k.clone(), v=request.v.clone())
    for x in (changed.k, changed.v):
        x[: first // PAGE * PAGE] = 3.0
    args = (config, at, at + 1, window)
    assert torch.equal(oracle(changed, *args), oracle(request, *args))
    # the whole output comes from a page of which the oldest token in the window has all the weight
    loud = replace(request, q=request.q.clone(), k=request.k.clone())
    loud.q[at], loud.k[first // PAGE * PAGE] = 1.0, 40.0
    seen, gone = (oracle(loud, config, at, at + 1, at - first // PAGE * PAGE + n)[0] for n in (1, 0))
    assert relative_rms(seen, loud.v[first // PAGE * PAGE].expand_as(seen)) < 0.01 < relative_rms(gone, seen)


@both_rules
@in_every_window
def test_torch_form_matches_the_oracle(config, window):
    request = make_request(3 * PAGE + 31, (6, 2), 64, torch.float32)
    cache, most = cache_for(request, config), len(request.q) - 1
    attend = in_layer(torch_form.attend_extend, sliding_window=window)
    out = prefill(attend, request, [200, 1, most - 201], cache, config)
    attend = in_layer(torch_form.attend_decode, sliding_window=window)
    (last,) = run_decode(attend, [request], [most], cache, config)
    assert relative_rms(torch.cat([out, last[None]]), oracle(request, config, sliding_window=window)) < 5e-6


@both_rules
@pytest.mark.parametrize("exact_start", [PAGE, 3 * PAGE])
def test_a_prefix_hit_is_read_from_records_where_the_window_reaches_it(config, exact_start):
    request = make_request(3 * PAGE + 31, (2, 1), 64, torch.float16)
    hit, cache, window = replace(request, exact_start=exact_start), cache_for(request, config), 250
    prefill(torch_form.attend_extend, replace(request, row=2), [exact_start], cache, config)
    attend, new = in_layer(torch_form.attend_extend, sliding_window=window), len(request.q) - 1 - exact_start
    out = [prefill(attend, hit, [new], cache, config)] if new else []
    attention = attention_for(cache, 2, config, sliding_windows=[window])
    out += [run_decode(in_layer(attention, sliding_window=window), [hit], [len(request.q) - 1], cache, config)[0][None]]
    expected = oracle(hit, config, exact_start, sliding_window=window)
    assert relative_rms(torch.cat(out), expected) < TOLERANCE[torch.float16]


@pytest.mark.parametrize(
    ("window", "heads", "head_dim", "config"),
    [
        (1, (4, 1), 64, KVARN),
        (100, (4, 1), 64, CANONICAL),
        (PAGE + 1, (3, 1), 128, KVARN),
        (300, (2, 1), 64, CANONICAL),
        (300, (2, 1), 256, KVARN),
    ],
    ids=str,
)
def test_decode_steps_match_the_oracle(config, window, heads, head_dim):
    # a window of several splits, one that has just filled, one that begins in a page of records
    requests = make_requests([4 * PAGE + 9, window, 4 * PAGE], heads, head_dim, torch.float16)
    outs = decode_step(requests, heads, config, padding=2, sliding_window=window)
    for request, out in zip(requests, outs, strict=True):
        expected = oracle(request, config, len(request.q) - 1, sliding_window=window)[0]
        assert relative_rms(out, expected) < TOLERANCE[torch.float16], len(request.q)


@pytest.mark.parametrize("window", [1, 130])
def test_drafts_that_share_their_splits_match_the_oracle(window):
    drafts = 3
    # a page ends, and another leaves the window, among the drafts
    starts = [3 * PAGE - 2, 2 * PAGE + window - 2]
    requests = make_requests([n + drafts for n in starts], (4, 1), 64, torch.float16)
    verify_together(requests, starts, (4, 1), KVARN, drafts, TRITON, sliding_window=window)


@pytest.mark.parametrize(("window", "config"), [*((n, KVARN) for n in WINDOWS), (300, CANONICAL)], ids=str)
def test_extend_kernel_matches_the_oracle(config, window):
    request = make_request(3 * PAGE + 51, (3, 1), 64, torch.float16)
    out = prefill(extend_kernel(window), request, [70, 3 * PAGE - 19], cache_for(request, config), config)
    assert relative_rms(out, oracle(request, config, sliding_window=window)) < BOUND[torch.float16]


@pytest.mark.parametrize("window", [100, 400])
def test_extend_kernel_matches_the_oracle_where_pages_are_split(monkeypatch, window):
    monkeypatch.setattr(extend_module, "num_splits", lambda *step: 3)
    request, cached = make_request(5 * PAGE + 20, (4, 1), 64, torch.float16), 5 * PAGE
    cache = cache_for(request, KVARN)
    prefill(torch_form.attend_extend, request, [cached], cache, KVARN)
    (out,) = run_extend(extend_kernel(window), [request], [(cached, len(request.q))], cache, KVARN)
    assert relative_rms(out, oracle(request, KVARN, cached, sliding_window=window)) < BOUND[torch.float16]


@pytest.mark.parametrize(
    ("window", "room", "library"),
    [(1, 0, FLASHINFER), (100, 60, FA3), (PAGE + 1, 0, FA3), (300, 60, FLASHINFER), (300, 0, FLASHINFER)],
    ids=str,
)
def test_dense_steps_match_the_oracle_in_one_call_and_in_several(window, room, library):
    request = make_request(5 * PAGE + 11, (2, 1), 64, torch.float16)
    other = make_request(200, (2, 1), 64, torch.float16, row=2, first_page=10)
    workspace, calls = workspace_for(request, fewest_pages(window) + room, library), []

    def attend(new, out, cache, batch, config, sm_scale):
        plan = plan_dense(batch, workspace, config, gpu_of(DEVICE), window)
        calls.append(len(plan.segments))
        extend_dense(new, out, cache, batch, plan, config, sm_scale)

    cache, step = cache_for(request, KVARN), partial(between_stores, attend)
    outs = prefill(step, request, [2 * PAGE + 5], cache, KVARN)
    spans = [(2 * PAGE + 5, len(request.q)), (0, 200)]
    outs = [torch.cat([outs, (rest := run_extend(step, [request, other], spans, cache, KVARN))[0]]), rest[1]]
    assert (calls[1] > 1) == (room == 0)
    for found, own in zip(outs, (request, other), strict=True):
        assert relative_rms(found, oracle(own, KVARN, sliding_window=window)) < DENSE_BOUND[torch.float16]


@pytest.mark.parametrize(("form", "window"), [("torch", 100), ("torch", 300), ("kernel", 200)])
@both_rules
def test_the_bits_of_an_output_do_not_depend_on_chunks(form, config, window):
    tokens = (4 if form == "torch" else 3) * PAGE + 7
    attend = in_layer(torch_form.attend_extend, sliding_window=window) if form == "torch" else extend_kernel(window)
    whole = prefill(attend, prompt(tokens), [tokens], cache_for(prompt(tokens), config), config)
    for size in (100, PAGE + 1) if form == "torch" else (150,):
        out = prefill(attend, prompt(tokens), chunks_of(size, tokens), cache_for(prompt(tokens), config), config)
        assert torch.equal(out, whole)


def test_layers_of_one_step_may_have_different_windows():
    request, windows, config = make_request(4 * PAGE + 9, (2, 1), 64, torch.float16), (100, 300), KVARN
    cache, at = cache_for(request, config), len(request.q) - 1
    attention = attention_for(cache, 2, config, sliding_windows=windows)
    outs: dict[int, list[torch.Tensor]] = {}

    def attend(new, out, cache, batch, config, sm_scale):
        step = attention.plan(batch)
        before = cache.records.clone()
        for window in (*windows, 0):
            cache.records.copy_(before)
            attention.attend(new, out, cache, step, sm_scale, None, window)
            outs.setdefault(window, []).append(out.clone())

    prefill(torch_form.attend_extend, request, [at - 30], cache, config)
    run_extend(attend, [request], [(at - 30, at)], cache, config)
    run_decode(attend, [request], [at], cache, config)
    for window, found in outs.items():
        expected = oracle(request, config, at - 30, sliding_window=window)
        assert relative_rms(torch.cat(found), expected) < TOLERANCE[torch.float16]


@both_libraries
def test_layers_of_one_dense_step_may_have_different_windows(monkeypatch, library):
    request, windows, prefix = make_request(4 * PAGE + 9, (2, 1), 64, torch.float16), (100, 300), 3 * PAGE
    cache = cache_for(request, KVARN)
    attention = attention_for(cache, 2, KVARN, sliding_windows=windows)
    monkeypatch.setattr(attention, "_dense_workspace", workspace_for(request, 8, library))
    monkeypatch.setattr(attention, "_extend_form", lambda *step: DENSE)
    outs: dict[int, list[torch.Tensor]] = {window: [] for window in (0, *windows)}

    def attend(new, out, cache, batch, config, sm_scale):
        step = attention.plan(batch)
        for window, found in outs.items():
            plan = step.sliding_plans.get(window, step.plan)
            extend_dense(new, out, cache, batch, plan, config, sm_scale)
            found.append(out.clone())

    prefill(torch_form.attend_extend, request, [prefix], cache, KVARN)
    run_extend(partial(between_stores, attend), [request], [(prefix, len(request.q))], cache, KVARN)
    for window, (found,) in outs.items():
        expected = oracle(request, KVARN, prefix, sliding_window=window)
        assert relative_rms(found, expected) < DENSE_BOUND[torch.float16]


def test_a_window_that_no_step_is_planned_for_is_an_error():
    request = make_request(40, (2, 1), 64, torch.float16)
    cache = cache_for(request, KVARN)
    attend = in_layer(attention_for(cache, 2, KVARN, sliding_windows=[100]), sliding_window=99)
    with pytest.raises(AssertionError, match="planned for the windows of the model"):
        run_decode(attend, [request], [0], cache, KVARN)


def test_random_windows_of_random_requests_match_the_oracle():
    draw = random.Random(0)
    for _ in range(40):
        window, config = draw.randint(1, 400), draw.choice([KVARN, CANONICAL])
        request = make_request(draw.randint(2, 4 * PAGE), (2, 1), 64, torch.float32)
        cache, at = cache_for(request, config), len(request.q) - 1
        cut = draw.randint(0, at)
        attend = in_layer(torch_form.attend_extend, sliding_window=window)
        out = prefill(attend, request, [n for n in (cut, at - cut) if n], cache, config)
        attend = in_layer(torch_form.attend_decode, sliding_window=window)
        out = torch.cat([out, run_decode(attend, [request], [at], cache, config)[0][None]])
        expected = reference.attention(request.q, request.k, request.v, config, sliding_window=window)
        assert relative_rms(out, expected) < 5e-6, (window, len(request.q), cut)
