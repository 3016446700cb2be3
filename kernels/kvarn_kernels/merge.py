# SPDX-License-Identifier: Apache-2.0
"""Merge the splits of a decode step and rotate the result back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.cache import DecodeBatch
from kvarn_kernels.rotate import hadamard_signs, unrotate
from kvarn_kernels.tile_io import cast, narrow

BLOCK_ROWS = 16


@triton.jit(do_not_specialize=["num_rows", "S"])
def _merge_kernel(
    partial_out_ptr,  # [N, S, D] float32, N = B * Hq
    partial_lse_ptr,  # [N, S] float32, base 2
    out_ptr,  # [N, D] model dtype, written
    signs_ptr,  # [D, D] bfloat16
    num_rows,
    S,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
    LSE_BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    valid = r < num_rows
    # reduced once, after the loop: Triton 3.6 fails to compile a reduction into a running maximum for some layouts
    largest = tl.full([BLOCK, LSE_BLOCK], float("-inf"), tl.float32)
    n = tl.arange(0, LSE_BLOCK)
    for start in tl.range(0, S, LSE_BLOCK):
        seen = valid[:, None] & (start + n < S)[None, :]
        lse = tl.load(partial_lse_ptr + (r * S)[:, None] + (start + n)[None, :], mask=seen, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    m = tl.max(largest, 1)
    m_safe = tl.where(m == float("-inf"), 0.0, m)
    # with the maximum known, the loads of all splits are independent of each other
    total = tl.zeros([BLOCK], tl.float32)
    acc = tl.zeros([BLOCK, D], tl.float32)
    for start in tl.range(0, S, UNROLL):
        for k in tl.static_range(UNROLL):
            split = start + k
            lse = tl.load(partial_lse_ptr + r * S + split, mask=narrow(valid, split < S), other=float("-inf"))
            weight = tl.exp2(lse - m_safe)
            # an empty split has written no output
            used = lse > float("-inf")
            x = tl.load(partial_out_ptr + ((r * S + split) * D)[:, None] + d[None, :], mask=used[:, None], other=0.0)
            acc += x * weight[:, None]
            total += weight
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out = unrotate(acc, signs_ptr, 0, D, D)
    tl.store(out_ptr + (r * D)[:, None] + d[None, :], cast(out, out_ptr.dtype.element_ty), mask=valid[:, None])


def merge(out: torch.Tensor, batch: DecodeBatch) -> None:
    """Combine the partial results in the workspace by their lse and write out = (sum) H.

    Args:
        out: [B, Hq, D] model dtype, contiguous, written.
        batch: a step that `decode` has run.
    """
    assert batch.workspace is not None, "the Triton form needs a DecodeWorkspace"
    batch_size, num_qo_heads, head_dim = out.shape
    rows = batch_size * num_qo_heads
    _merge_kernel[(triton.cdiv(rows, BLOCK_ROWS),)](
        batch.workspace.partial_out,
        batch.workspace.partial_lse,
        out,
        hadamard_signs(head_dim, torch.bfloat16, out.device),
        rows,
        batch.workspace.num_splits[batch_size - 1],
        D=head_dim,
        BLOCK=BLOCK_ROWS,
        UNROLL=4,
        LSE_BLOCK=64,
        num_warps=4,
    )
