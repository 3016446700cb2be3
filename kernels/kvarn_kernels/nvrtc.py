# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA C++ kernels of this package with the NVRTC that torch brings; no nvcc is needed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels import tile
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.launch import CudaLauncher

logger = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability for which kernels can be compiled and launched, (0, 0) where they cannot."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    if not hasattr(torch.cuda, "_compile_kernel"):
        logger.warning("this torch has no torch.cuda._compile_kernel: the portable Triton kernels run instead")
        return 0, 0
    return torch.cuda.get_device_capability(device)


def format_constants(config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants that every kernel over records needs; every offset comes from `tile`."""
    k_bits, v_bits = config.k_bits, config.v_bits
    return {
        "D": head_dim,
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "K_FIELD_BITS": tile.low_bits(k_bits),
        "V_FIELD_BITS": tile.low_bits(v_bits),
        "HK": num_kv_heads,
        "BF16": int(is_bf16),
        "K_CHANNEL_BLOCKS": tile.k_channel_blocks(head_dim, k_bits),
        "V_CHANNEL_BLOCKS": tile.v_channel_blocks(v_bits),
        "TOP_INDEX": tile.top_index(head_dim),
        "RECORD": tile.record_bytes(head_dim, k_bits, v_bits),
        "V_CODES_OFFSET": tile.v_codes_offset(head_dim, k_bits),
        "SCALES_OFFSET": tile.scales_offset(head_dim, k_bits, v_bits),
        "K_CHANNEL_SCALE": tile.k_channel_scale_index(head_dim),
        "K_CHANNEL_ZERO": tile.k_channel_zero_index(head_dim),
        "V_CHANNEL_SCALE": tile.v_channel_scale_index(head_dim),
        "K_TOKEN_SCALE": tile.k_token_scale_index(head_dim),
        "V_TOKEN_SCALE": tile.v_token_scale_index(head_dim),
        "V_TOKEN_ZERO": tile.v_token_zero_index(head_dim),
        "K_FIRST": tile.k_first_index(head_dim),
        "V_FIRST": tile.v_first_index(head_dim),
    }


def source(name: str, defines: dict[str, Any]) -> str:
    """Return the CUDA source of this package's file `name` with its constants in front."""
    lines = [f"#define {key} {value}" for key, value in defines.items()]
    return "\n".join([*lines, (Path(__file__).parent / name).read_text()])


def compile_kernel(
    name: str, kernel: str, defines: dict[str, Any], device: int, threads: int, shared_bytes: int = 0
) -> CudaLauncher:
    """Return a launchable kernel of file `name` for a device; takes seconds.

    Args:
        threads: of a block; shared_bytes: dynamic shared memory of a block.
    """
    major, minor = torch.cuda.get_device_capability(device)
    loaded = torch.cuda._compile_kernel(source(name, defines), kernel, compute_capability=f"{major}{minor}")
    loaded.set_shared_memory_config(shared_bytes)
    return CudaLauncher(loaded, torch.cuda._utils._get_gpu_runtime_library(), threads, shared_bytes)
