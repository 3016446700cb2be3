# SPDX-License-Identifier: Apache-2.0
"""Merge the splits of a decode step, or of a short extend step, and rotate the result back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast
from kvarn_kernels.read.attend import sink_weight
from kvarn_kernels.record.hadamard import hadamard_signs, unrotate

# partial results (rows x splits) that one program loads at a time
RESULTS = 64
# a step of fewer rows (tokens x query heads) gets programs of 2 rows instead of 16, so that no part of the GPU is idle
FEW_ROWS = 1024


@triton.jit(do_not_specialize=["num_rows"])
def _merge_kernel(
    partial_out_ptr,  # [S, Hq, D] float32
    partial_lse_ptr,  # [S, Hq] float32, base 2
    indptr_ptr,  # [T + 1] int32, first split of each token
    out_ptr,  # [T * Hq, D] model dtype, written
    signs_ptr,  # [D, D] bfloat16
    sinks_ptr,  # [SINKS] any float dtype, read if SINKS
    num_rows,
    HQ: tl.constexpr,
    SINKS: tl.constexpr,  # query heads of a token, 0 without attention sinks
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = r < num_rows
    begin = tl.load(indptr_ptr + r // HQ, mask=valid, other=0)
    count = tl.load(indptr_ptr + r // HQ + 1, mask=valid, other=0) - begin
    most = tl.max(count, 0)
    n, d = tl.arange(0, SPLITS), tl.arange(0, D)
    # of the first of the splits n, n + SPLITS, ...
    first = (begin[:, None] + n[None, :]).to(tl.int64) * HQ + (r % HQ)[:, None]
    # reduced once, after the loop: Triton 3.6 fails to compile a reduction into a running maximum for some layouts
    largest = tl.full([ROWS, SPLITS], float("-inf"), tl.float32)
    for start in tl.range(0, most, SPLITS):
        exists = start + n[None, :] < count[:, None]
        lse = tl.load(partial_lse_ptr + first + start * HQ, mask=exists, other=float("-inf"))
        largest = tl.maximum(largest, lse)
    m = tl.max(largest, 1)
    m = tl.where(m == float("-inf"), 0.0, m)
    total = tl.zeros([ROWS, SPLITS], tl.float32)
    acc = tl.zeros([ROWS, SPLITS, D], tl.float32)
    for start in tl.range(0, most, SPLITS):
        exists = start + n[None, :] < count[:, None]
        at = first + start * HQ
        lse = tl.load(partial_lse_ptr + at, mask=exists, other=float("-inf"))
        x = tl.load(partial_out_ptr + (at * D)[:, :, None] + d[None, None, :], mask=exists[:, :, None], other=0.0)
        weight = tl.exp2(lse - m[:, None])
        acc += x * weight[:, :, None]
        total += weight
    l = tl.sum(total, 1)
    if SINKS:
        l += sink_weight(tl.load(sinks_ptr + r % SINKS), m)
    x = tl.sum(acc, 1) / tl.where(l == 0.0, 1.0, l)[:, None]
    # a matrix product takes 16 rows or more
    COPIES: tl.constexpr = 16 // ROWS
    x = tl.reshape(tl.broadcast_to(x[:, None, :], (ROWS, COPIES, D)), (16, D))
    to_store = valid[:, None, None] & (tl.arange(0, COPIES) == 0)[None, :, None]
    # half of the sign matrix at a time where all of it takes 128 KiB, more shared memory than most GPUs have
    COLS: tl.constexpr = min(D, 128)
    for column in tl.static_range(0, D, COLS):
        c = column + tl.arange(0, COLS)
        y = tl.reshape(unrotate(x, signs_ptr, column, D, COLS), (ROWS, COPIES, COLS))
        # a pointer for every copy, of which one is used
        out = out_ptr + (r * D)[:, None, None] + (tl.arange(0, COPIES) * 0)[None, :, None] + c[None, None, :]
        tl.store(out, cast(y, out_ptr.dtype.element_ty), mask=to_store)


_merge_launcher = TritonLauncher(_merge_kernel)


def rows_of_program(num_rows: int, config: KVarNConfig) -> int:
    """Return the query heads that a program merges. It sets the order of sums, which may be fixed."""
    return 2 if num_rows < FEW_ROWS and not config.fixed_order else 16


def merge_splits(
    out: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    indptr: torch.Tensor,
    config: KVarNConfig,
    sinks: torch.Tensor | None = None,
) -> None:
    """Combine partial results by their lse and write out = (sum) H.

    Args:
        out: [N, Hq, D] model dtype, contiguous, written.
        partial_out: float32 [S, Hq, D]; partial_lse: float32 [S, Hq], base 2, -inf where a split holds no key.
        indptr: int32 [at least N + 1]; the splits indptr[n] .. indptr[n + 1] - 1 belong to token n.
        sinks: attention sinks, any float dtype [Hq], or [Hq / n] for n drafts that were attended together.
    """
    num_tokens, num_qo_heads, head_dim = out.shape
    num_rows = num_tokens * num_qo_heads
    rows = rows_of_program(num_rows, config)
    _merge_launcher(
        (-(-num_rows // rows), 1, 1),
        partial_out_ptr=partial_out,
        partial_lse_ptr=partial_lse,
        indptr_ptr=indptr,
        out_ptr=out,
        signs_ptr=hadamard_signs(head_dim, torch.bfloat16, out.device),
        sinks_ptr=sinks,
        num_rows=num_rows,
        HQ=num_qo_heads,
        SINKS=0 if sinks is None else sinks.shape[0],
        D=head_dim,
        ROWS=rows,
        SPLITS=RESULTS // rows,
        num_warps=4,
    )
