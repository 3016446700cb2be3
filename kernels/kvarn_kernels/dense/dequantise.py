# SPDX-License-Identifier: Apache-2.0
"""Write pages out in the model's frame and dtype, for an attention that reads 16 bits.

Exact pages come from the chunk itself and, before it, from the ring, all others from their records. This is the
portable form; dequantise_cuda.py runs where CUDA C++ can be compiled.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast, dot
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record import tile
from kvarn_kernels.record.hadamard import hadamard_signs
from kvarn_kernels.record.ring import ring_ptrs
from kvarn_kernels.record.unpack import load_keys, load_values

# tokens, channels and warps of a program by head_dim. H100, 273 pages of 8 heads of 128: 188 us; (64, 128, 4) took 195,
# (64, 128, 8) 225, and (128, 128, 8), of which a multiprocessor holds one program, 262
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
    firsts_ptr,  # the same memory in the dtype of the first tokens
    exact_ptr,  # the same memory in the model's dtype
    ring_pages_ptr,  # [B, RING_PAGES] int32
    signs_ptr,  # [D, D] float16, +-1
    model_signs_ptr,  # [D, D] model dtype, +-1
    requests_ptr,  # [M] int32
    pages_ptr,  # [M] int32
    page_table_ptr,  # [B, P_max] int32
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
    RING_PAGES: tl.constexpr,
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
            pages = ring_pages_ptr + b * RING_PAGES
            at = ring_ptrs(exact_ptr, pages, position, head, HK, D, K_BITS, V_BITS, RING_PAGES)[:, None] + d[None, :]
            if is_value:
                at += D
            x = tl.load(at, mask=is_old, other=0.0)
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


@dataclass(frozen=True)
class PageList:
    """Name M pages to write out.

    Attributes:
        requests, pages: int32 [M] on the device; entry i is page pages[i] of request requests[i] of the batch.
        num_exact: how many of them, the first ones, are exact pages.
    """

    requests: torch.Tensor
    pages: torch.Tensor
    num_exact: int


def dequantise(
    out: tuple[torch.Tensor, torch.Tensor],
    new: QKV,
    pages: PageList,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
) -> None:
    """Write the listed pages, entry i of the list to page i of the output, in the model's frame.

    An exact page that is not older than the exact start comes from the ring (positions before prefix_len), then from
    the new tokens, and is zero from seq_len on; every other page comes from its record. Elements are rounded to fp16
    before and to the model's dtype after the rotation, the exact first token of a record only after it; new keys and
    values are copied.

    Args:
        out: keys and values, each [at least M, Hk, G, D] model dtype, contiguous, written.
        new: k, v [at least T, Hk, D] model dtype, not rotated.
        cache: read, the ring as it was before the chunk; batch: the step.
    """
    block, cols, warps = BLOCKS[cache.head_dim]
    parts = 2 * (tile.TILE_SIZE // block) * (cache.head_dim // cols)
    _dequantise_launcher(
        (len(pages.pages), cache.num_kv_heads, parts),
        workspace_k_ptr=out[0],
        workspace_v_ptr=out[1],
        k_ptr=new.k,
        v_ptr=new.v,
        records_ptr=cache.records,
        firsts_ptr=cache.first_tokens,
        exact_ptr=cache.exact,
        ring_pages_ptr=batch.ring_pages,
        signs_ptr=hadamard_signs(cache.head_dim, torch.float16, cache.records.device),
        model_signs_ptr=hadamard_signs(cache.head_dim, cache.dtype, cache.records.device),
        requests_ptr=pages.requests,
        pages_ptr=pages.pages,
        page_table_ptr=batch.page_table,
        prefix_lens_ptr=batch.prefix_lens,
        seq_lens_ptr=batch.seq_lens,
        qo_indptr_ptr=batch.qo_indptr,
        exact_starts_ptr=batch.exact_starts,
        stride_k_token=new.k.stride(0),
        stride_k_head=new.k.stride(1),
        stride_v_token=new.v.stride(0),
        stride_v_head=new.v.stride(1),
        stride_page_table=batch.page_table.stride(0),
        num_exact=pages.num_exact,
        HK=cache.num_kv_heads,
        D=cache.head_dim,
        G=tile.TILE_SIZE,
        K_BITS=config.k_bits,
        V_BITS=config.v_bits,
        RING_PAGES=batch.ring_pages.shape[1],
        BLOCK=block,
        COLS=cols,
        num_warps=warps,
    )
