# SPDX-License-Identifier: Apache-2.0
"""Host side of encode.cu: compile it for a format, launch it."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from kvarn_kernels import nvrtc, tile
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.launch import CudaLauncher, current_stream
from kvarn_kernels.reference.quantiser import FIRST_REACH, ROUNDS

SOURCE = "encode.cu"
KERNELS = ("kvarn_encode_ring", "kvarn_encode_chunk")
# head_dim -> tokens of a thread, and blocks on a multiprocessor that registers must allow. H100, 8 heads of 128, one
# page and 64 pages: 4 tokens and 1 block (little is spilled) 36 and 184 us, 4 and 2 41 and 198, 8 and 2 59 and 215
PATCH_TOKENS = {64: 4, 128: 4, 256: 8}
MIN_BLOCKS = {64: 2, 128: 1, 256: 1}


def is_supported(cache: LayerCache) -> bool:
    """Return whether encode.cu can serve a cache."""
    return serves(cache.ring_k.device, cache.ring_k.dtype)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether encode.cu can serve a model: CUDA, capability 8.0 or newer, 16-bit floats."""
    return dtype != torch.float32 and nvrtc.capability(device) >= (8, 0)


def constants(config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants of encode.cu for a format; those of the quantiser come from the oracle."""
    k_bits, v_bits = config.k_bits, config.v_bits
    return nvrtc.format_constants(config, head_dim, num_kv_heads, is_bf16) | {
        "RING_LEN": config.ring_len,
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
    kernel: str, config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, device: int
) -> CudaLauncher:
    defines = constants(config, head_dim, num_kv_heads, is_bf16) | selection(kernel)
    return nvrtc.compile_kernel(SOURCE, kernel, defines, device, threads(head_dim))


def _kernel(name: str, cache: LayerCache, config: KVarNConfig) -> CudaLauncher:
    kv_heads, head_dim = cache.ring_k.shape[2:]
    is_bf16 = cache.ring_k.dtype == torch.bfloat16
    return _compiled(name, config, head_dim, kv_heads, is_bf16, cache.ring_k.device.index or 0)


def encode_from_ring(
    cache: LayerCache,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
    store_pages: torch.Tensor,
    slices: int,
    config: KVarNConfig,
) -> None:
    """Run the contract of `encode.encode_from_ring`; the requests are shared by `slices` blocks per side."""
    _kernel("kvarn_encode_ring", cache, config)(
        (2 * cache.ring_k.shape[2], slices, 1),
        current_stream(cache.records.device),
        cache.records,
        cache.ring_k,
        cache.ring_v,
        rows,
        seq_lens,
        store_pages,
        rows.shape[0],
    )


def encode_from_chunk(
    k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: ExtendBatch, config: KVarNConfig
) -> None:
    """Run the contract of `encode.encode_from_chunk`."""
    _kernel("kvarn_encode_chunk", cache, config)(
        (2 * cache.ring_k.shape[2], batch.max_full_pages, batch.rows.shape[0]),
        current_stream(cache.records.device),
        cache.records,
        cache.ring_k,
        cache.ring_v,
        k,
        v,
        batch.rows,
        batch.prefix_lens,
        batch.seq_lens,
        batch.qo_indptr,
        batch.page_table,
        batch.page_table.stride(0),
    )
