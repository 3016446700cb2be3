# SPDX-License-Identifier: Apache-2.0
"""Bugs of rotating, storing and encoding new tokens."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    CHUNK_CUDA,
    ENCODE,
    ENCODE_CU,
    HADAMARD_CUH,
    RING,
    RING_ROW,
    ROTATE,
    ROTATE_CU,
    STORE,
    TEST_DECODE,
    TEST_ENCODE,
    TEST_ENCODE_CUDA,
    TEST_EXTEND,
    TEST_RING,
    TEST_ROTATE,
    TEST_STORE,
)

_ROTATED = (f"{TEST_ROTATE}::test_rotate_chunk_matches_the_oracle",)
_STORED = (TEST_STORE,)

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
        "position = tl.load(seq_lens_ptr + request) - 1",
        "position = tl.load(seq_lens_ptr + request)",
        (TEST_ROTATE,),
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
        "last place of a ring page left out (kernels)",
        RING,
        "position % TOKENS * (2 * D)",
        "position % (TOKENS - 1) * (2 * D)",
        (f"{TEST_RING}::test_ring_ptrs_are_where_counting_says",),
    ),
    Mutation(
        "ring goes on in the pages of the next request (kernels)",
        RING,
        "position // TOKENS % RING_PAGES",
        "position // TOKENS",
        (f"{TEST_RING}::test_ring_ptrs_are_where_counting_says",),
    ),
    Mutation(
        "ring goes on in the pages of the next request (CUDA encode)",
        ENCODE_CU,
        "position / RING_TOKENS % RING_PAGES",
        "position / RING_TOKENS",
        (f"{TEST_ENCODE_CUDA}::test_tokens_of_a_ring_are_where_counting_says",),
    ),
    Mutation(
        "last place of a ring page left out (CUDA encode)",
        ENCODE_CU,
        "position % RING_TOKENS * (2 * D)",
        "position % (RING_TOKENS - 1) * (2 * D)",
        (f"{TEST_ENCODE_CUDA}::test_tokens_of_a_ring_are_where_counting_says",),
    ),
    Mutation(
        "tokens that the ring has no place for stored over its newest",
        STORE,
        "(position >= prefix_len) & (back < RING_LEN)",
        "position >= prefix_len",
        (f"{TEST_RING}::test_extend_writes_its_tokens_and_the_pages_that_they_fill_and_nothing_else",),
    ),
    Mutation(
        "key and value of a ring token swapped (extend store)",
        STORE,
        "    tl.store(target, tl.load(k_ptr + source, mask=mask, other=0.0), mask=mask)\n"
        "    tl.store(target + D, tl.load(v_ptr",
        "    tl.store(target + D, tl.load(k_ptr + source, mask=mask, other=0.0), mask=mask)\n"
        "    tl.store(target, tl.load(v_ptr",
        (f"{TEST_EXTEND}::test_extend_stores_the_same_bytes_as_the_torch_form",),
    ),
    Mutation(
        "value of a ring token stored over its key (decode store)",
        ROTATE,
        "stride_v_token, stride_v_head, HK, D, K_BITS, V_BITS, RING_PAGES, D, BLOCK",
        "stride_v_token, stride_v_head, HK, D, K_BITS, V_BITS, RING_PAGES, 0, BLOCK",
        (f"{TEST_RING}::test_ring_ptrs_are_where_counting_says",),
    ),
    Mutation(
        "values of a page encoded from its keys (kernel)",
        ENCODE,
        "record, ring + D, chunk_v_ptr",
        "record, ring, chunk_v_ptr",
        (TEST_ENCODE,),
    ),
    Mutation(
        "values of a page encoded from its keys (CUDA encode)",
        ENCODE_CU,
        "    source.records += 2 * D;\n",
        "",
        (f"{TEST_ENCODE_CUDA}::test_bytes_from_the_ring_are_those_of_the_oracle",),
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
    Mutation(
        "values rotated with the strides of the keys (CUDA)",
        ROTATE_CU,
        "token * stride_v_token + head * stride_v_head",
        "token * stride_k_token + head * stride_v_head",
        _ROTATED,
    ),
    Mutation(
        "the last lane bit left out of the rotation of a row (CUDA)",
        HADAMARD_CUH,
        "bit < 32; bit *= 2",
        "bit < 16; bit *= 2",
        _ROTATED,
    ),
    Mutation(
        "as many rows of the query rotated as there are keys (CUDA)",
        CHUNK_CUDA,
        "(max(num_qo_heads, num_kv_heads) if with_q else num_kv_heads)",
        "num_kv_heads",
        _ROTATED,
    ),
    Mutation(
        "token of a chunk stored that its ring has no room for (CUDA)",
        RING_ROW,
        " || back >= RING_PAGES * RING_TOKENS",
        "",
        _STORED,
    ),
    Mutation(
        "token before the chunk stored (CUDA)",
        RING_ROW,
        "position < prefix_len || ",
        "position < prefix_len - 1 || ",
        _STORED,
    ),
    Mutation(
        "chunk of the second request stored from the first's tokens (CUDA)",
        RING_ROW,
        "(qo_indptr[request] + position - prefix_len)",
        "(position - prefix_len)",
        _STORED,
    ),
    Mutation(
        "values stored where the keys are (CUDA)",
        RING_ROW,
        "to[ROW_WORDS + n] = v[row + n];",
        "to[n] = v[row + n];",
        _STORED,
    ),
)
