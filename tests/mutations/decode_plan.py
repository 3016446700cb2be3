# SPDX-License-Identifier: Apache-2.0
"""Bugs of the plan of a decode step and the merge of its splits."""

from __future__ import annotations

from .mutation import Mutation
from .paths import DECODE_PLAN, MERGE, TEST_DECODE, TEST_DECODE_PLAN, TEST_KNOWN_KERNELS

MUTATIONS = (
    Mutation(
        "the first half of 256 channels merged twice",
        MERGE,
        "unrotate(x, signs_ptr, column, D, COLS)",
        "unrotate(x, signs_ptr, 0, D, COLS)",
        (TEST_DECODE,),
    ),
    Mutation(
        "window one page too long (decode kernel)",
        DECODE_PLAN,
        "tl.maximum(page - WINDOW, exact_start // G)",
        "tl.maximum(page - WINDOW - 1, exact_start // G)",
        (TEST_DECODE,),
    ),
    Mutation(
        "splits beyond the last one weighed",
        MERGE,
        'lse = tl.load(partial_lse_ptr + at, mask=exists, other=float("-inf"))',
        "lse = tl.load(partial_lse_ptr + at, mask=exists, other=0.0)",
        (TEST_KNOWN_KERNELS,),
    ),
    Mutation(
        "last split of a request not merged",
        MERGE,
        "mask=valid, other=0) - begin",
        "mask=valid, other=0) - begin - 1",
        (TEST_KNOWN_KERNELS,),
    ),
    Mutation(
        "split buffer sized for the largest batch only",
        DECODE_PLAN,
        "splits, heads, head_dim = max(most), ",
        "splits, heads, head_dim = most[-1], ",
        (f"{TEST_KNOWN_KERNELS}::test_decode_writes_nothing_behind_the_split_buffer",),
    ),
    Mutation(
        "more splits planned than the workspace holds",
        DECODE_PLAN,
        "tl.minimum(_wanted_splits(tl.sum(units, 0), batch_size, PROGRAMS, RESIDENT), most)",
        "tl.minimum(_wanted_splits(tl.sum(units, 0), batch_size, PROGRAMS, RESIDENT), most + 10)",
        (TEST_DECODE_PLAN,),
    ),
    Mutation(
        "waves chosen by the sum of a step instead of its mean",
        DECODE_PLAN,
        "tl.maximum(batch_size * per_request, 1)",
        "tl.maximum(per_request, 1)",
        (TEST_DECODE_PLAN,),
    ),
    Mutation(
        "splits of a fixed order planned by the batch",
        DECODE_PLAN,
        "return FIXED_SPLIT_UNITS if config.fixed_order else 0",
        "return 0",
        (f"{TEST_DECODE}::test_decode_of_canonical_presets_is_the_same_bits_at_any_batch_size",),
    ),
    Mutation(
        "splits of a fixed order one too few",
        DECODE_PLAN,
        "return batch_size * triton.cdiv(max_units(max_pages, config), FIXED_SPLIT_UNITS)",
        "return batch_size * (max_units(max_pages, config) // FIXED_SPLIT_UNITS)",
        (TEST_DECODE_PLAN,),
    ),
    Mutation(
        "ring chunk shared by two splits left out",
        DECODE_PLAN,
        "(tl.maximum(unit - record_units, 0) + RING_UNITS - 1) // RING_UNITS * RING_CHUNK",
        "(tl.maximum(unit - record_units, 0) + RING_UNITS - 1) // RING_UNITS * (RING_CHUNK - 1)",
        (TEST_DECODE,),
    ),
)
