# SPDX-License-Identifier: Apache-2.0
"""The tile record: the only place that knows a byte offset or a bit position.

A record holds one page of one KV head: G = 128 tokens, D channels, keys and values, in the rotated frame. Sections,
in this order, little endian, every section a multiple of 16 bytes:

    section           type     shape                    contents
    k_codes           int32    [G / TB, D / CB]         key codes, kb bits; kb = 3: 2 bits, then 1 bit
    v_codes           int32    [G / 16, D / CB / 4, 4, 4]   value codes, vb bits, likewise
    k_channel_scale   fp16     [D]
    k_channel_zero    fp16     [D]
    v_channel_scale   fp16     [D]
    k_token_scale     fp16     [G]
    v_token_scale     fp16     [G]
    v_token_zero      fp16     [G]
    k_first           16 bit   [D]                      token 0, exact, in the dtype that the header names
    v_first           16 bit   [D]

    K[t, d] = (k_channel_scale[d] * c + k_channel_zero[d]) * k_token_scale[t]
    V[t, d] = (v_token_scale[t] * c + v_token_zero[t]) * v_channel_scale[d]

A word of b-bit codes holds a patch of TB tokens x CB channels in F = 32 / b fields, field n at bit b * n. The fields
of the low half and of the high half are neighbours h = 0, 1 along the dimension that a matrix instruction sums over
(channels for keys, tokens for values), so (word >> s) & mask is a pair of operands in one register:

    keys     word (r, c), field h F/2 + i CB/2 + j:  token TB r + i,     channel CB c + 2 j + h
    values   word (r, c), field h F/2 + i CB + j:    token 4 r + 2 i + h,  channel c + (D / CB) j

Key words are stored row by row. Value words are stored in blocks of 4 x 4 (the 4 words of a row are 16 bytes), so
that the 32 lanes of a warp, lane 4 g + q on row q and words 4 g .. 4 g + 3, read 512 consecutive bytes.

Codes of 3 bits are stored as two planes: the low 2 bits of every code in the layout of 2 bits, then the top bits, two
words of 2-bit fields in one. The first of the two has its top bits where its fields begin, the second one bit higher:

    keys     words (r, c) of both parities of r in word (r / 2, c)
    values   words (r, c) and (r, c + D / 8) in word (r, c) of D / 8 words a row

The codes of token 0 are zero, except that the lowest 4 bits of the record (of key word (0, 0), which belong to
token 0 in every layout) are the header: `HEADER` | dtype of the first tokens. A page that was never encoded has no
header, which tests rely on. Readers take token 0 from k_first and v_first and ignore its codes.

A page of the pool that belongs to the ring of a request (`ring`) holds exact tokens instead, for each KV head where its
record would be: key [D] and value [D] of one token after the other, rotated, in the model's dtype.

Example, D = 128, k4v2: k_codes [128, 16] at 0, v_codes [8, 8, 4, 4] at 8,192, k_channel_scale at 12,288, k_first at
13,824, size 14,336 = 112 bytes per token.
"""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  (the interpreter looks for it beside a jit function)

# tokens of a tile, and of SGLang's page: the only place that says so
TILE_SIZE = 128
# of the bytes above and of what they mean; a record of another version is not to be read
VERSION = 1
HEADER = 0x2
HEADER_BF16 = 0x01


@triton.constexpr_function
def header(is_bf16):
    """Return the lowest 4 bits of a record: encoded, and the dtype of its first token (bfloat16 or float16)."""
    return HEADER | (HEADER_BF16 if is_bf16 else 0)


@triton.constexpr_function
def low_bits(bits):
    """Return the bits of a field: those of a code, the low ones of a 3-bit code."""
    return 2 if bits == 3 else bits


@triton.constexpr_function
def k_channel_blocks(head_dim, bits):
    """Return CB of the key codes: at least 16 channels a block, the depth of a matrix instruction."""
    return min(32 // low_bits(bits), head_dim // 16)


@triton.constexpr_function
def k_token_blocks(head_dim, bits):
    """Return TB of the key codes."""
    return 32 // low_bits(bits) // k_channel_blocks(head_dim, bits)


@triton.constexpr_function
def v_channel_blocks(bits):
    """Return CB of the value codes."""
    return 8 // low_bits(bits)


@triton.jit
def k_field(i, j, h, D, BITS):
    """Return the field of key codes at token i of a patch and channel 2 j + h of it."""
    return h * (16 // low_bits(BITS)) + i * (k_channel_blocks(D, BITS) // 2) + j


@triton.jit
def v_field(i, j, h, BITS):
    """Return the field of value codes at token 2 i + h of a patch and channel block j."""
    return h * (16 // low_bits(BITS)) + i * v_channel_blocks(BITS) + j


@triton.jit
def v_word_index(r, c, WIDTH):
    """Return where the value word (r, c) of a matrix of WIDTH words a row is stored."""
    return (r // 4) * (4 * WIDTH) + (c // 4) * 16 + (r % 4) * 4 + c % 4


@triton.constexpr_function
def v_codes_offset(head_dim, k_bits):
    """Return the byte offset of the value codes (the key codes are at 0)."""
    return TILE_SIZE * head_dim * k_bits // 8


@triton.constexpr_function
def top_index(head_dim):
    """Return the index of the first word of the top plane of 3-bit codes, in words after those codes begin."""
    return TILE_SIZE * head_dim * 2 // 32


@triton.constexpr_function
def scales_offset(head_dim, k_bits, v_bits):
    """Return the byte offset of the fp16 sections, which follow the codes."""
    return TILE_SIZE * head_dim * (k_bits + v_bits) // 8


@triton.constexpr_function
def k_channel_scale_index(head_dim):
    """Return the index of k_channel_scale[0], in 16-bit elements after `scales_offset`; likewise below."""
    return 0


@triton.constexpr_function
def k_channel_zero_index(head_dim):
    return head_dim


@triton.constexpr_function
def v_channel_scale_index(head_dim):
    return 2 * head_dim


@triton.constexpr_function
def k_token_scale_index(head_dim):
    return 3 * head_dim


@triton.constexpr_function
def v_token_scale_index(head_dim):
    return 3 * head_dim + TILE_SIZE


@triton.constexpr_function
def v_token_zero_index(head_dim):
    return 3 * head_dim + 2 * TILE_SIZE


@triton.constexpr_function
def k_first_index(head_dim):
    return 3 * head_dim + 3 * TILE_SIZE


@triton.constexpr_function
def v_first_index(head_dim):
    return 4 * head_dim + 3 * TILE_SIZE


@triton.constexpr_function
def record_bytes(head_dim, k_bits, v_bits):
    """Return the size of a record in bytes: D * G * (kb + vb) / 8 + 6 D + 6 G + 4 D."""
    return TILE_SIZE * head_dim * (k_bits + v_bits) // 8 + 2 * (5 * head_dim + 3 * TILE_SIZE)


@triton.constexpr_function
def exact_tokens(head_dim, k_bits, v_bits, itemsize):
    """Return how many exact tokens of a KV head fit in the bytes of its record; 28 for k4v2 at head_dim 128."""
    return record_bytes(head_dim, k_bits, v_bits) // (2 * head_dim * itemsize)
