# SPDX-License-Identifier: Apache-2.0
"""Rotate rows by the Hadamard matrix: x H, one matrix product with exact +-1 operands."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvarn_kernels.launch import TritonLauncher
from kvarn_kernels.reference.hadamard import _signs
from kvarn_kernels.tile_io import cast, dot

# rows of one program in a decode step and in a chunk; each reads the sign matrix of 32 KiB (D = 128) once. H100, 8,192
# tokens of 2 x 8 heads: 31 us with 64 rows, 40 with 32, 38 with 128
STEP_ROWS, CHUNK_ROWS = 32, 64


@lru_cache(maxsize=16)
def hadamard_signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the +-1 Sylvester matrix [D, D] in dtype, cached per device (created outside of CUDA graphs)."""
    return _signs(head_dim).to(device=device, dtype=dtype)


@triton.jit
def rotate_block(x, signs_ptr, begin, D: tl.constexpr, COLS: tl.constexpr):
    """Return the channels begin .. begin + COLS - 1 of x H in float32.

    x [ROWS, D] is in a 16-bit dtype (exact products, float32 sums) or float32.
    """
    d, c = tl.arange(0, D), begin + tl.arange(0, COLS)
    signs = tl.load(signs_ptr + d[:, None] * D + c[None, :])  # [D, COLS]
    SCALE: tl.constexpr = 1.0 / (D**0.5)
    return dot(x, signs, tl.zeros([x.shape[0], COLS], tl.float32)) * SCALE


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
    dest = token
    if RING_LEN > 0:
        row = tl.load(rows_ptr + token, mask=valid, other=0)
        position = tl.load(seq_lens_ptr + token, mask=valid, other=1).to(tl.int64) - 1
        dest = row * RING_LEN + position % RING_LEN
    out = out_ptr + dest * stride_out_token + head * stride_out_head
    # the sign matrix of 256 channels takes 128 KiB, more shared memory than most GPUs have; half of it is enough
    COLS: tl.constexpr = min(D, 128)
    for begin in tl.static_range(0, D, COLS):
        rotated = rotate_block(x, signs_ptr, begin, D, COLS)
        c = begin + tl.arange(0, COLS)
        tl.store(out[:, None] + c[None, :], cast(rotated, out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_kernel(
    q_ptr,  # [T, Hq, D] model dtype; not read where HQ is 0
    k_ptr,  # [T, Hk, D]
    v_ptr,  # [T, Hk, D]
    rotated_q_ptr,  # [T, Hq, D] float32, written
    k_out_ptr,  # [T, Hk, D] model dtype, written; the ring [R, RING_LEN, Hk, D] where RING_LEN is not 0
    v_out_ptr,
    signs_ptr,  # [D, D] model dtype, +-1
    rows_ptr,  # [T] int64, row of the ring
    seq_lens_ptr,  # [T] int32
    num_tokens,
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
    block, tensor = tl.program_id(0), tl.program_id(1)
    if tensor == 2:
        if HQ > 0:
            _rotate_rows(
                q_ptr, rotated_q_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, num_tokens * HQ,
                stride_q_token, stride_q_head, HQ * D, D, HQ, D, 0, BLOCK
            )  # fmt: skip
    elif block * BLOCK < num_tokens * HK:
        if tensor == 0:
            _rotate_rows(
                k_ptr, k_out_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, num_tokens * HK,
                stride_k_token, stride_k_head, HK * D, D, HK, D, RING_LEN, BLOCK
            )  # fmt: skip
        else:
            _rotate_rows(
                v_ptr, v_out_ptr, signs_ptr, rows_ptr, seq_lens_ptr, block, num_tokens * HK,
                stride_v_token, stride_v_head, HK * D, D, HK, D, RING_LEN, BLOCK
            )  # fmt: skip


_rotate_launcher = TritonLauncher(_rotate_kernel)


def _launch(
    q: torch.Tensor | None,
    k: torch.Tensor,
    v: torch.Tensor,
    rotated_q: torch.Tensor | None,
    k_out: torch.Tensor,
    v_out: torch.Tensor,
    rows: torch.Tensor | None,
    seq_lens: torch.Tensor | None,
    ring_len: int,
) -> None:
    tokens, kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    qo_heads = 0 if q is None else q.shape[1]
    block = CHUNK_ROWS if rows is None else STEP_ROWS
    _rotate_launcher(
        (triton.cdiv(tokens * max(qo_heads, kv_heads), block), 2 if q is None else 3, 1),
        q,
        k,
        v,
        rotated_q,
        k_out,
        v_out,
        hadamard_signs(head_dim, k.dtype, k.device),
        rows,
        seq_lens,
        tokens,
        0 if q is None else q.stride(0),
        0 if q is None else q.stride(1),
        k.stride(0),
        k.stride(1),
        v.stride(0),
        v.stride(1),
        qo_heads,
        kv_heads,
        head_dim,
        ring_len,
        block,
        num_warps=4,
    )


def rotate_chunk(
    q: torch.Tensor | None, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
    """Return q H in float32 and k H, v H in the model's dtype, all contiguous, in one launch.

    Args:
        q: [T, Hq, D], or None: it is not wanted; k, v: [T, Hk, D]; last dimension contiguous, model dtype.
    """
    rotated_q = None if q is None else torch.empty(q.shape, dtype=torch.float32, device=q.device)
    rotated_k, rotated_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    _launch(q, k, v, rotated_q, rotated_k, rotated_v, None, None, 0)
    return rotated_q, rotated_k, rotated_v


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
    _launch(q, k, v, rotated_q, ring_k, ring_v, rows, seq_lens, ring_k.shape[1])
