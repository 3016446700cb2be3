# SPDX-License-Identifier: Apache-2.0
"""Bugs of rotating, storing and encoding new tokens."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ENCODE,
    ENCODE_CU,
    ROTATE,
    STORE,
    TEST_DECODE,
    TEST_ENCODE,
    TEST_ENCODE_CUDA,
    TEST_EXTEND,
    TEST_ROTATE,
)

MUTATIONS = (
    Mutation(
        "the first half of 256 channels rotated twice",
        ROTATE,
        "rotated = rotate_block(x, signs_ptr, begin, D, COLS)",
        "rotated = rotate_block(x, signs_ptr, 0, D, COLS)",
        (TEST_ROTATE,),
    ),
    Mutation(
        "ring slot of the next position (kernel)",
        ROTATE,
        "mask=valid, other=1).to(tl.int64) - 1",
        "mask=valid, other=1).to(tl.int64)",
        (TEST_DECODE,),
    ),
    Mutation(
        "page encoded one token late (kernel)",
        ENCODE,
        "            if seq_len % G == 0:",
        "            if seq_len % G == 1:",
        (TEST_ENCODE, TEST_DECODE),
    ),
    Mutation(
        "top plane holds another bit (CUDA encode)",
        ENCODE_CU,
        "word |= code >> 2 <<",
        "word |= code >> 1 <<",
        (f"{TEST_ENCODE_CUDA}::test_bytes_from_the_ring_are_those_of_the_oracle",),
    ),
    Mutation(
        "ring modulo off by one (decode store)",
        ROTATE,
        "position % RING_LEN",
        "position % (RING_LEN - 1)",
        (TEST_DECODE,),
    ),
    Mutation(
        "ring modulo off by one (extend store)",
        STORE,
        "tl.maximum(position, 0) % RING_LEN",
        "tl.maximum(position, 0) % (RING_LEN - 1)",
        (f"{TEST_EXTEND}::test_extend_stores_the_same_bytes_as_the_torch_form",),
    ),
    Mutation(
        "first token of a record that of the second token (kernel)",
        ENCODE,
        "first = tl.arange(0, 1) + page * G",
        "first = tl.arange(0, 1) + page * G + 1",
        (TEST_ENCODE,),
    ),
    Mutation(
        "first token counted in the statistics (kernel)",
        ENCODE,
        "    valid = (g > 0)[:, None] & (d >= 0)[None, :]\n    codes, scale, zero, cross = quantise_side(",
        "    valid = (g >= 0)[:, None] & (d >= 0)[None, :]\n    codes, scale, zero, cross = quantise_side(",
        (TEST_ENCODE,),
    ),
    Mutation(
        "full pages of later requests in a large batch not encoded",
        ENCODE,
        "for request in range(begin, tl.minimum(begin + SLICES * BLOCK, batch_size), SLICES):",
        "for request in range(begin, tl.minimum(begin + SLICES, batch_size), SLICES):",
        (TEST_ENCODE,),
    ),
)
