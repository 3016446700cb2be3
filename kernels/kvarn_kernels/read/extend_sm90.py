# SPDX-License-Identifier: Apache-2.0
"""Extend attention of few new tokens by CUDA C++ for capability 9.0 (extend_sm90.cu).

A record is unpacked once for 128 rows, query heads for tokens, into shared memory, where products of a warpgroup take
it; what is read exactly is written there, too. The pages are cut into splits, so that a step fills the GPU. What a step
encodes it must not read, so that the encoder runs beside this kernel (`serves_step`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.device.wgmma import ARCHITECTURE, CAPABILITY
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.attend import LOG2_E
from kvarn_kernels.read.attend_rows import HEAD_DIMS, Warps, row_constants
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

SOURCE, KERNEL = Path(__file__).with_name("extend_sm90.cu"), "kvarn_extend"
WARPS = Warps(rows=128, writer_registers=96, reader_registers=160)
ROWS = WARPS.rows
# In records that a block attends, 2.2 us each on an H200: the time of an exact page, that of a block besides its pages,
# and that of a block of the encoder; the least that a split has, and splits of a request at most
EXACT_UNITS, BLOCK_OVERHEAD, ENCODER_PAGES, MIN_UNITS, MAX_SPLITS = 3, 3, 16, 3, 32


@dataclass(frozen=True)
class ShortPlan:
    """Hold what all layers of a step share.

    Attributes:
        splits: into how many parts the pages of a request are cut.
    """

    splits: int


def serves(head_dim: int, gpu: Gpu) -> bool:
    """Return whether the kernel runs on a GPU."""
    return gpu.capability == CAPABILITY and head_dim in HEAD_DIMS


def serves_step(batch: ExtendBatch, config: KVarNConfig) -> bool:
    """Return whether no token of a step reads as a record what the step encodes."""
    lens = zip(batch.prefix_lens_host, batch.seq_lens_host, strict=True)
    return all((seq - 1) // TILE_SIZE - config.window_pages <= prefix // TILE_SIZE for prefix, seq in lens)


def row_blocks(new_tokens: int, group: int) -> int:
    """Return the blocks of a KV head that attend so many tokens of a request, each all of its pages."""
    return -(-new_tokens * group // ROWS)


def num_splits(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> int:
    """Return the splits of every request with which this kernel and the encoder beside it take the least time."""
    # of the longest request, whose exact pages are its window and those of the new tokens
    records = max(max(batch.prefix_lens_host) // TILE_SIZE - config.window_pages, 0)
    pages = records + EXACT_UNITS * (-(-max(batch.seq_lens_host) // TILE_SIZE) - records)
    blocks = shape.num_kv_heads * sum(row_blocks(new, shape.group) for new in batch.new_tokens)
    return _fastest_splits(pages, blocks, 2 * shape.num_kv_heads * sum(batch.full_pages), gpu.multiprocessors)


# a step asks twice, when it is given to this kernel and when it is planned, and turns are alike
@lru_cache(maxsize=1024)
def _fastest_splits(pages: int, blocks: int, encoder_blocks: int, processors: int) -> int:
    """Return the splits of the least time, where a multiprocessor runs one block of either kernel.

    Args:
        pages: of a request, in records; blocks: that attend them, of all requests; encoder_blocks: each ENCODER_PAGES.
    """

    def time_of(splits: int) -> int:
        each, waves = -(-pages // splits) + BLOCK_OVERHEAD, -(-blocks * splits // processors)
        # multiprocessors that the last wave leaves to the encoder, and what they finish meanwhile
        free = waves * processors - blocks * splits
        left = encoder_blocks - free * (each // ENCODER_PAGES)
        if left <= free:
            rounds = -(-encoder_blocks // free) if free else 0
            return max(waves * each, (waves - 1) * each + rounds * ENCODER_PAGES)
        return waves * each + -(-left // processors) * ENCODER_PAGES

    return min(range(1, min(MAX_SPLITS, max(pages // MIN_UNITS, 1)) + 1), key=time_of)


def partial_bytes(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> int:
    """Return the bytes of the results of all splits of a step, in float32, with their lse."""
    results = batch.num_tokens * num_splits(batch, shape, config, gpu)
    return 4 * results * shape.num_qo_heads * (shape.head_dim + 1)


def plan_short(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> ShortPlan:
    """Plan a step that `serves_step`, once for all layers."""
    return ShortPlan(num_splits(batch, shape, config, gpu))


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants of extend_sm90.cu; group: query heads of a KV head."""
    form = row_constants(WARPS, config, head_dim, num_kv_heads, group, is_bf16, ring_pages)
    return form | {"EXACT_UNITS": EXACT_UNITS}


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, ring_pages: int, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16, ring_pages)
    return nvrtc.compile_kernel(SOURCE, KERNEL, defines, device, WARPS.threads, defines["SHARED_BYTES"], ARCHITECTURE)


def attend(
    rotated: QKV, cache: LayerCache, batch: ExtendBatch, plan: ShortPlan, config: KVarNConfig, sm_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend the new tokens of each request by the position rule; the first call compiles (seconds).

    Reads records, the ring as it was before this chunk, and the chunk. It may start before what was queued last on the
    stream, which rotates the chunk and writes nothing else, has ended; what is queued next may start when that has
    (device/early_start.cuh).

    Args:
        rotated: q float32 [T, Hq, D]; k, v [T, Hk, D] model dtype; rotated, contiguous.
        cache: read; batch: the step; plan: of the step; sm_scale: factor of the scores.

    Returns:
        the normalised outputs of all splits, float32 [T, splits, Hq, D], rotated, and their log sums of exp, float32
        [T, splits, Hq], base 2; zeros and -inf where a split has nothing that a token sees.
    """
    heads, head_dim = rotated.q.shape[1:]
    kv_heads, device = cache.num_kv_heads, cache.records.device
    group, is_bf16 = heads // kv_heads, cache.dtype == torch.bfloat16
    size = (batch.num_tokens, plan.splits, heads)
    partial_out = torch.empty(*size, head_dim, dtype=torch.float32, device=device)
    partial_lse = torch.empty(size, dtype=torch.float32, device=device)
    ring_pages = batch.ring_pages.shape[1]
    _compiled(config, head_dim, kv_heads, group, is_bf16, ring_pages, device.index or 0)(
        (row_blocks(max(batch.new_tokens), group), plan.splits * kv_heads, batch.prefix_lens.shape[0]),
        current_stream(device),
        early_start=True,
        rotated_q=rotated.q,
        chunk_k=rotated.k,
        chunk_v=rotated.v,
        records=cache.records,
        ring_pages=batch.ring_pages,
        page_table=batch.page_table,
        prefix_lens=batch.prefix_lens,
        exact_starts=batch.exact_starts,
        qo_indptr=batch.qo_indptr,
        out=partial_out,
        lse=partial_lse,
        stride_page_table=batch.page_table.stride(0),
        sm_scale_log2_bits=sm_scale * LOG2_E,
        splits=plan.splits,
    )
    return partial_out, partial_lse
