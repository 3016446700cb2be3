# SPDX-License-Identifier: Apache-2.0
"""Bugs of the extend kernel, its launches and its warm-up."""

from __future__ import annotations

from .mutation import Mutation
from .paths import EXTEND, LAUNCH, TEST_EXTEND, TEST_LAUNCH, TEST_POSITION_RULE, TEST_RING, TEST_WARM_UP, WARM_UP

MUTATIONS = (
    Mutation(
        "exact start ignored (extend kernel)",
        EXTEND,
        "exact_page_of(start, exact_start, WINDOW, G, SLIDING)",
        "exact_page_of(start, 0, WINDOW, G, SLIDING)",
        (TEST_EXTEND,),
    ),
    Mutation(
        "first token of a tile attended twice (extend kernel)",
        EXTEND,
        "(first + y > 0)[None, :]",
        "(first + y >= 0)[None, :]",
        (TEST_EXTEND,),
    ),
    Mutation(
        "first tokens of KV head 0 for every head (extend kernel)",
        EXTEND,
        "k_ptrs = firsts_ptr + (page_ids * HK + head) * (RECORD // 2) + FIRST",
        "k_ptrs = firsts_ptr + page_ids * HK * (RECORD // 2) + FIRST",
        (TEST_EXTEND,),
    ),
    Mutation(
        "first token of a chunk taken from the ring (extend kernel)",
        EXTEND,
        "in_ring = j < prefix_len",
        "in_ring = j <= prefix_len",
        (TEST_EXTEND,),
    ),
    Mutation(
        "ring of the first request for every request (extend kernel)",
        EXTEND,
        "ring_ptr = ring_pages_ptr + b * RING_PAGES",
        "ring_ptr = ring_pages_ptr",
        (f"{TEST_RING}::test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them",),
    ),
    Mutation(
        "key of a ring token read as its value (extend kernel)",
        EXTEND,
        "tl.where(in_ring, ring_k_ptrs + D, ",
        "tl.where(in_ring, ring_k_ptrs, ",
        (f"{TEST_RING}::test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them",),
    ),
    Mutation(
        "a page between two splits of an extend step read by neither",
        EXTEND,
        "pages * (split + 1) // splits",
        "pages * (split + 1) // splits - (split < splits - 1)",
        (TEST_EXTEND,),
    ),
    Mutation(
        "exact keys attended by every split of an extend step",
        EXTEND,
        "exact_begin = tl.where(split == splits - 1, exact_begin, end)",
        "exact_begin = tl.where(split < splits, exact_begin, end)",
        (TEST_EXTEND,),
    ),
    Mutation(
        "extend steps of a canonical preset split",
        EXTEND,
        "    if config.fixed_order:\n        return 1\n",
        "",
        (f"{TEST_EXTEND}::test_splits_fill_the_device_but_for_canonical_presets",),
    ),
    Mutation(
        "a kernel of short turns built in the first request",
        WARM_UP,
        "for new in (1, -(-merge.FEW_ROWS // shape.num_qo_heads))",
        "for new in (-(-merge.FEW_ROWS // shape.num_qo_heads),)",
        (TEST_WARM_UP,),
    ),
    Mutation(
        "unaligned tensor launched as an aligned one",
        LAUNCH,
        "x.data_ptr() & 15",
        "0",
        (TEST_LAUNCH,),
    ),
    Mutation(
        "own key not attended (extend kernel)",
        EXTEND,
        "seen = j[None, :] <= position[:, None]",
        "seen = (j[None, :] < position[:, None]) | (j[None, :] == 0)",
        (TEST_EXTEND,),
    ),
    Mutation(
        "tile of queries begins with the chunk (extend kernel)",
        EXTEND,
        "start = (prefix_len // BLOCK_Q + num_tiles - 1 - tl.program_id(0) // splits) * BLOCK_Q",
        "start = prefix_len + (num_tiles - 1 - tl.program_id(0) // splits) * BLOCK_Q",
        (TEST_POSITION_RULE,),
    ),
)
