# SPDX-License-Identifier: Apache-2.0
"""Encode full pages into records by CUDA C++ (encode.cu): the contract and the bytes of encode.py."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record import tile
from kvarn_kernels.record.cuda_constants import format_constants
from kvarn_kernels.record.format import FIRST_REACH, LARGEST_INPUT, ROUNDS
from kvarn_kernels.write.encode import ring_slices

SOURCE = Path(__file__).with_name("encode.cu")
KERNELS = ("kvarn_encode_ring", "kvarn_encode_chunk")
# tokens of a thread, and blocks that the registers of a multiprocessor must allow, by head_dim. H100, 8 heads of 128,
# one page and 64 pages: 4 tokens and 1 block (few spills) took 36 and 184 us, 4 and 2 took 41 and 198, 8 and 2 took 59
# and 215
PATCH_TOKENS = {64: 4, 128: 4, 256: 8}
MIN_BLOCKS = {64: 2, 128: 1, 256: 1}


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants of encode.cu for a format and rings."""
    k_bits, v_bits = bits = config.k_bits, config.v_bits
    return format_constants(bits, head_dim, num_kv_heads, is_bf16, ring_pages) | {
        "LARGEST": f"{LARGEST_INPUT}f",
        "K_ROUNDS": ROUNDS[k_bits],
        "V_ROUNDS": ROUNDS[v_bits],
        "K_REACH": f"{0.5 * FIRST_REACH[k_bits]}f",
        "V_REACH": f"{0.5 * FIRST_REACH[v_bits]}f",
        "HEADER": int(tile.header(is_bf16)),
        "TB": PATCH_TOKENS[head_dim],
        "MIN_BLOCKS": MIN_BLOCKS[head_dim],
    }


def selection(*kernels: str) -> dict[str, Any]:
    """Return the constants that keep only some kernels of encode.cu; each takes seconds to compile."""
    return {name.removeprefix("kvarn_").upper(): int(name in kernels) for name in KERNELS}


def threads(head_dim: int) -> int:
    """Return the threads of a block, each with 8 channels of PATCH_TOKENS tokens of a side."""
    return head_dim // 8 * (tile.TILE_SIZE // PATCH_TOKENS[head_dim])


@lru_cache(maxsize=32)
def _compiled(
    kernel: str, config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, is_bf16, ring_pages) | selection(kernel)
    return nvrtc.compile_kernel(SOURCE, kernel, defines, device, threads(head_dim))


def _kernel(name: str, cache: LayerCache, config: KVarNConfig, ring_pages: int) -> CudaLauncher:
    is_bf16, device = cache.dtype == torch.bfloat16, cache.records.device.index or 0
    return _compiled(name, config, cache.head_dim, cache.num_kv_heads, is_bf16, ring_pages, device)


def encode_from_ring(cache: LayerCache, batch: DecodeBatch, config: KVarNConfig) -> None:
    """Run the contract of `encode.encode_from_ring`."""
    _kernel("kvarn_encode_ring", cache, config, batch.ring_pages.shape[1])(
        (2 * cache.num_kv_heads, ring_slices(cache.num_kv_heads), 1),
        current_stream(cache.records.device),
        records=cache.records,
        ring_pages=batch.ring_pages,
        seq_lens=batch.seq_lens,
        store_pages=batch.store_pages,
        batch_size=batch.num_tokens,
    )


def encode_from_chunk(
    rotated: QKV, cache: LayerCache, batch: ExtendBatch, config: KVarNConfig, *, early_start: bool = False
) -> None:
    """Run the contract of `encode.encode_from_chunk`.

    Args:
        early_start: run beside `extend_sm90.attend`, which is what was queued last on the stream.
    """
    if batch.max_full_pages == 0:
        return
    _kernel("kvarn_encode_chunk", cache, config, batch.ring_pages.shape[1])(
        (2 * cache.num_kv_heads, batch.max_full_pages, batch.ring_pages.shape[0]),
        current_stream(cache.records.device),
        early_start=early_start,
        records=cache.records,
        ring_pages=batch.ring_pages,
        chunk_k=rotated.k,
        chunk_v=rotated.v,
        prefix_lens=batch.prefix_lens,
        seq_lens=batch.seq_lens,
        qo_indptr=batch.qo_indptr,
        page_table=batch.page_table,
        stride_page_table=batch.page_table.stride(0),
    )
