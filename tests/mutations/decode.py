# SPDX-License-Identifier: Apache-2.0
"""Bugs of the decode kernels."""

from __future__ import annotations

from .mutation import Mutation
from .paths import ATTEND, DECODE, DECODE_SM90, SPLIT, TEST_DECODE, TEST_DECODE_SM90, TEST_RING

MUTATIONS = (
    Mutation(
        "ring of the first request for every request (decode kernel)",
        DECODE,
        "ring_ptr = ring_pages_ptr + b * DRAFTS * RING_PAGES",
        "ring_ptr = ring_pages_ptr",
        (f"{TEST_RING}::test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them",),
    ),
    Mutation(
        "key and value of a ring token swapped (decode kernel)",
        DECODE,
        "row_scale, k_ptrs, k_ptrs + D, exists, seen",
        "row_scale, k_ptrs + D, k_ptrs, exists, seen",
        (TEST_DECODE,),
    ),
    Mutation(
        "ring of the first request for every request (CUDA decode)",
        SPLIT,
        "  ring_pages += b * DRAFTS * RING_PAGES;\n",
        "",
        (f"{TEST_DECODE_SM90}::test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them",),
    ),
    Mutation(
        "ring goes on in a page of the next request (CUDA decode)",
        DECODE_SM90,
        "first / RING_TOKENS % RING_PAGES",
        "first / RING_TOKENS % (RING_PAGES + 1)",
        (f"{TEST_DECODE_SM90}::test_rings_in_any_round_match_the_oracle",),
    ),
    Mutation(
        "last place of a ring page left out (CUDA decode)",
        DECODE_SM90,
        "to = min(ring_end, first + RING_TOKENS);",
        "to = min(ring_end, first + RING_TOKENS - 1);",
        (f"{TEST_DECODE_SM90}::test_rings_in_any_round_match_the_oracle",),
    ),
    Mutation(
        "key of a ring token read as its value (CUDA decode)",
        DECODE_SM90,
        "        v = k + 2 * D;\n        return start + i < to;",
        "        v = k;\n        return start + i < to;",
        (f"{TEST_DECODE_SM90}::test_rings_in_any_round_match_the_oracle",),
    ),
    Mutation(
        "a split that begins in a ring page takes the page's first tokens (CUDA decode)",
        DECODE_SM90,
        "skipped = (from - first) * (4 * D);",
        "skipped = 0 * (from - first);",
        (f"{TEST_DECODE_SM90}::test_rings_in_any_round_match_the_oracle",),
    ),
    Mutation(
        "tokens of a ring page that another split attends (CUDA decode)",
        DECODE_SM90,
        "from = max(ring_begin, first);",
        "from = max(0, first);",
        (f"{TEST_DECODE_SM90}::test_rings_in_any_round_match_the_oracle",),
    ),
    Mutation(
        "ring pages ordered into the buffers of records that are still read (CUDA decode)",
        DECODE_SM90,
        "if (n < arrivals) order(n);",
        "for (int m = n; m < arrivals; m += BUFFERS) order(m);",
        (TEST_DECODE_SM90,),
    ),
    Mutation(
        "first token of a tile attended twice (decode kernel)",
        ATTEND,
        "(t > 0)[None, :]",
        "(t >= 0)[None, :]",
        (TEST_DECODE,),
    ),
    Mutation(
        "record of KV head 0 for every head (decode kernel)",
        DECODE,
        "record = records_ptr + (page_id * HK + head) * RECORD",
        "record = records_ptr + page_id * HK * RECORD",
        (TEST_DECODE,),
    ),
    Mutation(
        "splits of equal size leave the last units out",
        DECODE,
        "per_split = tl.cdiv(units, tl.load(indptr_ptr + b + 1) - first)",
        "per_split = tl.maximum(units // (tl.load(indptr_ptr + b + 1) - first), 1)",
        (TEST_DECODE,),
    ),
    Mutation(
        "top bits of the upper channels read as those of the lower ones (CUDA decode)",
        DECODE_SM90,
        "tops[t][k] >>= is_upper;",
        "tops[t][k] >>= 0 * is_upper;",
        (f"{TEST_DECODE_SM90}::test_every_form_matches_the_oracle",),
    ),
    Mutation(
        "teams of warps share their record buffers (CUDA decode)",
        DECODE_SM90,
        "const int buffer = team * STAGES + stage;",
        "const int buffer = stage;",
        (TEST_DECODE_SM90,),
    ),
    Mutation(
        "next record ordered by the first warp that leaves a buffer (CUDA decode)",
        DECODE_SM90,
        "% TILE_WARPS == TILE_WARPS - 1",
        "% TILE_WARPS == 0",
        (TEST_DECODE_SM90,),
    ),
    Mutation(
        "newest key not attended (decode kernel)",
        DECODE,
        "first_exact, G), position + last_draft + 1)",
        "first_exact, G), position + last_draft)",
        (TEST_DECODE,),
    ),
)
