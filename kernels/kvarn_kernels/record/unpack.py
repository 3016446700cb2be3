# SPDX-License-Identifier: Apache-2.0
"""Device-side unpacking: the only place that turns a word of codes into matrix operands."""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.device.numerics import is_interpreted
from kvarn_kernels.record import tile


@triton.jit
def _shift(x, AMOUNT: tl.constexpr):
    if AMOUNT > 0:
        x = x << AMOUNT
    elif AMOUNT < 0:
        x = x >> (-AMOUNT)
    return x


@triton.constexpr_function
def _shift_ptx(amount, register, operand):
    return f"{'shl' if amount >= 0 else 'shr'}.b32 {register}, {operand}, {abs(amount)}; "


@triton.constexpr_function
def _unpack_pair_ptx(amount, mask, top_amount, top_mask):
    # two words in, two packed pairs out: (x & mask) | 0x3C003C00 for each, then the low halves and the high halves;
    # with a top mask, two words of top bits follow the words
    both, tops = mask * 0x10001, top_mask * 0x10001
    code = "{ .reg .b32 a, b, c, d; " + _shift_ptx(amount, "a", "$2") + _shift_ptx(amount, "b", "$3")
    code += f"lop3.b32 a, a, {both}, {0x3C003C00}, 0xEA; lop3.b32 b, b, {both}, {0x3C003C00}, 0xEA; "
    if tops:
        code += _shift_ptx(top_amount, "c", "$4") + _shift_ptx(top_amount, "d", "$5")
        code += f"lop3.b32 a, c, {tops}, a, 0xEA; lop3.b32 b, d, {tops}, b, 0xEA; "
    return code + "prmt.b32 $0, a, b, 0x5410; prmt.b32 $1, a, b, 0x7632; }"


