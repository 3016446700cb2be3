# SPDX-License-Identifier: Apache-2.0
"""The fixture `poisoned_memory` reaches what the packages allocate, and nobody else's memory."""

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.read.decode_plan import DecodeWorkspace, make_workspace
from kvarn_kernels.shape import AttentionShape

ALLOCATIONS = ["torch.empty(3, dtype=x.dtype)", "torch.empty_like(x)", "x.new_empty(3)"]


def evaluate(expression: str, x: torch.Tensor, module: str) -> torch.Tensor:
    """Return the value of an expression in a module of this name."""
    return eval(expression, {"__name__": module, "torch": torch, "x": x})


@pytest.mark.parametrize("module", ["kvarn_kernels.attention", "sglang_kvarn.pool"])
@pytest.mark.parametrize("expression", ALLOCATIONS)
def test_fresh_memory_of_the_packages_is_poison(expression, module):
    assert evaluate(expression, torch.ones(3), module).isnan().all()
    assert evaluate(expression, torch.ones(3, dtype=torch.bfloat16), module).isnan().all()
    assert (evaluate(expression, torch.ones(3, dtype=torch.int32), module) == -1).all()
    assert (evaluate(expression, torch.ones(3, dtype=torch.uint8), module) == 0xFF).all()


@pytest.mark.parametrize("expression", ALLOCATIONS)
def test_memory_of_others_and_of_no_device_is_left_alone(expression, monkeypatch):
    def refuse(*_):
        raise AssertionError("filled")

    with torch.device("meta"):
        assert evaluate(expression, torch.ones(3), "kvarn_kernels.attention").shape == (3,)
    monkeypatch.setattr(torch.Tensor, "fill_", refuse)
    assert evaluate(expression, torch.ones(3), "sglang.srt.mem_cache").shape == (3,)


def test_workspace_begins_as_poison():
    shape, config = AttentionShape(4, 2, 64, torch.float16), KVarNConfig.from_preset("kvarn")
    workspace: DecodeWorkspace = make_workspace(shape, config, torch.device("cpu"), 2, 4, resident=8)
    assert all(x.isnan().all() for x in (workspace.rotated_q, workspace.partial_out, workspace.partial_lse))
    assert (workspace.split_requests == -1).all()
