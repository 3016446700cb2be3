# SPDX-License-Identifier: Apache-2.0
"""Write pages out in the model's frame by CUDA C++ (dequantise.cu): the contract of dequantise.py, near the speed of
memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense.dequantise import PageList
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record import tile
from kvarn_kernels.record.cuda_constants import format_constants

SOURCE = Path(__file__).with_name("dequantise.cu")
# warps of a block, 16 tokens each, and blocks that the registers of a multiprocessor must allow, by head_dim: the most
# without spills. H200, 255 pages of 8 heads of 128, 163 MB: 51 us; 57 with 8 warps and 3 blocks, which spill. Of 4
# heads of 256 55 us, 69 with 8 and 2; of 8 heads of 64 29 us, 32 with 8 and 4. torch zeroes 141 MB in 45 us
WARPS = {64: 4, 128: 2, 256: 2}
MIN_BLOCKS = {64: 8, 128: 10, 256: 5}


def constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants of dequantise.cu for a format and rings."""
    return format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages) | {
        "WARPS": WARPS[head_dim],
        "MIN_BLOCKS": MIN_BLOCKS[head_dim],
    }


def threads(head_dim: int) -> int:
    """Return the threads of a block."""
    return 32 * WARPS[head_dim]


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, is_bf16, ring_pages)
    return nvrtc.compile_kernel(SOURCE, "kvarn_dequantise", defines, device, threads(head_dim))


def dequantise(
    out: tuple[torch.Tensor, torch.Tensor],
    new: QKV,
    pages: PageList,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    *,
    early_start: bool = False,
) -> None:
    """Run the contract of `dequantise.dequantise`; rows of new keys and values begin at multiples of 4 bytes.

    Args:
        early_start: run beside the encoder of the step, which is what was queued last on the stream. With few new
            tokens it leaves most of the GPU idle, and only pages that it fills wait for it. From capability 9.0 on.
    """
    is_bf16, device, ring_pages = cache.dtype == torch.bfloat16, cache.records.device, batch.ring_pages.shape[1]
    kernel = _compiled(config, cache.head_dim, cache.num_kv_heads, is_bf16, ring_pages, device.index or 0)
    parts = tile.TILE_SIZE // (16 * WARPS[cache.head_dim])
    kernel(
        (len(pages.pages) * parts, cache.num_kv_heads, 2),
        current_stream(device),
        early_start=early_start,
        workspace_k=out[0],
        workspace_v=out[1],
        k=new.k,
        v=new.v,
        records=cache.records,
        ring_pages=batch.ring_pages,
        requests=pages.requests,
        pages=pages.pages,
        page_table=batch.page_table,
        prefix_lens=batch.prefix_lens,
        seq_lens=batch.seq_lens,
        qo_indptr=batch.qo_indptr,
        exact_starts=batch.exact_starts,
        stride_k_token=new.k.stride(0),
        stride_k_head=new.k.stride(1),
        stride_v_token=new.v.stride(0),
        stride_v_head=new.v.stride(1),
        stride_page_table=batch.page_table.stride(0),
        num_exact=pages.num_exact,
    )
