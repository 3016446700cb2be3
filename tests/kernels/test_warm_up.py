# SPDX-License-Identifier: Apache-2.0
"""After the warm-up no extend step launches a kernel that was not launched before, so none waits for a compiler."""

import dataclasses
import inspect

import flashinfer_standin
import pytest
import torch
from builders import DEVICE, PAGE, cache_for, make_request, prefill, run_extend
from kvarn_kernels import encode, extend, ops, prefill_plan
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.launch import TritonLauncher
from kvarn_kernels.prefill import make_workspace
from kvarn_kernels.warm_up import warm_up

HEADS, HEAD_DIM = (8, 1), 64


@pytest.fixture
def variants(monkeypatch) -> set[tuple]:
    """Collect what Triton would compile of each launch: constants, dtypes, and properties of other integers."""
    found = set()
    call = TritonLauncher.__call__

    def collected(self, grid, *args, num_warps):
        kinds = []
        if DEVICE.type == "cuda":
            free = [parameter.name for parameter in self._kernel.params if parameter.do_not_specialize]
        else:
            free = self._kernel.kwargs.get("do_not_specialize") or ()
        parameters = inspect.signature(self._kernel.fn).parameters.values()
        for parameter, x in zip(parameters, args, strict=True):
            if isinstance(x, torch.Tensor):
                kinds.append((x.dtype, x.data_ptr() % 16 == 0))
            elif "constexpr" in str(parameter.annotation):
                kinds.append(x)
            elif isinstance(x, int) and parameter.name not in free:
                kinds.append((x == 1, x % 16 == 0))
            else:
                kinds.append(type(x))
        found.add((self._kernel.__name__, num_warps, *kinds))
        call(self, grid, *args, num_warps=num_warps)

    monkeypatch.setattr(TritonLauncher, "__call__", collected)
    return found


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_no_step_launches_what_the_warm_up_did_not(preset, variants, monkeypatch):
    config = KVarNConfig.from_preset(preset)
    monkeypatch.setenv(ops.INTERPRET_ENV, "triton")
    monkeypatch.setattr(extend, "MIN_SPLIT_PAGES", 1)
    monkeypatch.setattr(prefill_plan, "SPLIT_PAGES", 1)
    encoders = []
    encode_from_chunk = encode.encode_from_chunk
    monkeypatch.setattr(encode, "encode_from_chunk", lambda *a: encoders.append(a) or encode_from_chunk(*a))
    requests = [make_request(n, HEADS, HEAD_DIM, torch.float16, row=row, first_page=8 * row - 7, seed=row)
                for row, n in ((1, 4 * PAGE + 40), (2, 2 * PAGE + 9))]  # fmt: skip
    cache = cache_for(requests[0], config)
    cache.records[0].zero_()
    cache.ring_k[0].zero_(), cache.ring_v[0].zero_()
    library = None if DEVICE.type == "cuda" else flashinfer_standin
    workspaces = [None]
    if not config.is_canonical:
        workspaces.append(make_workspace(HEADS[0], HEADS[1], HEAD_DIM, torch.float16, 4, DEVICE, library))
    warm_up(cache, HEADS[0], config, workspaces[-1])
    warmed = set(variants)
    assert encoders and {name for name, *_ in warmed} >= {"_rotate_kernel", "_extend_kernel", "_store_kernel"}
    if not config.is_canonical:
        assert {name for name, *_ in warmed} >= {"_dequantise_kernel", "_merge_parts_kernel", "_merge_kernel"}
    for workspace in workspaces:
        prefill(ops.extend_attention, requests[0], [PAGE + 1, 3 * PAGE - 1, 40], cache, config, workspace)
        prefill(ops.extend_attention, requests[1], [PAGE], cache, config, workspace)
        padded = dataclasses.replace(make_request(1, HEADS, HEAD_DIM, torch.float16), row=0, pages=[0])
        spans = [(4 * PAGE, 4 * PAGE + 1), (PAGE, 2 * PAGE + 9), (0, 1)]
        run_extend(ops.extend_attention, [*requests, padded], spans, cache, config, workspace=workspace, padding=3)
    assert variants == warmed
    assert torch.isfinite(cache.ring_k[0]).all() and torch.isfinite(cache.ring_v[0]).all()
