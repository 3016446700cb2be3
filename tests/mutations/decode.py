# SPDX-License-Identifier: Apache-2.0
"""Bugs of the decode kernels."""

from __future__ import annotations

from .mutation import Mutation
from .paths import ATTEND, DECODE, DECODE_SM90, TEST_DECODE, TEST_DECODE_SM90

MUTATIONS = (
    Mutation(
        "ring of the batch index, not of the row",
        DECODE,
        "row = tl.load(rows_ptr + b)",
        "row = b",
        (TEST_DECODE,),
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
        "exact_page, G), position + 1)",
        "exact_page, G), position)",
        (TEST_DECODE,),
    ),
)
