# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no extend step launches a kernel that was not launched before, so none waits for a compiler."""

import dataclasses
import inspect

import flashinfer_standin
import pytest
import torch
from builders import DEVICE, PAGE, attention_for, cache_for, make_request, prefill, run_extend, shape_of, with_sinks
from kvarn_kernels.attention import Attention
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense, paged_calls, segments
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.extend_choice import DENSE
from kvarn_kernels.read import extend

HEADS, HEAD_DIM = (8, 1), 64


class Launches:
    """What Triton would compile of each launch: constants, dtypes, and properties of other integers.

    Attributes:
        variants: so far; runs: whether launches run, which takes the interpreter most of a minute.
    """

    def __init__(self) -> None:
        self.variants: set[tuple] = set()
        self.runs = True


@pytest.fixture
def launches(monkeypatch) -> Launches:
    """Collect the launches of this test."""
    launches = Launches()
    call = TritonLauncher.__call__

    def collected(self, grid, *, num_warps, **named):
        kinds = []
        if DEVICE.type == "cuda":
            free = [parameter.name for parameter in self._kernel.params if parameter.do_not_specialize]
        else:
            free = self._kernel.kwargs.get("do_not_specialize") or ()
        for parameter in inspect.signature(self._kernel.fn).parameters.values():
            x = named[parameter.name]
            if isinstance(x, torch.Tensor):
                kinds.append((x.dtype, x.data_ptr() % 16 == 0))
            elif "constexpr" in str(parameter.annotation):
                kinds.append(x)
            elif isinstance(x, int) and parameter.name not in free:
                kinds.append((x == 1, x % 16 == 0))
            else:
                kinds.append(type(x))
        launches.variants.add((self._kernel.__name__, num_warps, *kinds))
        if launches.runs:
            call(self, grid, num_warps=num_warps, **named)

    monkeypatch.setattr(TritonLauncher, "__call__", collected)
    return launches


def dense_attention(cache, config) -> Attention:
    """Return an `Attention` that runs every step on FlashInfer, in a workspace of 4 pages."""
    attention = attention_for(cache, HEADS[0], config, max_batch=2)
    standin = None if DEVICE.type == "cuda" else flashinfer_standin
    library = paged_calls.FlashInfer(DEVICE, standin)
    attention._dense_workspace = extend_dense.make_workspace(shape_of(cache, HEADS[0]), 4, DEVICE, library)
    attention._extend_form = lambda *step: DENSE
    return attention


@pytest.mark.parametrize(
    ("preset", "has_sinks"), [("kvarn", False), ("kvarn_canonical", False), ("kvarn", True)], ids=str
)
def test_no_step_launches_what_the_warm_up_did_not(preset, has_sinks, launches, monkeypatch):
    config = KVarNConfig.from_preset(preset)
    sinks = torch.zeros(HEADS[0], dtype=torch.bfloat16, device=DEVICE) if has_sinks else None
    monkeypatch.setattr(extend, "MIN_SPLIT_PAGES", 1)
    monkeypatch.setattr(segments, "SPLIT_PAGES", 1)
    requests = [make_request(n, HEADS, HEAD_DIM, torch.float16, row=row, first_page=8 * row - 7, seed=row)
                for row, n in ((1, 4 * PAGE + 40), (2, 2 * PAGE + 9))]  # fmt: skip
    cache = cache_for(requests[0], config)
    cache.records[0].zero_()
    attentions = [attention_for(cache, HEADS[0], config, max_batch=2)]
    if not config.fixed_order:
        attentions.append(dense_attention(cache, config))
    encoders, encoder = [], attentions[0]._encode
    encode_from_chunk = encoder.encode_from_chunk
    monkeypatch.setattr(encoder, "encode_from_chunk", lambda *a: encoders.append(a) or encode_from_chunk(*a))
    attentions[-1].warm_up(cache, config.ring_pages(HEAD_DIM, 2), sinks)
    warmed = set(launches.variants)
    assert torch.isfinite(cache.exact[0]).all()
    assert encoders and {name for name, *_ in warmed} >= {"_rotate_kernel", "_extend_kernel", "_store_kernel"}
    if not config.fixed_order:
        assert {name for name, *_ in warmed} >= {"_dequantise_kernel", "_merge_parts_kernel", "_merge_kernel"}
    # what they would launch is enough
    launches.runs = False
    monkeypatch.setattr(encoder, "encode_from_chunk", lambda *a: None)
    for attention in (attentions if sinks is None else [with_sinks(each, sinks) for each in attentions]):
        prefill(attention, requests[0], [PAGE + 1, 3 * PAGE - 1, 40], cache, config)
        prefill(attention, requests[1], [PAGE], cache, config)
        padded = dataclasses.replace(make_request(1, HEADS, HEAD_DIM, torch.float16), row=0, pages=[0])
        spans = [(4 * PAGE, 4 * PAGE + 1), (PAGE, 2 * PAGE + 9), (0, 1)]
        run_extend(attention, [*requests, padded], spans, cache, config, padding=3)
    assert launches.variants == warmed
