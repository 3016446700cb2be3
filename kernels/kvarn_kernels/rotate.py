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
def _rotate_kernel(
    x_ptr,  # [T, H, D] model dtype
    out_ptr,  # [*, H, D] output dtype, token index from DEST
    signs_ptr,  # [D, D] model dtype, +-1
    rows_ptr,  # [T] int64, request rows, if RING_LEN > 0
    seq_lens_ptr,  # [T] int32, if RING_LEN > 0
    num_rows,  # T * H
    stride_x_token,
    stride_x_head,
    stride_out_token,
    stride_out_head,
    H: tl.constexpr,
    D: tl.constexpr,
    RING_LEN: tl.constexpr,  # 0: token t goes to out[t]; else to its ring slot
    BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
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


def rotate(
    x: torch.Tensor,
    out: torch.Tensor,
    *,
    rows: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None,
    ring_len: int = 0,
) -> None:
    """Write x H to out, or to ring slots of out.

    Args:
        x: [T, H, D], last dimension contiguous, model dtype.
        out: [T, H, D] any float dtype, written; with ring_len a ring [R * ring_len, H, D].
        rows, seq_lens: int64 [T], int32 [T]; with ring_len > 0 token t goes to slot (seq_lens[t] - 1) % ring_len of
            request row rows[t].
    """
    tokens, heads, head_dim = x.shape
    if tokens == 0:
        return
    _rotate_kernel[(triton.cdiv(tokens * heads, BLOCK_ROWS),)](
        x,
        out,
        hadamard_signs(head_dim, x.dtype, x.device),
        rows,
        seq_lens,
        tokens * heads,
        x.stride(0),
        x.stride(1),
        out.stride(0),
        out.stride(1),
        H=heads,
        D=head_dim,
        RING_LEN=ring_len,
        BLOCK=BLOCK_ROWS,
        num_warps=4,
    )
