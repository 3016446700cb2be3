# SPDX-License-Identifier: Apache-2.0
"""Decode attention of many columns by CUDA C++ for capability 9.0 (columns_sm90.cu): the contract of decode.py.

A column is a query head of a KV head for a draft. Steps of more than 8 columns run here, verify steps above all; steps
of fewer run decode_sm90.cu, and so do GPUs without the products of a warpgroup that this kernel is made of.
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
from kvarn_kernels.device.wgmma import ARCHITECTURE, CAPABILITY, product_operands
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read import decode_sm90
from kvarn_kernels.read.decode_plan import TILE_COLUMNS, DecodeWorkspace
from kvarn_kernels.record.tile import TILE_SIZE

SOURCE, KERNEL = Path(__file__).with_name("columns_sm90.cu"), "kvarn_decode_columns"
# by head_dim: (most columns of a block, blocks that a multiprocessor runs at once), all values in registers. Blocks of
# 64 columns of head_dim 128 were slower than verify_sm90.cu (H200, 64 x 16,384: 1,098 us against 926)
BLOCKS = {64: ((32, 4), (64, 2)), 128: ((16, 4), (32, 3), (48, 2)), 256: ((16, 2),)}
MAX_STAGES = 4
# bytes of shared memory of a block that the driver keeps, and of a column in its tables
RESERVED_BYTES, COLUMN_BYTES = 1024, 36


def serves(head_dim: int, group: int, drafts: int, gpu: Gpu) -> bool:
    """Return whether steps of so many drafts are attended by this kernel on a GPU."""
    return gpu.capability == CAPABILITY and head_dim in BLOCKS and drafts * group > TILE_COLUMNS


def most(head_dim: int) -> int:
    """Return the most columns of a block."""
    return BLOCKS[head_dim][-1][0]


def columns(head_dim: int, group: int, drafts: int) -> int:
    """Return the columns of a block, a multiple of 8: those of a KV head shared evenly by as few blocks as can be."""
    blocks = -(-drafts * group // most(head_dim))
    return max(2, -(-drafts * group // (blocks * TILE_COLUMNS))) * TILE_COLUMNS


def blocks_of_multiprocessor(head_dim: int, columns: int) -> int:
    """Return how many blocks of so many columns a multiprocessor runs at once."""
    return next(blocks for most, blocks in BLOCKS[head_dim] if columns <= most)


def resident_programs(head_dim: int, columns: int, gpu: Gpu) -> int:
    """Return the blocks of the kernel that a GPU runs at once; columns: of a block."""
    return gpu.multiprocessors * blocks_of_multiprocessor(head_dim, columns)


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, ring_pages: int, drafts: int = 1
) -> dict[str, Any]:
    """Return the constants of columns_sm90.cu; arguments as for `decode_sm90.constants`."""
    width = columns(head_dim, group, drafts)
    blocks = blocks_of_multiprocessor(head_dim, width)
    shared = decode_sm90.step_constants(config, head_dim, num_kv_heads, group, is_bf16, ring_pages, drafts)
    # fp16: queries of a record and half a step for its zeros, weights and two steps, the queries themselves
    operands = 2 * width * (head_dim + 8 + TILE_SIZE + 32 + head_dim) + 16
    tables = -(-(COLUMN_BYTES * width + 8 * MAX_STAGES) // 128) * 128
    besides = operands + tables + RESERVED_BYTES
    stages = min(MAX_STAGES, (decode_sm90.SHARED_OF_MULTIPROCESSOR // blocks - besides) // shared["RECORD"])
    return shared | {
        "BLOCK_COLUMNS": width,
        "STAGES": stages,
        "BUFFER": shared["RECORD"],
        "SHARED_BYTES": stages * shared["RECORD"] + operands,
        "MIN_BLOCKS": blocks,
        **product_operands(width),
    }


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
    return nvrtc.compile_kernel(
        SOURCE, KERNEL, defines, device, decode_sm90.THREADS, defines["SHARED_BYTES"], ARCHITECTURE
    )


def decode(
    cache: LayerCache, batch: DecodeBatch, workspace: DecodeWorkspace, config: KVarNConfig, sm_scale: float
) -> None:
    """Run the contract of `decode.decode` but for sliding windows; the first call for a format compiles (a second)."""
    decode_sm90.launch_columns(_compiled, columns, cache, batch, workspace, config, sm_scale)
