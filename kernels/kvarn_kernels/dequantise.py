# SPDX-License-Identifier: Apache-2.0
"""Fill the prefill workspace: pages of keys and values in the model's frame and dtype.

Exact pages come from the chunk itself and, before it, from the ring, all others from their records.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels import tile
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.launch import TritonLauncher
from kvarn_kernels.reference import first_row_dtype
from kvarn_kernels.rotate import hadamard_signs
from kvarn_kernels.tile_io import cast, dot, load_keys, load_values

# head_dim -> tokens and channels of a program, warps. H100, 273 pages of 8 heads of 128: 188 us, 195 with (64, 128, 4),
# 225 with (64, 128, 8), 262 with (128, 128, 8), of which only one program fits a multiprocessor
BLOCKS = {64: (64, 64, 4), 128: (64, 64, 4), 256: (64, 128, 8)}


@triton.jit
def _put_first(y, first_ptr, signs, D: tl.constexpr):
    """Return y [TOKENS, COLS] with the exact row of token 0 times signs [D, COLS] as its first row.

    The row has the model's dtype, so its products with the signs are exact; their sum is float32.
    """
    row = tl.load(first_ptr + tl.arange(0, D)).to(tl.float32)
    exact = tl.sum(row[:, None] * signs.to(tl.float32), 0)
    return tl.where((tl.arange(0, y.shape[0]) == 0)[:, None], exact[None, :], y)


@triton.jit
def _unrotate_keys(
    record, signs, first, TOKENS: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):
    """Return the keys of the tokens first .. of a record times signs [D, COLS]: float32 [TOKENS, COLS]."""
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    x = load_keys(record, first, TOKENS, D, K_BITS, V_BITS)
    token_scale = tl.load(halves + tile.k_token_scale_index(D) + first + tl.arange(0, TOKENS)).to(tl.float32)
    return dot(x, signs, tl.zeros([TOKENS, signs.shape[1]], tl.float32)) * token_scale[:, None]


@triton.jit
def _unrotate_values(
    record, signs, first, TOKENS: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):
    """Return the values of the tokens first .. of a record times signs; as `_unrotate_keys`."""
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    x = load_values(record, first, TOKENS, D, K_BITS, V_BITS)
    # the channel scale belongs to the rotated frame; times +-1 it is an exact fp16 operand, and nothing overflows
    channel_scale = tl.load(halves + tile.v_channel_scale_index(D) + tl.arange(0, D))
    return dot(x, signs * channel_scale[:, None], tl.zeros([TOKENS, signs.shape[1]], tl.float32))


@triton.jit
def _finish(y, D: tl.constexpr, DTYPE: tl.constexpr):
    """Return y / sqrt(D), within the range of fp16 if that is the model's dtype."""
    y = y * (1.0 / D**0.5)
    if tl.float16 == DTYPE:
        # quantisation may carry an element of the largest keys beyond it
        y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)
    return y


