# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of dequantise, compiled by NVRTC without a GPU; test_dequantise.py has its results."""

import pytest
from cubin import compiled, registers_and_stack
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import dequantise_cuda
from kvarn_kernels.device import nvrtc


@pytest.mark.parametrize(
    ("preset", "head_dim", "is_bf16", "capability"),
    [
        ("kvarn", 64, True, "90"),
        ("kvarn", 128, True, "80"),
        ("kvarn", 128, True, "90"),
        ("kvarn", 128, True, "120"),
        ("kvarn", 256, False, "90"),
        ("kvarn_k4v3_g128", 128, False, "90"),
        ("kvarn_k4v3_g128", 256, True, "90"),
        ("kvarn_k4v4_g128", 128, True, "100"),
        ("kvarn_k3v2_g128", 64, True, "90"),
        ("kvarn_k2v2_g128", 256, True, "90"),
    ],
)
def test_dequantise_compiles_into_registers(preset, head_dim, is_bf16, capability, tmp_path):
    config = KVarNConfig.from_preset(preset)
    defines = dequantise_cuda.constants(config, head_dim, 8, is_bf16, config.ring_pages(head_dim, 2))
    source = nvrtc.source(dequantise_cuda.SOURCE, defines)
    registers, stack = registers_and_stack(compiled(source, "kvarn_dequantise", capability), tmp_path)
    blocks, threads = dequantise_cuda.MIN_BLOCKS[head_dim], dequantise_cuda.threads(head_dim)
    assert registers * threads * blocks <= 65536, registers
    assert stack == 0
