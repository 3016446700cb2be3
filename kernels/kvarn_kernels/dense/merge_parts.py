# SPDX-License-Identifier: Apache-2.0
"""Merge what further segments of an extend step gave into its output, and attention sinks; in the model's frame."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast
from kvarn_kernels.read.attend import sink_weight

# query heads of a program
ROWS = 16


@triton.jit(do_not_specialize=["begin", "num_rows", "splits"])
def _merge_parts_kernel(
    out_ptr,  # [T, Hq, D] model dtype, written
    lse_ptr,  # [T, Hq] float32, base 2, written
    parts_ptr,  # [S, N, Hq, D] model dtype
    part_lse_ptr,  # [S, N, Hq] float32, base 2
    seen_ptr,  # [S, N] uint8
    begin,
    num_rows,  # N * Hq
    splits,
    HQ: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, D)
    valid = r < num_rows
    at = r + begin * HQ
    out_ptrs = out_ptr + (at * D)[:, None] + d[None, :]
    acc = tl.load(out_ptrs, mask=valid[:, None], other=0.0).to(tl.float32)
    m = tl.load(lse_ptr + at, mask=valid, other=0.0)
    l = tl.full([ROWS], 1.0, tl.float32)
    for split in tl.range(0, splits):
        part = r + split * num_rows.to(tl.int64)
        exists = valid & (tl.load(seen_ptr + part // HQ, mask=valid, other=0) != 0)
        lse = tl.load(part_lse_ptr + part, mask=exists, other=float("-inf"))
        x = tl.load(parts_ptr + (part * D)[:, None] + d[None, :], mask=exists[:, None], other=0.0).to(tl.float32)
        top = tl.maximum(m, lse)
        a, b = tl.exp2(m - top), tl.exp2(lse - top)
        acc = acc * a[:, None] + x * b[:, None]
        m, l = top, l * a + b
    tl.store(out_ptrs, cast(acc / l[:, None], out_ptr.dtype.element_ty), mask=valid[:, None])
    tl.store(lse_ptr + at, m + tl.log2(l), mask=valid)


_merge_parts_launcher = TritonLauncher(_merge_parts_kernel)


def merge_parts(
    out: torch.Tensor,
    lse: torch.Tensor,
    begin: int,
    parts: torch.Tensor,
    part_lse: torch.Tensor,
    seen: torch.Tensor,
) -> None:
    """Merge the results of S splits for the tokens begin .. begin + N - 1 into out and lse.

    Args:
        out: [T, Hq, D] model dtype; lse: float32 [T, Hq], base 2, finite; contiguous, written.
        parts: [S, N, Hq, D] model dtype; part_lse: float32 [S, N, Hq]; contiguous.
        seen: bool [S, N], results that count; the others are not read.
    """
    splits, tokens, num_qo_heads, head_dim = parts.shape
    num_rows = tokens * num_qo_heads
    _merge_parts_launcher(
        (-(-num_rows // ROWS), 1, 1),
        out_ptr=out,
        lse_ptr=lse,
        parts_ptr=parts,
        part_lse_ptr=part_lse,
        seen_ptr=seen.view(torch.uint8),
        begin=begin,
        num_rows=num_rows,
        splits=splits,
        HQ=num_qo_heads,
        D=head_dim,
        ROWS=ROWS,
        num_warps=4,
    )


@triton.jit(do_not_specialize=["num_rows"])
def _weigh_against_sinks_kernel(
    out_ptr,  # [T, Hq, D] model dtype, written
    lse_ptr,  # [T, Hq] float32, base 2
    sinks_ptr,  # [Hq] any float dtype
    num_rows,  # T * Hq
    HQ: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    valid = r < num_rows
    out_ptrs = out_ptr + (r * D)[:, None] + tl.arange(0, D)[None, :]
    x = tl.load(out_ptrs, mask=valid[:, None], other=0.0).to(tl.float32)
    lse = tl.load(lse_ptr + r, mask=valid, other=0.0)
    share = 1.0 / (1.0 + sink_weight(tl.load(sinks_ptr + r % HQ), lse))
    tl.store(out_ptrs, cast(x * share[:, None], out_ptr.dtype.element_ty), mask=valid[:, None])


_weigh_against_sinks_launcher = TritonLauncher(_weigh_against_sinks_kernel)


def weigh_against_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> None:
    """Take from outputs the weight that attention sinks have: out *= 1 / (1 + exp2(log2(e) * sink - lse)).

    Args:
        out: [T, Hq, D] model dtype, contiguous, written; lse: float32 [T, Hq], base 2, finite.
        sinks: any float dtype [Hq].
    """
    tokens, num_qo_heads, head_dim = out.shape
    num_rows = tokens * num_qo_heads
    _weigh_against_sinks_launcher(
        (-(-num_rows // ROWS), 1, 1),
        out_ptr=out,
        lse_ptr=lse,
        sinks_ptr=sinks,
        num_rows=num_rows,
        HQ=num_qo_heads,
        D=head_dim,
        ROWS=ROWS,
        num_warps=4,
    )
