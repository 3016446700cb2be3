# SPDX-License-Identifier: Apache-2.0
"""Decode attention of many columns by CUDA C++ for capability 9.0 (verify_sm90.cu): the contract of decode.py.

A column is a query head of a KV head for a draft. More columns than a block of columns_sm90.cu has are rows of products
here, up to 128 of a block, for which records are unpacked into shared memory once.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from kvarn_kernels.batch import DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.device.launch import CudaLauncher
from kvarn_kernels.device.wgmma import ARCHITECTURE, CAPABILITY
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read import columns_sm90, decode_sm90, extend_sm90
from kvarn_kernels.read.attend_rows import HEAD_DIMS, Warps, row_constants
from kvarn_kernels.read.decode_plan import DecodeWorkspace

SOURCE, KERNEL = Path(__file__).with_name("verify_sm90.cu"), "kvarn_verify"
# of blocks of 64 rows and of 128
FEW, MANY = Warps(64, 128, 192), extend_sm90.WARPS


def serves(head_dim: int, group: int, drafts: int, gpu: Gpu) -> bool:
    """Return whether steps of so many drafts are attended by this kernel on a GPU."""
    return gpu.capability == CAPABILITY and head_dim in HEAD_DIMS and drafts * group > columns_sm90.most(head_dim)


def warps(group: int, drafts: int) -> Warps:
    """Return how the warpgroups of a block share its work."""
    return FEW if drafts * group <= FEW.rows else MANY


def columns(head_dim: int, group: int, drafts: int) -> int:
    """Return the columns of a block."""
    return warps(group, drafts).rows


def resident_programs(head_dim: int, columns: int, gpu: Gpu) -> int:
    """Return the blocks of the kernel that a GPU runs at once; columns: of a block."""
    return gpu.multiprocessors


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, ring_pages: int, drafts: int = 1
) -> dict[str, Any]:
    """Return the constants of verify_sm90.cu; arguments as for `decode_sm90.constants`."""
    form = (config, head_dim, num_kv_heads, group, is_bf16, ring_pages)
    return decode_sm90.step_constants(*form, drafts) | row_constants(warps(group, drafts), *form)


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig,
    head_dim: int,
    num_kv_heads: int,
    group: int,
    is_bf16: bool,
    ring_pages: int,
    drafts: int,
    device: int,
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16, ring_pages, drafts)
    threads, shared_bytes = defines["THREADS"], defines["SHARED_BYTES"]
    return nvrtc.compile_kernel(SOURCE, KERNEL, defines, device, threads, shared_bytes, ARCHITECTURE)


def decode(
    cache: LayerCache, batch: DecodeBatch, workspace: DecodeWorkspace, config: KVarNConfig, sm_scale: float
) -> None:
    """Run the contract of `decode.decode` but for sliding windows; the first call for a format compiles (seconds)."""
    decode_sm90.launch_columns(_compiled, columns, cache, batch, workspace, config, sm_scale)
