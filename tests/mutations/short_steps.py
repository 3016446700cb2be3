# SPDX-License-Identifier: Apache-2.0
"""Bugs of the kernels of short extend steps and of steps that verify many drafts."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ATTEND_ROWS,
    ATTENTION,
    EXTEND_CHOICE,
    EXTEND_SM90,
    FINISH_SHORT,
    OPERANDS,
    RING_ROW,
    TEST_ATTENTION,
    TEST_EXTEND_SM90,
    TEST_FINISH_SHORT,
    TEST_VERIFY_SM90,
    VERIFY_SM90,
)

_LENGTHS = (f"{TEST_EXTEND_SM90}::test_requests_of_any_length_are_attended_together",)
_LATE = (f"{TEST_EXTEND_SM90}::test_records_may_land_late_and_warps_stand_still",)
_ROTATED = (f"{TEST_EXTEND_SM90}::test_new_tokens_are_not_read_before_they_are_rotated",)
_MERGED = (f"{TEST_FINISH_SHORT}::test_splits_are_merged_and_rings_get_the_newest_tokens",)
_MAGNITUDES = (f"{TEST_EXTEND_SM90}::test_scores_and_values_of_any_magnitude_are_attended",)
_VERIFIED = (f"{TEST_VERIFY_SM90}::test_drafts_match_the_oracle_in_every_form",)
_ENCODED = f"{TEST_ATTENTION}::test_the_kernel_of_short_steps_reads_no_page_that_they_encode"

MUTATIONS = (
    Mutation(
        "addresses of exact tokens overwritten while they are read (extend)",
        ATTEND_ROWS,
        "        sync_group(1 + writes_values);  // those of the tile before are read no more\n",
        "",
        (f"{TEST_VERIFY_SM90}::test_records_may_land_late_and_warps_stand_still",),
    ),
    Mutation(
        "new tokens read before they are rotated (extend)",
        ATTEND_ROWS,
        "  work.wait_for_inputs();\n",
        "",
        _ROTATED,
    ),
    Mutation(
        "results merged before they are there (extend)",
        FINISH_SHORT,
        "  wait_for_previous();\n",
        "",
        (f"{TEST_FINISH_SHORT}::test_it_waits_for_the_attention_that_it_starts_beside",),
    ),
    Mutation(
        "sinks of another base (extend)",
        FINISH_SHORT,
        "const float log2_e = 1.4426950408889634f;",
        "const float log2_e = 1.f;",
        _MERGED,
    ),
    Mutation(
        "splits beyond the first four left out (extend)",
        FINISH_SHORT,
        "begin < splits; begin += LOADS",
        "begin < min(splits, LOADS); begin += LOADS",
        _MERGED,
    ),
    Mutation(
        "the oldest new tokens kept in the ring",
        RING_ROW,
        "position = seq_lens[request] - 1 - back;",
        "position = prefix_len + back;",
        _MERGED,
    ),
    Mutation(
        "operands not fenced before products read them (extend)",
        ATTEND_ROWS,
        "      fence_stores();\n      tell(written, n);\n",
        "      tell(written, n);\n",
        _LENGTHS,
    ),
    Mutation(
        "operands written while products read them (extend)",
        ATTEND_ROWS,
        "      if (n >= BUFFERS) wait_use(read, n - BUFFERS);\n",
        "",
        _LATE,
    ),
    Mutation(
        "keys multiplied before they are written (extend)",
        ATTEND_ROWS,
        "    wait_use(shared.keys_written, n);\n    order_scores(n);\n",
        "    order_scores(n);\n",
        _LATE,
    ),
    Mutation(
        "values multiplied before they are written (extend)",
        ATTEND_ROWS,
        "    wait_use(shared.values_written, n);\n",
        "",
        _LATE,
    ),
    Mutation(
        "next record ordered into a buffer that is still read (extend)",
        ATTEND_ROWS,
        "        mbarrier_wait(&shared.left[next % STAGES], (number - 1) / STAGES & 1);\n",
        "",
        _LATE,
    ),
    Mutation(
        "values said to be read before they are (extend)",
        ATTEND_ROWS,
        "    wait_products<0>();\n    arrived(s);\n    weigh(n);\n    to_operand();\n    order_sums(n);\n"
        "    wait_products<0>();\n    arrived(o);\n    tell(shared.values_read, n);\n",
        "    tell(shared.values_read, n);\n    wait_products<0>();\n    arrived(s);\n    weigh(n);\n    to_operand();\n"
        "    order_sums(n);\n    wait_products<0>();\n    arrived(o);\n",
        _LATE,
    ),
    Mutation(
        "sums not scaled where the maximum is raised (extend)",
        ATTEND_ROWS,
        "{mine.alpha[0] * less, mine.alpha[1] * less}",
        "{less, less}",
        _MAGNITUDES,
    ),
    Mutation(
        "sums not scaled where values grow (extend)",
        ATTEND_ROWS,
        "{mine.alpha[0] * less, mine.alpha[1] * less}",
        "{mine.alpha[0], mine.alpha[1]}",
        _MAGNITUDES,
    ),
    Mutation(
        "power of two of values not raised (extend)",
        ATTEND_ROWS,
        "} else if (own >= exponent + 6) {",
        "} else if (own >= exponent + 60) {",
        _MAGNITUDES,
    ),
    Mutation(
        "first key read from its codes (extend)",
        OPERANDS,
        "  if (part == 0 && first == 0) {\n",
        "  if (false) {\n",
        _LENGTHS,
    ),
    Mutation(
        "first value read from its codes (extend)",
        OPERANDS,
        "  if (part == 0 && first == 0 && half == 0)\n",
        "  if (false)\n",
        _LENGTHS,
    ),
    Mutation(
        "exact start ignored (extend)",
        ATTEND_ROWS,
        "max(position / G - WINDOW, exact_start / G)",
        "max(position / G - WINDOW, 0)",
        _LENGTHS,
    ),
    Mutation(
        "a unit left out between splits (extend)",
        EXTEND_SM90,
        "end_unit = units * (work.split + 1) / splits;",
        "end_unit = (units * (work.split + 1) - 1) / splits;",
        _LENGTHS,
    ),
    Mutation(
        "a token sees those after it (extend)",
        ATTEND_ROWS,
        "positions[h] + 1 - page * G : 0)",
        "positions[h] + 2 - page * G : 0)",
        _LENGTHS,
    ),
    Mutation(
        "a page read twice by rows beside those that read it otherwise (extend)",
        ATTEND_ROWS,
        "const bool reads = is_record == page < exact_page(positions[h], work.exact_start);",
        "const bool reads = true;",
        _LENGTHS,
    ),
    Mutation(
        "exact tokens read from the wrong page of the ring (extend)",
        ATTEND_ROWS,
        "ring_pages[position / RING_TOKENS % RING_PAGES]",
        "ring_pages[(position / RING_TOKENS + 1) % RING_PAGES]",
        _LENGTHS,
    ),
    Mutation(
        "what a step encodes read as a record beside the encoder",
        EXTEND_CHOICE,
        "    return is_small and extend_sm90.serves_step(batch, config)\n",
        "    return is_small\n",
        (_ENCODED,),
    ),
    Mutation(
        "drafts attended by the kernel of fewer columns (verify)",
        ATTENTION,
        "(verify_sm90, columns_sm90):",
        "(columns_sm90,):",
        (TEST_ATTENTION,),
    ),
    Mutation(
        "rows of a draft at the position of the draft before (verify)",
        VERIFY_SM90,
        "return position + (first_column + min(row, rows - 1)) / GROUP;",
        "return position + max((first_column + min(row, rows - 1)) / GROUP - 1, 0);",
        _VERIFIED,
    ),
    Mutation(
        "a second block of rows attends those of the first (verify)",
        VERIFY_SM90,
        "    const int c = first_column + row;\n",
        "    const int c = row;\n",
        _VERIFIED,
    ),
    Mutation(
        "the last exact page of a block read by another split, too (verify)",
        VERIFY_SM90,
        "(max(unit - record_units, 0) + EXACT_UNITS - 1) / EXACT_UNITS;",
        "max(unit - record_units, 0) / EXACT_UNITS;",
        (f"{TEST_VERIFY_SM90}::test_drafts_of_many_pages_in_many_splits_and_padded_requests",),
    ),
    Mutation(
        "exact tokens read from the wrong page of the ring (verify)",
        ATTEND_ROWS,
        "ring_pages[position / RING_TOKENS % RING_PAGES]",
        "ring_pages[(position / RING_TOKENS + 1) % RING_PAGES]",
        _VERIFIED,
    ),
)
