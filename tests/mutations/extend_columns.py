# SPDX-License-Identifier: Apache-2.0
"""Bugs of the extend kernel of many columns."""

from __future__ import annotations

from .mutation import Mutation
from .paths import EXTEND, EXTEND_SM90, TEST_EXTEND_SM90

_LENGTHS = (f"{TEST_EXTEND_SM90}::test_requests_of_any_length_are_attended_together",)
_LATE = (f"{TEST_EXTEND_SM90}::test_records_may_land_late_and_warps_stand_still",)
_MAGNITUDES = (f"{TEST_EXTEND_SM90}::test_scores_and_values_of_any_magnitude_are_attended",)
_STEP = (f"{TEST_EXTEND_SM90}::test_a_step_joins_this_part_with_the_rest",)

MUTATIONS = (
    Mutation(
        "weights not fenced before products read them (extend)",
        EXTEND_SM90,
        "      fence_stores();\n      exceeds = vote(",
        "      exceeds = vote(",
        _LENGTHS,
    ),
    Mutation(
        "buffer of weights written while products read it (extend)",
        EXTEND_SM90,
        "      if (h >= WEIGHT_BUFFERS) mbarrier_wait(",
        "      if (false) mbarrier_wait(",
        _LATE,
    ),
    Mutation(
        "weights multiplied before they are ready (extend)",
        EXTEND_SM90,
        "        mbarrier_wait(&shared.ready[buffer], h / WEIGHT_BUFFERS & 1);\n",
        "",
        _LATE,
    ),
    Mutation(
        "next record ordered into a buffer that is still read (extend)",
        EXTEND_SM90,
        "      sync_group(SUMMING);\n",
        "",
        _LATE,
    ),
    Mutation(
        "weights said to be taken while their products are on their way (extend)",
        EXTEND_SM90,
        "arrive(&shared.taken[(h - 1) % WEIGHT_BUFFERS]);",
        "arrive(&shared.taken[h % WEIGHT_BUFFERS]);",
        (TEST_EXTEND_SM90,),
    ),
    Mutation(
        "sums not scaled where the maximum is raised (extend)",
        EXTEND_SM90,
        "o[k][i] *= shared.alpha[buffer][8 * (i / 4) + 2 * q + i % 2];",
        "o[k][i] *= 1.f;",
        _MAGNITUDES,
    ),
    Mutation(
        "sums not scaled where values grow (extend)",
        EXTEND_SM90,
        "o[k][i] *= less;",
        "o[k][i] *= 1.f;",
        _MAGNITUDES,
    ),
    Mutation(
        "power of two of values not raised (extend)",
        EXTEND_SM90,
        "own >= e + 6)) return 1.f;",
        "own >= e + 60)) return 1.f;",
        _MAGNITUDES,
    ),
    Mutation(
        "first keys not divided by the scale of their page (extend)",
        EXTEND_SM90,
        "factor = __int_as_float(0x7F000000 - __float_as_int(scale));",
        "factor = 1.f;",
        _MAGNITUDES,
    ),
    Mutation(
        "first value read from its codes (extend)",
        EXTEND_SM90,
        "    if (m == 0 && q == 0)\n",
        "    if (false)\n",
        _LENGTHS,
    ),
    Mutation(
        "exact start ignored by the part of many columns",
        EXTEND_SM90,
        "max(page - WINDOW, exact_starts[b] / G)",
        "max(page - WINDOW, 0)",
        _LENGTHS,
    ),
    Mutation(
        "a page of many columns left out between splits (extend)",
        EXTEND_SM90,
        "end = pages * (split + 1) / splits;",
        "end = (pages * (split + 1) - 1) / splits;",
        _LENGTHS,
    ),
    Mutation(
        "the rest begins behind the window of a hit (extend)",
        EXTEND,
        "exact_page_of(prefix_len, exact_start, WINDOW, G)",
        "exact_page_of(prefix_len, 0, WINDOW, G)",
        _STEP,
    ),
)
