# SPDX-License-Identifier: Apache-2.0
"""Conversions and matrix products of kernels that give the same result compiled and in Triton's interpreter."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.constexpr_function
def is_interpreted():
    """Return whether Triton runs its interpreter in this process; a constant inside a kernel."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def cast(x, DTYPE: tl.constexpr):
    """Return float32 x in DTYPE, rounded to nearest even.

    Triton 3.6 to 3.9 interpret the conversion to bfloat16 as truncation, so the interpreter rounds the bits first.
    """
    if is_interpreted() and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = bits.to(tl.float32, bitcast=True)
    return x.to(DTYPE)


@triton.jit
def dot(a, b, acc):
    """Return a b + acc with float32 sums; a and b in the same 16-bit dtype.

    Triton 3.6 to 3.9 interpret a bfloat16 product on the raw bits, so the interpreter gets float32 operands.
    """
    if is_interpreted():
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
