# SPDX-License-Identifier: Apache-2.0
"""Decode attention by CUDA C++ for Hopper and newer (decode_sm90.cu): the contract of decode.py."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.attend import LOG2_E
from kvarn_kernels.read.decode_plan import RING_CHUNK, RING_UNITS, TILE_COLUMNS, DecodeWorkspace, split_units
from kvarn_kernels.record.cuda_constants import format_constants

SOURCE, KERNEL = Path(__file__).with_name("decode_sm90.cu"), "kvarn_decode"
THREADS = 128
# what resident blocks share, and what each of them needs besides its records
SHARED_OF_MULTIPROCESSOR, SHARED_BESIDES = 228 << 10, 1536
# resident blocks per multiprocessor by head_dim and tiles of 8 columns, the most that keep every value in registers
MIN_BLOCKS = {(64, 1): 4, (128, 1): 3, (256, 1): 2, (64, 2): 3, (128, 2): 2}


def runs_on(gpu: Gpu) -> bool:
    """Return whether a GPU can run decode_sm90.cu: capability 9.0 or newer, and shared memory enough.

    Its buffers are sized for the 228 KiB of a multiprocessor of capability 9.0 or 10.0. GPUs of capability 12.0 have
    100 KiB, where a block of head_dim 256 would not start; the Triton kernel runs there.
    """
    return gpu.capability >= (9, 0) and gpu.shared_of_multiprocessor >= SHARED_OF_MULTIPROCESSOR


def column_tiles(head_dim: int, group: int, drafts: int) -> int:
    """Return the tiles of 8 columns that a block serves: two where there are more columns and registers for them."""
    return 2 if drafts * group > TILE_COLUMNS and (head_dim, 2) in MIN_BLOCKS else 1


def columns(head_dim: int, group: int, drafts: int) -> int:
    """Return the columns of a block, query heads of a KV head for each draft."""
    return TILE_COLUMNS * column_tiles(head_dim, group, drafts)


def resident_programs(head_dim: int, columns: int, gpu: Gpu) -> int:
    """Return the blocks of the kernel that a GPU runs at once; columns: of a block."""
    return gpu.multiprocessors * MIN_BLOCKS[head_dim, columns // TILE_COLUMNS]


def teams(record_bytes: int, head_dim: int, tiles: int) -> tuple[int, int]:
    """Return (warps that share a tile, buffers for each team of them).

    Two warps need a quarter fewer instructions for a tile than four (H200, 64 x 16,384: 286 us against 334 us); then
    four records are in flight or being read, which the largest format has no memory for.
    """
    left = SHARED_OF_MULTIPROCESSOR // MIN_BLOCKS[head_dim, tiles] - SHARED_BESIDES - _query_bytes(head_dim, tiles)
    return (2, 2) if 4 * record_bytes <= left else (4, 3)


def step_constants(
    config: KVarNConfig,
    head_dim: int,
    num_kv_heads: int,
    group: int,
    is_bf16: bool,
    ring_pages: int,
    drafts: int,
    sliding_window: int = 0,
) -> dict[str, Any]:
    """Return the constants of a decode kernel that its columns and buffers do not change.

    Args:
        group: query heads of a KV head; drafts: rows of a request that a split serves together.
        sliding_window: tokens that a query reads, 0 for all.
    """
    return format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages) | {
        "GROUP": group,
        "DRAFTS": drafts,
        "WINDOW": config.window_pages,
        "SLIDING": sliding_window,
        "RING_CHUNK": RING_CHUNK.value,
        "RING_UNITS": RING_UNITS.value,
        "SPLIT_UNITS": split_units(config),
    }


def constants(
    config: KVarNConfig,
    head_dim: int,
    num_kv_heads: int,
    group: int,
    is_bf16: bool,
    ring_pages: int,
    drafts: int = 1,
    sliding_window: int = 0,
) -> dict[str, Any]:
    """Return the constants of decode_sm90.cu for a format and rings; arguments as for `step_constants`."""
    tiles = column_tiles(head_dim, group, drafts)
    tile_warps, stages = teams(config.record_bytes(head_dim), head_dim, tiles)
    shared = step_constants(config, head_dim, num_kv_heads, group, is_bf16, ring_pages, drafts, sliding_window)
    return shared | {
        "COLUMN_TILES": tiles,
        "BUFFER": shared["RECORD"],
        "STAGES": stages,
        "TILE_WARPS": tile_warps,
        "MIN_BLOCKS": MIN_BLOCKS[head_dim, tiles],
    }


def _query_bytes(head_dim: int, tiles: int) -> int:
    # the fp16 queries of several tiles, which one tile keeps in registers
    return 0 if tiles == 1 else 2 * TILE_COLUMNS * tiles * head_dim


def shared_bytes(defines: dict[str, Any]) -> int:
    """Return the dynamic shared memory of a block: buffers of its 4 warps and its queries, at the end their sums."""
    head_dim, tiles = defines["D"], defines["COLUMN_TILES"]
    buffers = 4 // defines["TILE_WARPS"] * defines["STAGES"]
    return max(buffers * defines["RECORD"] + _query_bytes(head_dim, tiles), 4 * TILE_COLUMNS * tiles * head_dim * 4)


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig,
    head_dim: int,
    num_kv_heads: int,
    group: int,
    is_bf16: bool,
    ring_pages: int,
    drafts: int,
    sliding_window: int,
    device: int,
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16, ring_pages, drafts, sliding_window)
    return nvrtc.compile_kernel(SOURCE, KERNEL, defines, device, THREADS, shared_bytes(defines))


def form_of(cache: LayerCache, batch: DecodeBatch, workspace: DecodeWorkspace, config: KVarNConfig) -> tuple:
    """Return what a kernel is compiled for, but for sliding windows, and the device."""
    group, is_bf16 = workspace.rotated_q.shape[1] // cache.num_kv_heads, cache.dtype == torch.bfloat16
    ring_pages, device = batch.ring_pages.shape[1], cache.records.device.index or 0
    return config, cache.head_dim, cache.num_kv_heads, group, is_bf16, ring_pages, workspace.drafts, device


def launch(
    kernel: Any, columns: int, cache: LayerCache, batch: DecodeBatch, workspace: DecodeWorkspace, sm_scale: float
) -> None:
    """Launch a decode kernel whose blocks serve so many columns."""
    batch_size = batch.num_tokens // workspace.drafts
    group = workspace.rotated_q.shape[1] // cache.num_kv_heads
    column_blocks = -(-workspace.drafts * group // columns)
    kernel(
        (workspace.max_splits[batch_size - 1], cache.num_kv_heads * column_blocks, 1),
        current_stream(cache.records.device),
        rotated_q=workspace.rotated_q,
        records=cache.records,
        ring_pages=batch.ring_pages,
        page_table=batch.page_table,
        seq_lens=batch.seq_lens,
        exact_starts=batch.exact_starts,
        requests=workspace.split_requests,
        indptr=workspace.split_indptr,
        out=workspace.partial_out,
        lse=workspace.partial_lse,
        stride_page_table=batch.page_table.stride(0),
        sm_scale_log2_bits=sm_scale * LOG2_E,
        batch_size=batch_size,
    )


def launch_columns(
    compiled: Callable[..., CudaLauncher],
    columns: Callable[[int, int, int], int],
    cache: LayerCache,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    config: KVarNConfig,
    sm_scale: float,
) -> None:
    """Launch the kernel of a module that knows no sliding windows.

    Args:
        compiled: of `form_of`; columns: of a block, from head_dim, query heads of a KV head and drafts.
    """
    assert workspace.sliding_window == 0, "a sliding window is attended by decode_sm90"
    form = form_of(cache, batch, workspace, config)
    _, head_dim, _, group, *_ = form
    launch(compiled(*form), columns(head_dim, group, workspace.drafts), cache, batch, workspace, sm_scale)


def decode(
    cache: LayerCache, batch: DecodeBatch, workspace: DecodeWorkspace, config: KVarNConfig, sm_scale: float
) -> None:
    """Run the contract of `decode.decode`; the first call for a format compiles (about a second)."""
    *form, device = form_of(cache, batch, workspace, config)
    _, head_dim, _, group, *_ = form
    kernel = _compiled(*form, workspace.sliding_window, device)
    launch(kernel, columns(head_dim, group, workspace.drafts), cache, batch, workspace, sm_scale)
