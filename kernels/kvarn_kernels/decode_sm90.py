# SPDX-License-Identifier: Apache-2.0
"""Host side of decode_sm90.cu: compile it for a format, launch it."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import torch

from kvarn_kernels import nvrtc
from kvarn_kernels.cache import DecodeBatch, LayerCache
from kvarn_kernels.config import KVarNConfig

SOURCE = "decode_sm90.cu"
THREADS = 128
# records in flight per block: 2 hide the latency of memory (26 KB per multiprocessor), 1 is being read
STAGES = 3
# warps that share a tile: 2 need a quarter fewer instructions than 4 (H200, 64 x 16,384: 286 us against 334 us)
TILE_WARPS = 2
# resident blocks per multiprocessor by head_dim, the most that keep every value in registers
MIN_BLOCKS = {64: 4, 128: 3, 256: 2}


def is_supported(device: torch.device) -> bool:
    """Return whether decode_sm90.cu can serve a device: CUDA, capability 9.0 or newer, NVRTC reachable."""
    return nvrtc.capability(device) >= (9, 0)


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, split_pages: int
) -> dict[str, int]:
    """Return the constants of decode_sm90.cu for a format."""
    return nvrtc.format_constants(config, head_dim, num_kv_heads, is_bf16) | {
        "GROUP": group,
        "WINDOW": config.window_pages,
        "SPLIT_PAGES": split_pages,
        "STAGES": STAGES,
        "TILE_WARPS": TILE_WARPS,
        "MIN_BLOCKS": MIN_BLOCKS[head_dim],
    }


def shared_bytes(defines: dict[str, int]) -> int:
    """Return the dynamic shared memory of a block: the records in flight, at the end the sums of 4 warps x 8 heads."""
    return max(STAGES * defines["RECORD"], 4 * 8 * defines["D"] * 4)


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, split_pages: int, device: int
) -> tuple[Any, int]:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16, split_pages)
    kernel = nvrtc.compile_kernel(SOURCE, "kvarn_decode", defines, device)
    size = shared_bytes(defines)
    kernel.set_shared_memory_config(size)
    return kernel, size


def decode(
    cache: LayerCache,
    batch: DecodeBatch,
    config: KVarNConfig,
    num_qo_heads: int,
    num_kv_heads: int,
    sm_scale_log2: float,
    split_pages: int,
) -> None:
    """Run the contract of `decode.decode`; the first call for a format compiles (about a second).

    Args:
        sm_scale_log2: factor of the scores times log2(e).
        split_pages: pages of a split, 0 for an even share of the request.
    """
    workspace = batch.workspace
    assert workspace is not None
    batch_size, head_dim, group = batch.rows.shape[0], cache.ring_k.shape[3], num_qo_heads // num_kv_heads
    is_bf16 = cache.ring_k.dtype == torch.bfloat16
    kernel, shared = _compiled(
        config, head_dim, num_kv_heads, group, is_bf16, split_pages, cache.ring_k.device.index or 0
    )
    splits = workspace.num_splits[batch_size - 1]
    kernel(
        (splits, num_kv_heads * -(-group // 8), batch_size),
        (THREADS, 1, 1),
        [
            workspace.rotated_q,
            cache.records,
            cache.ring_k,
            cache.ring_v,
            batch.page_table,
            batch.rows,
            batch.seq_lens,
            batch.exact_starts,
            workspace.partial_out,
            workspace.partial_lse,
            batch.page_table.stride(0),
            # the launcher passes a Python float as a double
            struct.unpack("<i", struct.pack("<f", sm_scale_log2))[0],
            splits,
        ],
        shared_mem=shared,
    )
