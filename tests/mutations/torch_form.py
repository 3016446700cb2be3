# SPDX-License-Identifier: Apache-2.0
"""Bugs of the torch form."""

from __future__ import annotations

from .mutation import Mutation
from .paths import FUZZ, TEST_POSITION_RULE, TORCH_FORM

MUTATIONS = (
    Mutation(
        "ring slot of the next position (torch form)",
        TORCH_FORM,
        "slots = (batch.seq_lens.long() - 1) % cache.ring_len",
        "slots = batch.seq_lens.long() % cache.ring_len",
        (FUZZ,),
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
        "first, last = prefix_len // size, seq_len // size",
        "first, last = prefix_len // size, (seq_len - 1) // size",
        (FUZZ,),
    ),
    Mutation(
        "query page of the chunk's end for all its queries (torch form)",
        TORCH_FORM,
        "n = record_pages(start, exact_start, config) * size",
        "n = record_pages(prefix_len, exact_start, config) * size",
        (FUZZ,),
    ),
    Mutation(
        "ring modulo off by one (torch form)",
        TORCH_FORM,
        "end, device=ring.device) % ring.shape[1]]\n\n\ndef _attend",
        "end, device=ring.device) % (ring.shape[1] - 1)]\n\n\ndef _attend",
        (FUZZ,),
    ),
    Mutation(
        "ring written before the pages of the chunk are encoded (torch form)",
        TORCH_FORM,
        "    # positions first_exact .. seq_len - 1; the own page",
        "    for new, ring in zip(chunk, (cache.ring_k, cache.ring_v), strict=True):\n"
        "        _store_chunk(new, ring, row, prefix_len)\n"
        "    # positions first_exact .. seq_len - 1; the own page",
        (FUZZ,),
    ),
    Mutation(
        "last block of a chunk not filled up (torch form)",
        TORCH_FORM,
        "rest = -seq_len % QUERY_BLOCK",
        "rest = 0",
        (TEST_POSITION_RULE,),
    ),
)
