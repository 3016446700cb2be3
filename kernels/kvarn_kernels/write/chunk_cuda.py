# SPDX-License-Identifier: Apache-2.0
"""Rotate and store the new tokens of an extend step by CUDA C++ (rotate.cu, store.cu): the contracts of rotate.py and
store.py, for less of the host's time than launches of Triton take."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.cuda_constants import format_constants, rotation_constants
from kvarn_kernels.write.rotate import chunk_like

ROTATE, STORE = (Path(__file__).with_name(name) for name in ("rotate.cu", "store.cu"))
# of a block, each with a row at a time
WARPS = 8


def rotate_constants(head_dim: int, num_qo_heads: int, num_kv_heads: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants of rotate.cu."""
    return rotation_constants(head_dim, is_bf16) | {"HQ": num_qo_heads, "HK": num_kv_heads, "WARPS": WARPS}


def store_constants(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants of store.cu for a format and rings."""
    bits = (config.k_bits, config.v_bits)
    return format_constants(bits, head_dim, num_kv_heads, is_bf16, ring_pages) | {"WARPS": WARPS}


@lru_cache(maxsize=32)
def _rotate(head_dim: int, num_qo_heads: int, num_kv_heads: int, is_bf16: bool, device: int) -> CudaLauncher:
    defines = rotate_constants(head_dim, num_qo_heads, num_kv_heads, is_bf16)
    return nvrtc.compile_kernel(ROTATE, "kvarn_rotate_chunk", defines, device, 32 * WARPS)


@lru_cache(maxsize=32)
def _store(
    config: KVarNConfig, head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int, device: int
) -> CudaLauncher:
    defines = store_constants(config, head_dim, num_kv_heads, is_bf16, ring_pages)
    return nvrtc.compile_kernel(STORE, "kvarn_store_chunk", defines, device, 32 * WARPS)


def rotate_chunk(new: QKV, *, with_q: bool = True, out: QKV | None = None) -> QKV:
    """Run the contract of `rotate.rotate_chunk`; rows begin at multiples of 4 bytes."""
    q, k, v = new
    (tokens, num_kv_heads, head_dim), num_qo_heads, device = k.shape, q.shape[1], k.device
    rotated = chunk_like(new, with_q) if out is None else out
    if tokens == 0:
        return rotated
    rows = tokens * (max(num_qo_heads, num_kv_heads) if with_q else num_kv_heads)
    _rotate(head_dim, num_qo_heads, num_kv_heads, k.dtype == torch.bfloat16, device.index or 0)(
        (-(-rows // WARPS), 3 if with_q else 2, 1),
        current_stream(device),
        k=k,
        v=v,
        q=q,
        k_out=rotated.k,
        v_out=rotated.v,
        q_out=rotated.q,
        num_tokens=tokens,
        stride_k_token=k.stride(0),
        stride_k_head=k.stride(1),
        stride_v_token=v.stride(0),
        stride_v_head=v.stride(1),
        stride_q_token=q.stride(0),
        stride_q_head=q.stride(1),
    )
    return rotated


def store_chunk(rotated: QKV, cache: LayerCache, batch: ExtendBatch, config: KVarNConfig) -> None:
    """Run the contract of `store.store_chunk`."""
    ring_pages, device = batch.ring_pages.shape[1], cache.records.device
    newest = batch.stored_tokens(config.exact_tokens(cache.head_dim, cache.dtype.itemsize))
    if newest == 0:
        return
    is_bf16 = cache.dtype == torch.bfloat16
    _store(config, cache.head_dim, cache.num_kv_heads, is_bf16, ring_pages, device.index or 0)(
        (batch.ring_pages.shape[0], -(-newest // WARPS), cache.num_kv_heads),
        current_stream(device),
        k=rotated.k,
        v=rotated.v,
        records=cache.records,
        ring_pages=batch.ring_pages,
        prefix_lens=batch.prefix_lens,
        seq_lens=batch.seq_lens,
        qo_indptr=batch.qo_indptr,
    )
