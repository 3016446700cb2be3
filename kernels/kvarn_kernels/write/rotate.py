# SPDX-License-Identifier: Apache-2.0
"""Rotate the new tokens of a step: q H, k H and v H in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import QKV
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast
from kvarn_kernels.record.hadamard import hadamard_signs, rotate_block

# rows of a program in a decode step and in a chunk. A program reads the sign matrix (32 KiB at D = 128) once. H100,
# 8,192 tokens of 2 x 8 heads: 64 rows took 31 us, 32 rows 40, 128 rows 38
STEP_ROWS, CHUNK_ROWS = 32, 64


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


def rotate_into(
    out: QKV, new: QKV, rows: torch.Tensor | None = None, seq_lens: torch.Tensor | None = None, *, with_q: bool = True
) -> None:
    """Rotate T tokens in one launch.

    Args:
        out: q float32 [at least T, Hq, D]; k and v in the model's dtype, [T, Hk, D], or rings [R, ring_len, Hk, D]
            where rows are given; contiguous, written.
        new: the tokens, in the model's dtype.
        rows: int64 [T], for rings: slot (seq_lens[t] - 1) % ring_len of row rows[t] is written; seq_lens: int32 [T].
        with_q: whether the query is wanted; it is neither read nor written otherwise.
    """
    q, k, v = new
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    num_qo_heads = q.shape[1] if with_q else 0
    block = CHUNK_ROWS if rows is None else STEP_ROWS
    _rotate_launcher(
        (triton.cdiv(tokens * max(num_qo_heads, num_kv_heads), block), 3 if with_q else 2, 1),
        q_ptr=q if with_q else None,
        k_ptr=k,
        v_ptr=v,
        rotated_q_ptr=out.q if with_q else None,
        k_out_ptr=out.k,
        v_out_ptr=out.v,
        signs_ptr=hadamard_signs(head_dim, k.dtype, k.device),
        rows_ptr=rows,
        seq_lens_ptr=seq_lens,
        num_tokens=tokens,
        stride_q_token=q.stride(0) if with_q else 0,
        stride_q_head=q.stride(1) if with_q else 0,
        stride_k_token=k.stride(0),
        stride_k_head=k.stride(1),
        stride_v_token=v.stride(0),
        stride_v_head=v.stride(1),
        HQ=num_qo_heads,
        HK=num_kv_heads,
        D=head_dim,
        RING_LEN=0 if rows is None else out.k.shape[1],
        BLOCK=block,
        num_warps=4,
    )


def rotate_chunk(new: QKV, *, with_q: bool = True) -> QKV:
    """Return q H in float32 and k H, v H in the model's dtype, all contiguous; an empty q where it is not wanted."""
    q = torch.empty(new.q.shape if with_q else 0, dtype=torch.float32, device=new.q.device)
    rotated = QKV(q, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (new.k, new.v)))
    rotate_into(rotated, new, with_q=with_q)
    return rotated
