# SPDX-License-Identifier: Apache-2.0
"""Device-side unpacking: the only place that turns a word of codes into matrix operands."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.runtime import driver


def packed_unpack_supported() -> bool:
    """Return whether the inline-PTX form of `unpack_pair` can run: compiled for an NVIDIA GPU."""
    return not is_interpreted() and driver.active.get_current_target().backend == "cuda"


def is_interpreted() -> bool:
    """Return whether Triton runs its interpreter in this process."""
    return bool(triton.knobs.runtime.interpret)


@triton.jit
def _shift(x, AMOUNT: tl.constexpr):
    if AMOUNT > 0:
        x = x << AMOUNT
    elif AMOUNT < 0:
        x = x >> (-AMOUNT)
    return x


@triton.constexpr_function
def _unpack_pair_ptx(amount, mask):
    # two words in, two packed pairs out: (x & mask) | 0x3C003C00 for each, then the low halves and the high halves
    shift = f"{'shl' if amount >= 0 else 'shr'}.b32"
    both = mask * 0x10001
    return (
        "{ .reg .b32 a, b; "
        f"{shift} a, $2, {abs(amount)}; {shift} b, $3, {abs(amount)}; "
        f"lop3.b32 a, a, {both}, {0x3C003C00}, 0xEA; lop3.b32 b, b, {both}, {0x3C003C00}, 0xEA; "
        "prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }"
    )


@triton.jit
def unpack_pair(words, FIELD: tl.constexpr, BITS: tl.constexpr, PACKED: tl.constexpr):
    """Return the fields FIELD and FIELD + 16 / BITS of every word as float16 values 1 + code / 2^BITS.

    The code lands in the top bits of an fp16 mantissa under the exponent of 1: no integer-to-float conversion and no
    subtraction; the 1 and the factor fold into scale and zero of the record.

    Args:
        words: int32, any shape.
        FIELD: 0 .. 16 / BITS - 1, a field of the low half.
        PACKED: use two-at-a-time inline PTX (NVIDIA only) instead of plain Triton.
    """
    # bit of the field inside its half -> top of the mantissa
    AMOUNT: tl.constexpr = (10 - BITS) - BITS * FIELD
    MASK: tl.constexpr = ((1 << BITS) - 1) << (10 - BITS)
    if PACKED:
        low, high = tl.inline_asm_elementwise(
            _unpack_pair_ptx(AMOUNT, MASK), "=r,=r,r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
    else:
        low = ((_shift(words, AMOUNT) & MASK) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
        high = ((_shift(words, AMOUNT - 16) & MASK) | 0x3C00).to(tl.int16).to(tl.float16, bitcast=True)
    return low, high
