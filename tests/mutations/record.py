# SPDX-License-Identifier: Apache-2.0
"""Bugs of the record and the ring: layout, oracle, unpacking, length."""

from __future__ import annotations

from .mutation import Mutation
from .paths import CONFIG, FUZZ, REFERENCE_RECORD, TEST_DECODE, TEST_KNOWN_KERNELS, TEST_REFERENCE, TILE, UNPACK

MUTATIONS = (
    Mutation(
        "ring one page too short",
        CONFIG,
        "return (self.window_pages + 1) * tile.TILE_SIZE",
        "return max(1, self.window_pages) * tile.TILE_SIZE",
        (FUZZ,),
    ),
    Mutation(
        "record without its header",
        TILE,
        "return HEADER | (HEADER_BF16 if is_bf16 else 0)",
        "return 0",
        (TEST_KNOWN_KERNELS,),
    ),
    Mutation(
        "top bits of the upper channels read as those of the lower ones",
        UNPACK,
        "return words, tops >> (c // HALF)",
        "return words, tops",
        (f"{TEST_DECODE}::test_decode_matches_the_oracle_in_every_form",),
    ),
    Mutation(
        "first token of a record quantised",
        REFERENCE_RECORD,
        "    k[..., 0, :], v[..., 0, :] = _first_tokens(record, config, head_dim)\n",
        "",
        (TEST_REFERENCE,),
    ),
)
