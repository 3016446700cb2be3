# SPDX-License-Identifier: Apache-2.0
"""What `describe` says is what the conditions of the kernels choose."""

from __future__ import annotations

import pytest
import torch
from kvarn_kernels import gpu, nvrtc, ops
from kvarn_kernels.config import KVarNConfig

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
KVARN, CANONICAL = KVarNConfig.from_preset("kvarn"), KVarNConfig.from_preset("kvarn_canonical")
ALL_CUDA = "encode by CUDA C++ (encode.cu), decode by CUDA C++ (decode_sm90.cu), "
AMPERE = "encode by CUDA C++ (encode.cu), decode by Triton, "
TRITON = "encode by Triton, decode by Triton, "
FLASHINFER = "short extends by Triton, long extends by FlashInfer"
ONE_FORM = "extends by Triton"


@pytest.fixture(autouse=True)
def shared_memory_of_an_h100(monkeypatch):
    """Let a GPU of any capability have the shared memory that decode_sm90.cu plans with."""
    monkeypatch.setattr(gpu, "shared_memory_of_multiprocessor", lambda: 228 << 10)


@pytest.mark.parametrize(
    ("capability", "dtype", "config", "flashinfer", "text"),
    [
        ((9, 0), torch.bfloat16, KVARN, True, ALL_CUDA + FLASHINFER),
        ((10, 0), torch.float16, KVARN, False, ALL_CUDA + ONE_FORM),
        ((9, 0), torch.bfloat16, CANONICAL, True, ALL_CUDA + ONE_FORM),
        ((8, 0), torch.bfloat16, KVARN, True, AMPERE + FLASHINFER),
        # without NVRTC
        ((0, 0), torch.bfloat16, KVARN, True, TRITON + FLASHINFER),
        ((9, 0), torch.float32, KVARN, True, TRITON + ONE_FORM),
    ],
)
def test_describe_names_what_runs_on_a_gpu(monkeypatch, capability, dtype, config, flashinfer, text):
    monkeypatch.setattr(nvrtc, "capability", lambda device: capability)
    monkeypatch.setattr(ops, "_has_flashinfer", lambda: True)
    assert ops.describe(CUDA, dtype, 128, config, flashinfer=flashinfer) == text


def test_describe_does_not_name_a_flashinfer_that_is_not_there(monkeypatch):
    monkeypatch.setattr(nvrtc, "capability", lambda device: (9, 0))
    monkeypatch.setattr(ops, "_has_flashinfer", lambda: False)
    assert ops.describe(CUDA, torch.bfloat16, 128, KVARN) == ALL_CUDA + ONE_FORM


def test_describe_names_torch_or_the_interpreted_kernels_on_a_cpu(monkeypatch):
    monkeypatch.delenv(ops.INTERPRET_ENV, raising=False)
    assert ops.describe(CPU, torch.float32, 64, KVARN) == "encode, decode and extends by torch"
    monkeypatch.setenv(ops.INTERPRET_ENV, "triton")
    assert ops.describe(CPU, torch.bfloat16, 64, KVARN) == TRITON + ONE_FORM
