# SPDX-License-Identifier: Apache-2.0
"""Rotate rows by the Hadamard matrix: x H, one matrix product with exact +-1 operands."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvarn_kernels.reference.hadamard import _signs
from kvarn_kernels.tile_io import cast, dot

# rows of one program; 32 rows keep the 32 KiB sign matrix to one read per 32 heads (D = 128)
BLOCK_ROWS = 32


@lru_cache(maxsize=16)
def hadamard_signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the +-1 Sylvester matrix [D, D] in dtype, cached per device (created outside of CUDA graphs)."""
    return _signs(head_dim).to(device=device, dtype=dtype)


@triton.jit
def rotate_block(x, signs_ptr, D: tl.constexpr):
    """Return x H in float32 for x [ROWS, D] in a 16-bit dtype (exact products, float32 sums) or float32."""
    d = tl.arange(0, D)
    signs = tl.load(signs_ptr + d[:, None] * D + d[None, :])  # [D, D]
    SCALE: tl.constexpr = 1.0 / (D**0.5)
    return dot(x, signs, tl.zeros([x.shape[0], D], tl.float32)) * SCALE


@triton.jit
def unrotate(x, signs_ptr, begin, D: tl.constexpr, COLS: tl.constexpr):
    """Return the channels begin .. begin + COLS - 1 of x H for x [M, D] float32, to about 2^-17 of the row's norm.

    x is split into two bfloat16 terms, each multiplied exactly by the signs (bfloat16).
    """
    d, c = tl.arange(0, D), begin + tl.arange(0, COLS)
    signs = tl.load(signs_ptr + d[:, None] * D + c[None, :])  # [D, COLS]
    high = cast(x, tl.bfloat16)
    low = cast(x - high.to(tl.float32), tl.bfloat16)
    SCALE: tl.constexpr = 1.0 / (D**0.5)
    return dot(low, signs, dot(high, signs, tl.zeros([x.shape[0], COLS], tl.float32))) * SCALE


@triton.jit
def _rotate_rows(
    x_ptr, out_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, num_rows,
    stride_x_token, stride_x_head, stride_out_token, stride_out_head,
    H: tl.constexpr, D: tl.constexpr, RING_LEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    r = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    valid = r < num_rows
    token, head = r // H, r % H
    x = tl.load(
        x_ptr + (token * stride_x_token + head * stride_x_head)[:, None] + d[None, :], mask=valid[:, None], other=0.0
    )
    rotated = rotate_block(x, signs_ptr, D)
    dest = token
    if RING_LEN > 0:
        row = tl.load(rows_ptr + token, mask=valid, other=0)
        position = tl.load(seq_lens_ptr + token, mask=valid, other=1).to(tl.int64) - 1
        dest = row * RING_LEN + position % RING_LEN
    out = out_ptr + (dest * stride_out_token + head * stride_out_head)[:, None] + d[None, :]
    tl.store(out, cast(rotated, out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_rows"])
def _rotate_kernel(
    x_ptr,  # [T, H, D] model dtype
    out_ptr,  # [T, H, D] output dtype, written
    signs_ptr,  # [D, D] model dtype, +-1
    num_rows,  # T * H
    stride_x_token,
    stride_x_head,
    stride_out_token,
    stride_out_head,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
):
    _rotate_rows(
        x_ptr, out_ptr, signs_ptr, None, None, tl.program_id(0), num_rows,
        stride_x_token, stride_x_head, stride_out_token, stride_out_head, H, D, 0, BLOCK
    )  # fmt: skip


@triton.jit(do_not_specialize=["batch_size"])
def _rotate_step_kernel(
    q_ptr,  # [B, Hq, D] model dtype
    k_ptr,  # [B, Hk, D]
    v_ptr,  # [B, Hk, D]
    rotated_q_ptr,  # [B, Hq, D] float32, written
    ring_k_ptr,  # [R, RING_LEN, Hk, D] model dtype, written
    ring_v_ptr,
    signs_ptr,  # [D, D] model dtype, +-1
    rows_ptr,  # [B] int64
    seq_lens_ptr,  # [B] int32
    batch_size,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    RING_LEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    if tl.program_id(1) == 0:
        _rotate_rows(
            q_ptr, rotated_q_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, batch_size * HQ,
            stride_q_token, stride_q_head, HQ * D, D, HQ, D, 0, BLOCK
        )  # fmt: skip
    elif block * BLOCK < batch_size * HK:
        if tl.program_id(1) == 1:
            _rotate_rows(
                k_ptr, ring_k_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, batch_size * HK,
                stride_k_token, stride_k_head, HK * D, D, HK, D, RING_LEN, BLOCK
            )  # fmt: skip
        else:
            _rotate_rows(
                v_ptr, ring_v_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, batch_size * HK,
                stride_v_token, stride_v_head, HK * D, D, HK, D, RING_LEN, BLOCK
            )  # fmt: skip


def rotate(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write x H to out.

    Args:
        x: [T, H, D], last dimension contiguous, model dtype.
        out: [T, H, D] any float dtype, written.
    """
    tokens, heads, head_dim = x.shape
    if tokens == 0:
        return
    _rotate_kernel[(triton.cdiv(tokens * heads, BLOCK_ROWS),)](
        x,
        out,
        hadamard_signs(head_dim, x.dtype, x.device),
        tokens * heads,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        H=heads,
        D=head_dim,
        BLOCK=BLOCK_ROWS,
        num_warps=4,
    )


def rotate_step(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rotated_q: torch.Tensor,
    ring_k: torch.Tensor,
    ring_v: torch.Tensor,
    rows: torch.Tensor,
    seq_lens: torch.Tensor,
) -> None:
    """Rotate one token per request in one launch: q to rotated_q, k and v to their ring slots.

    Args:
        q: [B, Hq, D]; k, v: [B, Hk, D]; last dimension contiguous, model dtype.
        rotated_q: float32 [at least B, Hq, D], contiguous, written.
        ring_k, ring_v: [R, ring_len, Hk, D] contiguous; slot (seq_lens[b] - 1) % ring_len of row rows[b] is written.
        rows: int64 [B]; seq_lens: int32 [B], the new token included.
    """
    batch_size, qo_heads, head_dim = q.shape
    ring_len, kv_heads = ring_k.shape[1:3]
    _rotate_step_kernel[(triton.cdiv(batch_size * qo_heads, BLOCK_ROWS), 3)](
        q,
        k,
        v,
        rotated_q,
        ring_k,
        ring_v,
        hadamard_signs(head_dim, q.dtype, q.device),
        rows,
        seq_lens,
        batch_size,
        q.stride(0),
        q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        HQ=qo_heads,
        HK=kv_heads,
        D=head_dim,
        RING_LEN=ring_len,
        BLOCK=BLOCK_ROWS,
        num_warps=4,
    )
