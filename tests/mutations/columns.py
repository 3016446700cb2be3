# SPDX-License-Identifier: Apache-2.0
"""Bugs of the decode kernel of many columns."""

from __future__ import annotations

from .mutation import Mutation
from .paths import ATTENTION, CODE_WORDS, COLUMNS_SM90, TEST_ATTENTION, TEST_COLUMNS

_FORMS = (f"{TEST_COLUMNS}::test_drafts_match_the_oracle_in_every_form",)
_LATE = (f"{TEST_COLUMNS}::test_records_may_land_late_and_warps_stand_still",)

MUTATIONS = (
    Mutation(
        "folded queries not fenced before products read them",
        COLUMNS_SM90,
        "  for (int n = 0; n < num_records; n++) {\n    fence_stores();\n",
        "  for (int n = 0; n < num_records; n++) {\n",
        _FORMS,
    ),
    Mutation(
        "weights not fenced before products read them",
        COLUMNS_SM90,
        "    fence_stores();\n    if (!__syncthreads_or(",
        "    if (!__syncthreads_or(",
        _FORMS,
    ),
    Mutation(
        "no barrier between the warps' parts of the folded queries and the products",
        COLUMNS_SM90,
        "    __syncthreads();\n    if (warp == 0 && n > 0) order(n - 1 + STAGES);\n    const u32 record",
        "    if (warp == 0 && n > 0) order(n - 1 + STAGES);\n    const u32 record",
        _LATE,
    ),
    Mutation(
        "scores read before their products are done",
        COLUMNS_SM90,
        "    wait_products<0>();\n    TokenScales<TOKEN_BLOCKS> tokens;\n",
        "    TokenScales<TOKEN_BLOCKS> tokens;\n",
        _FORMS,
    ),
    Mutation(
        "sums of the last group added before they are done",
        COLUMNS_SM90,
        "    wait_products<0>();\n#pragma unroll\n    for (int m = 0; m < BLOCKS; m++) arrived(o[m]);\n",
        "",
        _FORMS,
    ),
    Mutation(
        "registers of codes not fenced before products read them",
        COLUMNS_SM90,
        "          a[n][i] = unpack_in_place<V_BITS>("
        "words[first + n], tops[first + n], i / 2 * V_CB + 2 * part + i % 2);\n      fence_registers();\n",
        "          a[n][i] = unpack_in_place<V_BITS>("
        "words[first + n], tops[first + n], i / 2 * V_CB + 2 * part + i % 2);\n",
        _FORMS,
    ),
    Mutation(
        "next record ordered into a buffer that is still read (columns)",
        COLUMNS_SM90,
        "order(n - 1 + STAGES);\n    const u32 record",
        "order(n + STAGES);\n    const u32 record",
        (TEST_COLUMNS,),
    ),
    Mutation(
        "draft sees the token after its own (columns)",
        COLUMNS_SM90,
        "token <= sight.y;",
        "token <= sight.y + 1;",
        _FORMS,
    ),
    Mutation(
        "page that a draft reads exactly is read as a record too (columns)",
        COLUMNS_SM90,
        "if ((begin + n) * G >= shared.sight",
        "if ((begin + n) * G > shared.sight",
        _FORMS,
    ),
    Mutation(
        "ring token that a later draft reads from a record is read by it exactly too (columns)",
        COLUMNS_SM90,
        "(token >= sight.x) == in_ring &&",
        "(token >= sight.x || in_ring) == in_ring &&",
        _FORMS,
    ),
    Mutation(
        "queries folded with the scales of the record before",
        COLUMNS_SM90,
        "fold(base, base + stage * BUFFER, warp, lane);",
        "fold(base, record, warp, lane);",
        _FORMS,
    ),
    Mutation(
        "channel scales of values of the next record",
        COLUMNS_SM90,
        "add_record(state.out, o, record, warp, g);",
        "add_record(state.out, o, base + stage * BUFFER, warp, g);",
        _FORMS,
    ),
    Mutation(
        "first token of a page attended twice (columns)",
        COLUMNS_SM90,
        "    if (threadIdx.x < 4)\n#pragma unroll\n      for (int i = 0",
        "    if (false)\n#pragma unroll\n      for (int i = 0",
        _FORMS,
    ),
    Mutation(
        "sums of weights not scaled when the maximum is raised (columns)",
        COLUMNS_SM90,
        "      state.l[2 * c + i] *= alpha;\n",
        "",
        _FORMS,
    ),
    Mutation(
        "zeros of keys of one warp only",
        COLUMNS_SM90,
        "16 * (2 * q + i) + 4 * warp, x);",
        "16 * (2 * q + i), x);",
        _FORMS,
    ),
    Mutation(
        "top bits of the upper channels read as those of the lower ones (columns)",
        CODE_WORDS,
        "c / (D / 8) + shift;",
        "shift;",
        _FORMS,
    ),
    Mutation(
        "ring goes on in a page of the next request (columns)",
        COLUMNS_SM90,
        "token / RING_TOKENS % RING_PAGES",
        "token / RING_TOKENS % (RING_PAGES + 1)",
        (TEST_COLUMNS,),
    ),
    Mutation(
        "many columns attended by the kernel of few",
        ATTENTION,
        "(verify_sm90, columns_sm90):",
        "(verify_sm90,):",
        (TEST_ATTENTION,),
    ),
)
