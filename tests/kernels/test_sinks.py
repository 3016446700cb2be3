# SPDX-License-Identifier: Apache-2.0
"""Attention sinks in every form: oracle, torch, Triton's kernels and what merges their splits, dense steps."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    attention_for,
    between_stores,
    cache_for,
    make_request,
    prefill,
    relative_rms,
    run_decode,
    run_extend,
    with_sinks,
)
from kvarn_kernels import reference, torch_form
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense.extend_dense import extend_dense, plan_dense
from kvarn_kernels.device.gpu import gpu_of
from kvarn_kernels.read import extend as extend_module
from test_extend import BOUND, rotated_extend
from test_extend_dense import BOUND as DENSE_BOUND
from test_extend_dense import workspace_for

KVARN, CANONICAL = KVarNConfig.from_preset("kvarn"), KVarNConfig.from_preset("kvarn_canonical")
both_rules = pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)


def make_sinks(heads: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a sink for each head, from one that takes nearly nothing to one that takes most of the weight."""
    return torch.linspace(-3, 9, heads).to(dtype).to(DEVICE)


def expected(request, config: KVarNConfig, sinks: torch.Tensor | None, start: int = 0) -> torch.Tensor:
    return reference.attention(
        request.q[start:], request.k, request.v, config, exact_start=request.exact_start, sinks=sinks
    )


def extend_kernel(sinks: torch.Tensor):
    """Return the kernel for short extend steps, between the store steps of the torch form."""
    return partial(between_stores, partial(rotated_extend, sinks=sinks))


def test_reference_attention_gives_a_sink_its_share_of_the_softmax():
    # a page of which nothing is read from a record
    request = make_request(PAGE, (4, 2), 64, torch.float32)
    sinks = make_sinks(4)
    keys = request.k.double().transpose(0, 1).repeat_interleave(2, 0)
    scores = request.q.double().transpose(0, 1) @ keys.transpose(1, 2) / 8
    lse = scores.masked_fill(torch.ones(PAGE, PAGE, dtype=torch.bool, device=DEVICE).triu(1), -torch.inf).logsumexp(-1)
    share = 1 / (1 + torch.exp(sinks.double()[:, None] - lse))
    assert share.min() < 0.1 and share.max() > 0.9, "both kinds of sinks are tested"
    without = expected(request, KVARN, None) * share.T[..., None]
    assert relative_rms(expected(request, KVARN, sinks), without) < 5e-6


@both_rules
def test_torch_form_weighs_sinks_in_extend_and_decode_steps(config):
    request = make_request(2 * PAGE + 31, (6, 2), 64, torch.float32)
    cache, sinks = cache_for(request, config), make_sinks(6)
    most = len(request.q) - 1
    out = prefill(with_sinks(torch_form.attend_extend, sinks), request, [200, most - 200], cache, config)
    (last,) = run_decode(with_sinks(torch_form.attend_decode, sinks), [request], [most], cache, config)
    assert relative_rms(torch.cat([out, last[None]]), expected(request, config, sinks)) < 5e-6


@both_rules
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_decode_steps_weigh_sinks_where_splits_are_merged(config, dtype):
    # more splits than one, and requests of one split, one page and one token
    requests = [
        make_request(tokens, (6, 2), 64, torch.float16, row=row, first_page=1 + 8 * (row - 1))
        for row, tokens in enumerate((5 * PAGE + 9, PAGE, 1), start=1)
    ]
    cache, sinks = cache_for(requests[0], config, pages=32), make_sinks(6, dtype)
    for request in requests[:2]:
        prefill(with_sinks(torch_form.attend_extend, sinks), request, [len(request.q) - 1], cache, config)
    attend = with_sinks(attention_for(cache, 6, config), sinks)
    outs = run_decode(attend, requests, [len(r.q) - 1 for r in requests], cache, config, padding=1)
    for request, out in zip(requests, outs, strict=True):
        assert relative_rms(out, expected(request, config, sinks, len(request.q) - 1)[0]) < 2e-3


def test_drafts_that_share_their_splits_have_the_sinks_of_their_heads():
    start, drafts = PAGE + 40, 3
    request = make_request(start + drafts, (4, 1), 64, torch.float16)
    cache, sinks = cache_for(request, KVARN), make_sinks(4)
    prefill(torch_form.attend_extend, request, [start], cache, KVARN)
    attention = attention_for(cache, 4, KVARN, max_batch=drafts, drafts=drafts)
    places = range(start, start + drafts)
    outs = run_decode(with_sinks(attention, sinks), [request] * drafts, places, cache, KVARN, drafts=drafts)
    assert relative_rms(torch.stack(outs), expected(request, KVARN, sinks, start)) < 2e-3


@pytest.mark.parametrize(("heads", "head_dim"), [((8, 1), 64), ((3, 1), 128)], ids=str)
def test_extend_steps_weigh_sinks_in_one_piece(heads, head_dim):
    request, sinks = make_request(PAGE + 51, heads, head_dim, torch.float16), make_sinks(heads[0])
    out = prefill(extend_kernel(sinks), request, [70, PAGE - 19], cache_for(request, CANONICAL), CANONICAL)
    assert relative_rms(out, expected(request, CANONICAL, sinks)) < BOUND[torch.float16]


def test_extend_steps_weigh_sinks_once_where_pages_are_split(monkeypatch):
    monkeypatch.setattr(extend_module, "num_splits", lambda *step: 3)
    request, sinks = make_request(4 * PAGE + 20, (4, 1), 64, torch.float16), make_sinks(4)
    cache, cached = cache_for(request, KVARN), 4 * PAGE
    prefill(torch_form.attend_extend, request, [cached], cache, KVARN)
    (out,) = run_extend(extend_kernel(sinks), [request], [(cached, len(request.q))], cache, KVARN)
    assert relative_rms(out, expected(request, KVARN, sinks, cached)) < BOUND[torch.float16]


@pytest.mark.parametrize("pages", [64, 3], ids=["one_call", "merged_calls"])
def test_dense_steps_weigh_sinks_last(pages):
    request, sinks = make_request(5 * PAGE + 11, (4, 2), 64, torch.float16), make_sinks(4, torch.bfloat16)
    workspace, calls = workspace_for(request, pages=pages), []

    def attend(new, out, cache, batch, config, sm_scale):
        plan = plan_dense(batch, workspace, config, gpu_of(DEVICE))
        calls.append(len(plan.segments))
        extend_dense(new, out, cache, batch, plan, config, sm_scale, sinks)

    out = prefill(partial(between_stores, attend), request, [len(request.q)], cache_for(request, KVARN), KVARN)
    assert (calls[0] > 1) == (pages == 3)
    assert relative_rms(out, expected(request, KVARN, sinks)) < DENSE_BOUND[torch.float16]


@pytest.mark.parametrize("sink", [-1e4, 1e4])
def test_extreme_sinks_take_no_weight_or_all_of_it(sink):
    request = make_request(PAGE + 3, (2, 1), 64, torch.float16)
    cache, sinks, most = cache_for(request, KVARN), torch.full((2,), sink, device=DEVICE), PAGE + 2
    outs = [prefill(extend_kernel(sinks), request, [most], cache, KVARN)]
    outs += run_decode(with_sinks(attention_for(cache, 2, KVARN), sinks), [request], [most], cache, KVARN)
    without = expected(request, KVARN, None)
    for out, own in zip(outs, (without[:most], without[most]), strict=True):
        if sink > 0:
            assert not out.any()
        else:
            assert relative_rms(out, own) < 2e-3