@triton.jit
def _to_float(fields, BITS: tl.constexpr):
    # the code goes to the top of the mantissa of 1.0: no conversion from integers
    return (((fields & ((1 << BITS) - 1)) << (23 - BITS)) | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def unpack_pair(words, tops, FIELD: tl.constexpr, BITS: tl.constexpr):
    """Return the fields FIELD and FIELD + 16 / b of every word as float16 values 1 + code / 2^BITS, b bits a field.

    The code lands in the top bits of an fp16 mantissa under the exponent of 1: no integer-to-float conversion and no
    subtraction; the 1 and the factor fold into scale and zero of the record.

    Args:
        words, tops: int32, any shape, from `load_key_words` or `load_value_words`; tops are read if BITS is 3.
        FIELD: 0 .. 16 / b - 1, a field of the low half.

    Compiled code unpacks two words at a time in inline PTX (H100: 547 us against 664 us for plain Triton at 64 x
    16,384 tokens, head_dim 128); the interpreter runs the plain form.
    """
    LOW_BITS: tl.constexpr = tile.low_bits(BITS)
    # bit of the field inside its half -> top of the mantissa; the top bit of 3 goes to the highest one
    AMOUNT: tl.constexpr = (10 - BITS) - LOW_BITS * FIELD
    MASK: tl.constexpr = ((1 << LOW_BITS) - 1) << (10 - BITS)
    TOP_AMOUNT: tl.constexpr = 9 - LOW_BITS * FIELD
    TOP_MASK: tl.constexpr = 0x200 if BITS == 3 else 0
    if not is_interpreted():
        PTX: tl.constexpr = _unpack_pair_ptx(AMOUNT, MASK, TOP_AMOUNT, TOP_MASK)
        # the dtypes are written out at the call: Triton 3.8 takes no tuple of dtypes from a constexpr
        if BITS == 3:
            low, high = tl.inline_asm_elementwise(
                PTX, "=r,=r,r,r,r,r", [words, tops], (tl.float16, tl.float16), is_pure=True, pack=2
            )
        else:
            low, high = tl.inline_asm_elementwise(
                PTX, "=r,=r,r,r", [words], (tl.float16, tl.float16), is_pure=True, pack=2
            )
    else:
        x = (_shift(words, AMOUNT) & MASK) | (_shift(tops, TOP_AMOUNT) & TOP_MASK) | 0x3C00
        y = (_shift(words, AMOUNT - 16) & MASK) | (_shift(tops, TOP_AMOUNT - 16) & TOP_MASK) | 0x3C00
        low, high = x.to(tl.int16).to(tl.float16, bitcast=True), y.to(tl.int16).to(tl.float16, bitcast=True)
    return low, high


@triton.jit
def load_key_words(keys_ptr, r, c, D: tl.constexpr, BITS: tl.constexpr):
    """Load the key words (r, c), and those of the top plane that hold the top bits of their codes.

    Args:
        keys_ptr: int32 pointer to the key words; r, c: int32, broadcast against each other.

    Returns:
        (words, tops), int32; a top bit is where its field begins. Unless BITS is 3, tops are the words again.
    """
    WIDTH: tl.constexpr = D // tile.k_channel_blocks(D, BITS)
    words = tl.load(keys_ptr + r * WIDTH + c)
    if BITS != 3:
        return words, words
    tops = tl.load(keys_ptr + tile.top_index(D) + r // 2 * WIDTH + c)
    return words, tops >> (r % 2)


@triton.jit
def load_value_words(values_ptr, r, c, D: tl.constexpr, BITS: tl.constexpr):
    """Load the value words (r, c), and those of the top plane that hold the top bits; as `load_key_words`."""
    WIDTH: tl.constexpr = D // tile.v_channel_blocks(BITS)
    words = tl.load(values_ptr + tile.v_word_index(r, c, WIDTH))
    if BITS != 3:
        return words, words
    HALF: tl.constexpr = D // 8
    tops = tl.load(values_ptr + tile.top_index(D) + tile.v_word_index(r, c % HALF, HALF))
    return words, tops >> (c // HALF)


@triton.jit
def _field(words, tops, fields, BITS: tl.constexpr):
    """Return the codes of fields in the low bits of int32; higher bits are undefined."""
    shifts = tile.low_bits(BITS) * fields
    x = words >> shifts
    if BITS == 3:
        x = (x & 3) | (((tops >> shifts) & 1) << 2)
    return x


@triton.jit
def load_key_codes(words_ptr, first_token, TOKENS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Load the key codes of TOKENS consecutive tokens as float32 [TOKENS, D], each 1 + code / 2^BITS.

    Args:
        words_ptr: int32 pointer to the key words; first_token: a multiple of 4.
    """
    TB: tl.constexpr = tile.k_token_blocks(D, BITS)
    CB: tl.constexpr = tile.k_channel_blocks(D, BITS)
    r, c = tl.arange(0, TOKENS // TB) + first_token // TB, tl.arange(0, D // CB)
    words, tops = load_key_words(words_ptr, r[:, None], c[None, :], D, BITS)
    i, j = tl.arange(0, TB), tl.arange(0, CB)
    fields = tile.k_field(i[:, None], (j // 2)[None, :], (j % 2)[None, :], D, BITS)[None, :, None, :]  # [1, TB, 1, CB]
    x = _to_float(_field(words[:, None, :, None], tops[:, None, :, None], fields, BITS), BITS)
    return tl.reshape(x, [TOKENS, D])


@triton.jit
def load_value_codes(words_ptr, first_token, TOKENS: tl.constexpr, D: tl.constexpr, BITS: tl.constexpr):
    """Load the value codes of TOKENS consecutive tokens; as `load_key_codes`."""
    CB: tl.constexpr = tile.v_channel_blocks(BITS)
    r, c = tl.arange(0, TOKENS // 4) + first_token // 4, tl.arange(0, D // CB)
    words, tops = load_value_words(words_ptr, r[:, None], c[None, :], D, BITS)
    t, j = tl.arange(0, 4), tl.arange(0, CB)
    fields = tile.v_field((t // 2)[:, None], j[None, :], (t % 2)[:, None], BITS)[None, :, :, None]  # [1, 4, CB, 1]
    x = _to_float(_field(words[:, None, None, :], tops[:, None, None, :], fields, BITS), BITS)
    return tl.reshape(x, [TOKENS, D])


@triton.jit
def load_keys(
    record, first, TOKENS: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):
    """Return k_channel_scale * code + k_channel_zero of the tokens first .. first + TOKENS - 1 of a record.

    float16 [TOKENS, D], at most 2^9. What is left out is the scale that a product can take on as a factor of its
    result (keys: of the token, values: of the channel).
    """
    x = load_key_codes(record.to(tl.pointer_type(tl.int32)), first, TOKENS, D, K_BITS)
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    d = tl.arange(0, D)
    scale = tl.load(halves + tile.k_channel_scale_index(D) + d).to(tl.float32) * (1 << K_BITS)
    zero = tl.load(halves + tile.k_channel_zero_index(D) + d).to(tl.float32) - scale
    return (x * scale[None, :] + zero[None, :]).to(tl.float16)


@triton.jit
def load_values(
    record, first, TOKENS: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):
    """Return v_token_scale * code + v_token_zero of the tokens first .. of a record; as `load_keys`."""
    values = (record + tile.v_codes_offset(D, K_BITS)).to(tl.pointer_type(tl.int32))
    x = load_value_codes(values, first, TOKENS, D, V_BITS)
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    token = first + tl.arange(0, TOKENS)
    scale = tl.load(halves + tile.v_token_scale_index(D) + token).to(tl.float32) * (1 << V_BITS)
    zero = tl.load(halves + tile.v_token_zero_index(D) + token).to(tl.float32) - scale
    return (x * scale[:, None] + zero[:, None]).to(tl.float16)
