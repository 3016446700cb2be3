# SPDX-License-Identifier: Apache-2.0
"""Write records out in the model's frame by CUDA C++ (dequantise.cu): what dequantise.py does with pages that are
records, at the speed of memory."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record import tile
from kvarn_kernels.record.cuda_constants import format_constants

SOURCE = Path(__file__).with_name("dequantise.cu")
THREADS = tile.TILE_SIZE // 16 * 32
# blocks that the registers of a multiprocessor must allow, by head_dim
MIN_BLOCKS = {64: 4, 128: 2, 256: 1}


def constants(config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants of dequantise.cu for a format."""
    # rings are not read
    return format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages=1) | {
        "SQUARE_ROOT_OF_1_D": f"{head_dim**-0.5!r}f",
        "MIN_BLOCKS": MIN_BLOCKS[head_dim],
    }


@lru_cache(maxsize=32)
def _compiled(config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, device: int) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, is_bf16)
    return nvrtc.compile_kernel(SOURCE, "kvarn_dequantise", defines, device, THREADS)


def dequantise_records(
    out: tuple[torch.Tensor, torch.Tensor],
    requests: torch.Tensor,
    pages: torch.Tensor,
    first: int,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
) -> None:
    """Write the listed pages from their records: entry i >= first of the list to page i of the output.

    Args:
        out: keys and values, each [at least M, Hk, G, D] model dtype, contiguous, written.
        requests, pages: int32 [M], as in `dequantise.PageList`.
        cache: read; batch: the step.
    """
    if first == len(pages):
        return
    is_bf16, device = cache.dtype == torch.bfloat16, cache.records.device
    kernel = _compiled(config, cache.head_dim, cache.num_kv_heads, is_bf16, device.index or 0)
    kernel(
        (len(pages) - first, cache.num_kv_heads, 2),
        current_stream(device),
        workspace_k=out[0],
        workspace_v=out[1],
        records=cache.records,
        requests=requests,
        pages=pages,
        page_table=batch.page_table,
        stride_page_table=batch.page_table.stride(0),
        first_slot=first,
    )
