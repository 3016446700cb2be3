# SPDX-License-Identifier: Apache-2.0
"""Attend what all new tokens of a request read as records, by CUDA C++ for capability 9.0 (extend_sm90.cu).

A part of an extend step of few tokens on a long prefix. The pages before the window of the first new token are read as
records by every token after it, so nothing is masked there, and a record is unpacked once for 128 rows, query heads for
tokens. The pages are cut into splits, so that a step fills the GPU. What else the tokens read, the window, the chunk and
pages that the chunk fills, is one more split: that of `extend.extend`, whose merge joins them all.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.device.wgmma import ARCHITECTURE, CAPABILITY, product_operands
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.attend import LOG2_E
from kvarn_kernels.record.cuda_constants import format_constants
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

SOURCE, KERNEL = Path(__file__).with_name("extend_sm90.cu"), "kvarn_extend"
# two warpgroups write operands, two attend 64 rows each
THREADS, ROWS = 512, 128
HEAD_DIMS = (64, 128)
# buffers of records of a block; of keys and values there are two
STAGES, BUFFERS = 3, 2
# bytes of shared memory of a block that the driver keeps, and of its tables
RESERVED_BYTES, TABLE_BYTES = 1024, 4 * ROWS + 256
# registers of a thread that writes, and of one that attends; together what 128 for each thread are
WRITER_REGISTERS, READER_REGISTERS = 64, 192
# In pages that a block attends, 2.2 us each: the time of a block besides, and that of a block of the encoder (H200);
# splits of a request at most
BLOCK_OVERHEAD, ENCODER_PAGES, MAX_SPLITS = 3, 16, 32


def serves(head_dim: int, gpu: Gpu) -> bool:
    """Return whether the kernel runs on a GPU."""
    return gpu.capability == CAPABILITY and head_dim in HEAD_DIMS


def record_pages(batch: ExtendBatch, config: KVarNConfig) -> int:
    """Return how many pages the longest request has for this kernel, at least.

    The host knows no exact starts; after a prefix hit there can be a window more.
    """
    return max(max(batch.prefix_lens_host) // TILE_SIZE - config.window_pages, 0)


def num_splits(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> int:
    """Return the splits of every request with which this kernel and the encoder beside it take the least time.

    A multiprocessor runs one block of either.
    """
    pages, processors = record_pages(batch, config), gpu.multiprocessors
    row_blocks = shape.num_kv_heads * sum(-(-new * shape.group // ROWS) for new in batch.new_tokens)
    lens = zip(batch.prefix_lens_host, batch.seq_lens_host, strict=True)
    encoder_blocks = 2 * shape.num_kv_heads * sum(seq // TILE_SIZE - prefix // TILE_SIZE for prefix, seq in lens)

    def time_of(splits: int) -> int:
        each, waves = -(-pages // splits) + BLOCK_OVERHEAD, -(-row_blocks * splits // processors)
        # multiprocessors that the last wave leaves to the encoder, and what they finish meanwhile
        free = waves * processors - row_blocks * splits
        left = encoder_blocks - free * (each // ENCODER_PAGES)
        if left <= free:
            rounds = -(-encoder_blocks // free) if free else 0
            return max(waves * each, (waves - 1) * each + rounds * ENCODER_PAGES)
        return waves * each + -(-left // processors) * ENCODER_PAGES

    return min(range(1, min(MAX_SPLITS, max(pages, 1)) + 1), key=time_of)


def partial_bytes(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> int:
    """Return the bytes of the results of all splits of a step and of the rest, in float32, with their lse."""
    results = batch.num_tokens * (1 + num_splits(batch, shape, config, gpu))
    return 4 * results * shape.num_qo_heads * (shape.head_dim + 1)


def constants(config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants of extend_sm90.cu; group: query heads of a KV head."""
    # the ring is read by others
    shared = format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages=1)
    return shared | {
        "GROUP": group,
        "WINDOW": config.window_pages,
        "BLOCK_ROWS": ROWS,
        # tokens of a tile, channels of a head
        "BLOCK_COLUMNS": head_dim,
        "STAGES": STAGES,
        "BUFFER": shared["RECORD"],
        # fp16: queries, keys and values
        "SHARED_BYTES": STAGES * shared["RECORD"] + 2 * head_dim * (ROWS + 2 * BUFFERS * head_dim),
        "WRITER_REGISTERS": WRITER_REGISTERS,
        "READER_REGISTERS": READER_REGISTERS,
        **product_operands(head_dim),
    }


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, group, is_bf16)
    return nvrtc.compile_kernel(SOURCE, KERNEL, defines, device, THREADS, defines["SHARED_BYTES"], ARCHITECTURE)


def attend_records(
    rotated_q: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sm_scale: float,
) -> None:
    """Attend the pages that the first new token of each request reads as records; the first call compiles (seconds).

    These are the pages before max(page - config.window_pages, exact_start / G) of that token, at most the page of the
    token itself. Their first tokens are exact, as everywhere.

    Args:
        rotated_q: float32 [T, Hq, D], rotated, contiguous.
        partial_out: float32 [T, S + 1, Hq, D]; partial_lse: float32 [T, S + 1, Hq], base 2; contiguous. The first S
            results of each token are written: the normalised output of each split, and its log sum of exp, zeros and
            -inf where a split has no page.
        cache: read; batch: the step; sm_scale: factor of the scores.
    """
    _, results, heads, head_dim = partial_out.shape
    kv_heads, device = cache.num_kv_heads, cache.records.device
    group, splits = heads // kv_heads, results - 1
    is_bf16 = cache.dtype == torch.bfloat16
    row_blocks = -(-max(batch.new_tokens) * group // ROWS)
    _compiled(config, head_dim, kv_heads, group, is_bf16, device.index or 0)(
        (row_blocks, splits * kv_heads, batch.prefix_lens.shape[0]),
        current_stream(device),
        rotated_q=rotated_q,
        records=cache.records,
        page_table=batch.page_table,
        prefix_lens=batch.prefix_lens,
        exact_starts=batch.exact_starts,
        qo_indptr=batch.qo_indptr,
        out=partial_out,
        lse=partial_lse,
        stride_page_table=batch.page_table.stride(0),
        sm_scale_log2_bits=sm_scale * LOG2_E,
        splits=splits,
    )