@triton.jit(do_not_specialize=["stride_page_table", "num_exact"])
def _dequantise_kernel(
    workspace_k_ptr,  # [M, Hk, G, D] model dtype, not rotated, written
    workspace_v_ptr,
    k_ptr,  # [T, Hk, D] model dtype, not rotated
    v_ptr,
    records_ptr,  # [P, Hk, RECORD] uint8
    firsts_ptr,  # the same memory in the dtype of the first rows
    ring_k_ptr,  # [R, RING_LEN, Hk, D] model dtype, rotated
    ring_v_ptr,
    signs_ptr,  # [D, D] float16, +-1
    model_signs_ptr,  # [D, D] model dtype, +-1
    requests_ptr,  # [M] int32
    pages_ptr,  # [M] int32
    page_table_ptr,  # [B, P_max] int32
    rows_ptr,  # [B] int64
    prefix_lens_ptr,  # [B] int32
    seq_lens_ptr,  # [B] int32
    qo_indptr_ptr,  # [B + 1] int32
    exact_starts_ptr,  # [B] int32
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    stride_page_table,
    num_exact,
    HK: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RING_LEN: tl.constexpr,
    BLOCK: tl.constexpr,  # tokens of a program, a divisor of G
    COLS: tl.constexpr,  # channels of a program, a divisor of D
):
    slot, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    is_value, part = tl.program_id(2) % 2 == 1, tl.program_id(2) // 2
    first = part // (D // COLS) * BLOCK
    t, d, c = tl.arange(0, BLOCK), tl.arange(0, D), part % (D // COLS) * COLS + tl.arange(0, COLS)
    signs_at = d[:, None] * D + c[None, :]  # [D, COLS]
    DTYPE: tl.constexpr = workspace_k_ptr.dtype.element_ty
    b = tl.load(requests_ptr + slot).to(tl.int64)
    page = tl.load(pages_ptr + slot)
    # a page that the request took from the prefix cache was never in its ring
    if (slot < num_exact) & (page * G >= tl.load(exact_starts_ptr + b)):
        prefix_len = tl.load(prefix_lens_ptr + b)
        position = page * G + first + t
        token = tl.load(qo_indptr_ptr + b).to(tl.int64) + position - prefix_len
        is_new = ((position >= prefix_len) & (position < tl.load(seq_lens_ptr + b)))[:, None]
        if is_value:
            source = v_ptr + token[:, None] * stride_v_token + head * stride_v_head + c[None, :]
        else:
            source = k_ptr + token[:, None] * stride_k_token + head * stride_k_head + c[None, :]
        y = tl.load(source, mask=is_new, other=0.0).to(tl.float32)
        if page * G + first < prefix_len:
            is_old = (position < prefix_len)[:, None]
            at = ((tl.load(rows_ptr + b) * RING_LEN + position % RING_LEN) * HK + head)[:, None] * D + d[None, :]
            if is_value:
                x = tl.load(ring_v_ptr + at, mask=is_old, other=0.0)
            else:
                x = tl.load(ring_k_ptr + at, mask=is_old, other=0.0)
            old = dot(x, tl.load(model_signs_ptr + signs_at), tl.zeros([BLOCK, COLS], tl.float32))
            y = tl.where(is_old, _finish(old, D, DTYPE), y)
    else:
        page_id = tl.load(page_table_ptr + b * stride_page_table + page).to(tl.int64)
        RECORD: tl.constexpr = tile.record_bytes(D, K_BITS, V_BITS)
        record = records_ptr + (page_id * HK + head) * RECORD
        first_ptr = firsts_ptr + (page_id * HK + head) * (RECORD // 2) + tile.scales_offset(D, K_BITS, V_BITS) // 2
        signs = tl.load(signs_ptr + signs_at)
        if is_value:
            y = _unrotate_values(record, signs, first, BLOCK, D, K_BITS, V_BITS)
            first_ptr += tile.v_first_index(D)
        else:
            y = _unrotate_keys(record, signs, first, BLOCK, D, K_BITS, V_BITS)
            first_ptr += tile.k_first_index(D)
        if first == 0:
            y = _put_first(y, first_ptr, signs, D)
        y = _finish(y, D, DTYPE)
    y = cast(y, DTYPE)
    target = ((slot * HK + head) * G + first + t)[:, None] * D + c[None, :]
    if is_value:
        tl.store(workspace_v_ptr + target, y)
    else:
        tl.store(workspace_k_ptr + target, y)


_dequantise_launcher = TritonLauncher(_dequantise_kernel)


def dequantise(
    workspace_k: torch.Tensor,
    workspace_v: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    requests: torch.Tensor,
    pages: torch.Tensor,
    num_exact: int,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
) -> None:
    """Write page pages[i] of request requests[i] to page i of the workspace, in the model's frame.

    An exact page that is not older than the exact start comes from the ring (positions before prefix_len), then from
    k and v, and is zero from seq_len on; every other page comes from its record. Elements are rounded to fp16 before
    and to the model's dtype after the rotation, the exact first row of a record only after it; k and v are copied.

    Args:
        workspace_k, workspace_v: [at least M, Hk, G, D] model dtype, contiguous, written.
        k, v: [at least T, Hk, D] model dtype, not rotated, last dimension contiguous.
        requests, pages: int32 [M] on the device; the first num_exact are exact pages.
        cache: read, the ring as it was before the chunk; batch: the step.
    """
    kv_heads, head_dim = cache.ring_k.shape[2:]
    block, cols, warps = BLOCKS[head_dim]
    grid = (len(pages), kv_heads, 2 * (config.tile_size // block) * (head_dim // cols))
    _dequantise_launcher(
        grid,
        workspace_k,
        workspace_v,
        k,
        v,
        cache.records,
        cache.records.view(first_row_dtype(cache.ring_k.dtype)),
        cache.ring_k,
        cache.ring_v,
        hadamard_signs(head_dim, torch.float16, cache.records.device),
        hadamard_signs(head_dim, cache.ring_k.dtype, cache.records.device),
        requests,
        pages,
        batch.page_table,
        batch.rows,
        batch.prefix_lens,
        batch.seq_lens,
        batch.qo_indptr,
        batch.exact_starts,
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        batch.page_table.stride(0),
        num_exact,
        kv_heads,
        head_dim,
        config.tile_size,
        config.k_bits,
        config.v_bits,
        config.ring_len,
        block,
        cols,
        num_warps=warps,
    )
