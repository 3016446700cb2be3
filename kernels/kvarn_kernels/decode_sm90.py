# SPDX-License-Identifier: Apache-2.0
"""Host side of decode_sm90.cu: compile it for a format, launch it."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvarn_kernels import gpu, nvrtc
from kvarn_kernels.cache import DecodeBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.launch import CudaLauncher, current_stream

SOURCE = "decode_sm90.cu"
THREADS = 128
# what resident blocks share, and what each of them needs besides its records
SHARED_OF_MULTIPROCESSOR, SHARED_BESIDES = 228 << 10, 1536
# resident blocks per multiprocessor by head_dim, the most that keep every value in registers
MIN_BLOCKS = {64: 4, 128: 3, 256: 2}
# the units of work of the ring (decode_plan.py): RING_UNITS for each RING_CHUNK tokens, which 4 warps attend at once
RING_CHUNK = 64
RING_UNITS = 2


def is_supported(device: torch.device) -> bool:
    """Return whether decode_sm90.cu can serve a device: NVRTC reachable, capability 9.0 or newer, shared memory enough.

    Its buffers are sized for the 228 KiB of a multiprocessor of capability 9.0 or 10.0. GPUs of capability 12.0 have
    100 KiB, where a block of head_dim 256 would not start; the Triton kernel runs there.
    """
    return nvrtc.capability(device) >= (9, 0) and gpu.shared_memory_of_multiprocessor() >= SHARED_OF_MULTIPROCESSOR


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether decode_sm90.cu can serve a model: a device that it supports, 16-bit floats."""
    return dtype != torch.float32 and is_supported(device)


def teams(record_bytes: int, head_dim: int) -> tuple[int, int]:
    """Return (warps that share a tile, buffers for each team of them).

    Two warps need a quarter fewer instructions for a tile than four (H200, 64 x 16,384: 286 us against 334 us); then
    four records are in flight or being read, which the largest format has no memory for.
    """
    left = SHARED_OF_MULTIPROCESSOR // MIN_BLOCKS[head_dim] - SHARED_BESIDES
    return (2, 2) if 4 * record_bytes <= left else (4, 3)


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, split_units: int
) -> dict[str, int]:
    """Return the constants of decode_sm90.cu for a format."""
    tile_warps, stages = teams(config.record_bytes(head_dim), head_dim)
    return nvrtc.format_constants(config, head_dim, num_kv_heads, is_bf16) | {
        "GROUP": group,
        "WINDOW": config.window_pages,
        "RING_CHUNK": RING_CHUNK,
        "RING_UNITS": RING_UNITS,
        "SPLIT_UNITS": split_units,
        "STAGES": stages,
        "TILE_WARPS": tile_warps,
        "MIN_BLOCKS": MIN_BLOCKS[head_dim],
    }


def blocks_per_split(num_qo_heads: int, num_kv_heads: int) -> int:
    """Return the blocks of a split: one for each KV head and 8 of its query heads."""
    return num_kv_heads * -(-num_qo_heads // num_kv_heads // 8)


def shared_bytes(defines: dict[str, int]) -> int:
    """Return the dynamic shared memory of a block: the buffers of its 4 warps, at the end their sums of 8 heads."""
    buffers = 4 // defines["TILE_WARPS"] * defines["STAGES"]
    return max(buffers * defines["RECORD"], 4 * 8 * defines["D"] * 4)


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, split_units: int, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16, split_units)
    return nvrtc.compile_kernel(SOURCE, "kvarn_decode", defines, device, THREADS, shared_bytes(defines))


def decode(
    cache: LayerCache,
    batch: DecodeBatch,
    config: KVarNConfig,
    num_qo_heads: int,
    num_kv_heads: int,
    sm_scale_log2: float,
    split_units: int,
) -> None:
    """Run the contract of `decode.decode`; the first call for a format compiles (about a second).

    Args:
        sm_scale_log2: factor of the scores times log2(e).
        split_units: units of a split, 0 for an even share of the request.
    """
    workspace = batch.workspace
    assert workspace is not None
    batch_size, head_dim, group = batch.rows.shape[0], cache.ring_k.shape[3], num_qo_heads // num_kv_heads
    is_bf16 = cache.ring_k.dtype == torch.bfloat16
    kernel = _compiled(
        config, head_dim, num_kv_heads, group, is_bf16, split_units, cache.ring_k.device.index or 0
    )
    kernel(
        (workspace.max_splits[batch_size - 1], blocks_per_split(num_qo_heads, num_kv_heads), 1),
        current_stream(cache.records.device),
        workspace.rotated_q,
        cache.records,
        cache.ring_k,
        cache.ring_v,
        batch.page_table,
        batch.rows,
        batch.seq_lens,
        batch.exact_starts,
        workspace.split_requests,
        workspace.split_indptr,
        workspace.partial_out,
        workspace.partial_lse,
        batch.page_table.stride(0),
        sm_scale_log2,
        batch_size,
    )
