# SPDX-License-Identifier: Apache-2.0
"""Bugs of the torch form."""

from __future__ import annotations

from .mutation import Mutation
from .paths import FUZZ, TEST_POSITION_RULE, TEST_RING, TEST_TORCH_FORM, TORCH_FORM

MUTATIONS = (
    Mutation(
        "ring slot of the next position (torch form)",
        TORCH_FORM,
        "cache, batch.ring_pages[b], seq_len - 1)",
        "cache, batch.ring_pages[b], seq_len)",
        (f"{TEST_RING}::test_decode_writes_its_tokens_and_the_page_that_they_fill_and_nothing_else",),
    ),
    Mutation(
        "page encoded one token early (torch form)",
        TORCH_FORM,
        "if seq_len % TILE_SIZE == 0:",
        "if (seq_len + 1) % TILE_SIZE == 0:",
        (FUZZ,),
    ),
    Mutation(
        "window one page too short",
        TORCH_FORM,
        "max(page - config.window_pages, exact_start // TILE_SIZE)",
        "max(page - config.window_pages + 1, exact_start // TILE_SIZE)",
        (FUZZ,),
    ),
    Mutation(
        "page on the prompt's end not encoded (torch form)",
        TORCH_FORM,
        "first, last = prefix_len // TILE_SIZE, seq_len // TILE_SIZE",
        "first, last = prefix_len // TILE_SIZE, (seq_len - 1) // TILE_SIZE",
        (FUZZ,),
    ),
    Mutation(
        "query page of the chunk's end for all its queries (torch form)",
        TORCH_FORM,
        "n = max(first_read, record_pages(start, exact_start, config)) * TILE_SIZE",
        "n = max(first_read, record_pages(prefix_len, exact_start, config)) * TILE_SIZE",
        (FUZZ,),
    ),
    Mutation(
        "last place of a ring page left out (torch form)",
        TORCH_FORM,
        ".long(), positions % view.shape[2]",
        ".long(), positions % (view.shape[2] - 1)",
        (f"{TEST_RING}::test_torch_form_puts_every_token_where_counting_does",),
    ),
    Mutation(
        "ring goes on behind its last page (torch form)",
        TORCH_FORM,
        "positions // view.shape[2] % len(pages)",
        "positions // view.shape[2]",
        (f"{TEST_RING}::test_torch_form_puts_every_token_where_counting_does",),
    ),
    Mutation(
        "key and value of a ring token swapped (torch form)",
        TORCH_FORM,
        "torch.stack([k, v], 2)",
        "torch.stack([v, k], 2)",
        (f"{TEST_RING}::test_torch_form_puts_every_token_where_counting_does",),
    ),
    Mutation(
        "ring written before the pages of the chunk are encoded (torch form)",
        TORCH_FORM,
        "    # positions first_exact .. seq_len - 1; the own page",
        "    _store_tokens(k, v, cache, ring, prefix_len)\n"
        "    # positions first_exact .. seq_len - 1; the own page",
        (f"{TEST_TORCH_FORM}::test_extend_does_not_depend_on_the_chunks",),
    ),
    Mutation(
        "last block of a chunk not filled up (torch form)",
        TORCH_FORM,
        "rest = -seq_len % QUERY_BLOCK",
        "rest = 0",
        (TEST_POSITION_RULE,),
    ),
)
