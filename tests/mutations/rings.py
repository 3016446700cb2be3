# SPDX-License-Identifier: Apache-2.0
"""Bugs of rings that are taken from the pool and given back: twice, never, too late, to the wrong owner."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ADMISSION,
    CAPACITY,
    COMPAT,
    FUZZ,
    METADATA,
    RINGS,
    TEST_ADMISSION,
    TEST_BUDGET,
    TEST_KNOWN,
    TEST_METADATA,
    TEST_RINGS,
)

MUTATIONS = (
    Mutation(
        "ring of a freed row kept, and given back a second time",
        RINGS,
        "self._held.pop(row, None)",
        "self._held.get(row, None)",
        (TEST_RINGS,),
    ),
    Mutation(
        "ring of a freed row not given back",
        RINGS,
        "        rings.free_row(compat.request_row(req))\n",
        "        pass\n",
        (FUZZ,),
    ),
    Mutation(
        "ring of a request that was not admitted kept",
        ADMISSION,
        "        found.take_back(req)\n",
        "        pass\n",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "ring of a request that was admitted taken back",
        ADMISSION,
        "if not any(added is req for added in adder.can_run_list):",
        "if True:",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "prefix of a request evicted for its own ring",
        ADMISSION,
        "with adder._lock_node(req.last_node), compat.lock_host_prefix",
        "with compat.lock_host_prefix",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "no eviction for a ring",
        RINGS,
        "        compat.evict(tree_cache, self.tokens_per_ring)\n",
        "",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "request admitted without a ring",
        ADMISSION,
        "        return compat.AddReqResult.NO_TOKEN\n",
        "        return original(adder, req, *args, **kwargs)\n",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "lengths without room for a ring",
        ADMISSION,
        "scheduler.max_total_num_tokens - found.tokens_per_ring - PAGE_SIZE - 1",
        "scheduler.max_total_num_tokens - PAGE_SIZE - 1",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "rings taken for lost pages by the checks of a busy server",
        ADMISSION,
        "full + found.out * found.tokens_per_ring",
        "full",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "rings of one batch handed to each other's rows",
        RINGS,
        "torch.stack(rings).int()",
        "torch.stack(rings[::-1]).int()",
        (TEST_RINGS, FUZZ),
    ),
    Mutation(
        "rings that were found kept when one is missing",
        RINGS,
        "                for ring in found:\n                    compat.free_pages(self.allocator, ring)\n",
        "",
        (TEST_RINGS,),
    ),
    Mutation(
        "rings remembered through a flush",
        RINGS,
        "        self._held.clear()\n",
        "",
        (TEST_RINGS,),
    ),
    Mutation(
        "pages of a ring one slot off, so that two are the same",
        RINGS,
        "slots[::PAGE_SIZE] // PAGE_SIZE",
        "slots[: len(slots) // PAGE_SIZE] // PAGE_SIZE",
        (TEST_RINGS,),
    ),
    Mutation(
        "ring pages read by row when the step runs, not when it is prepared",
        METADATA,
        "        torch.index_select(self._rings.pages, 0, rows, out=batch.ring_pages)\n",
        # a view of the table, right as long as the rows are neighbours and nobody else gets them
        "        batch.ring_pages.set_(self._rings.pages[rows[0] : rows[-1] + 1])\n",
        (f"{TEST_METADATA}::test_a_row_that_is_given_away_after_fill_does_not_change_the_step",),
    ),
    Mutation(
        "padded rows keep the ring of an earlier step",
        METADATA,
        "        torch.index_select(self._rings.pages, 0, rows, out=batch.ring_pages)\n",
        "        batch.ring_pages[rows > 0] = self._rings.pages[rows[rows > 0]]\n",
        (TEST_METADATA, TEST_KNOWN),
    ),
    Mutation(
        "rings of a mixed step by place in the batch, not by row",
        METADATA,
        "ring_pages=rings.pages.index_select(0, rows)",
        "ring_pages=rings.pages[1 : size + 1]",
        (TEST_METADATA,),
    ),
    Mutation(
        "pool taken that holds no ring",
        CAPACITY,
        "    needed = (ring_pages(shape.attention, config, draft_tokens) + MIN_PAGES) * PAGE_SIZE\n    if",
        "    needed = MIN_PAGES * PAGE_SIZE\n    if",
        (TEST_BUDGET,),
    ),
    Mutation(
        "pages given back in the middle of a group at once",
        COMPAT,
        "    elif not allocator.is_not_in_free_group:\n",
        "    elif False:\n",
        (TEST_RINGS,),
    ),
)
