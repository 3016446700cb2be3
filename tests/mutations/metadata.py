# SPDX-License-Identifier: Apache-2.0
"""Bugs of the description of a step made from SGLang's batch."""

from __future__ import annotations

from .mutation import Mutation
from .paths import FUZZ, METADATA, TEST_KNOWN

MUTATIONS = (
    Mutation(
        "page table read when the step runs, not when it is prepared",
        METADATA,
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n        return batch",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n"
        "        slots = self._first_slots\n"
        "        table = property(lambda b: (slots[self._rows[: len(b.seq_lens)]] >> PAGE_SHIFT).int())\n"
        "        late = object.__new__(type('Late', (DecodeBatch,), {'page_table': table}))\n"
        "        late.__dict__.update(batch.__dict__)\n"
        "        return late",
        (FUZZ,),
    ),
    Mutation(
        "exact starts read when the step runs",
        METADATA,
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n        return batch",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n"
        "        late = property(lambda b: self._rings.exact_starts[self._rows[: len(b.seq_lens)]])\n"
        "        late = object.__new__(type('Late', (DecodeBatch,), {'exact_starts': late}))\n"
        "        late.__dict__.update(batch.__dict__)\n"
        "        return late",
        (f"{TEST_KNOWN}::test_a_wasted_step_reads_from_the_exact_start_of_its_own_request",),
    ),
    Mutation(
        "page to encode into kept from an earlier step",
        METADATA,
        "batch.store_pages[: len(slots)].copy_(slots).bitwise_right_shift_(PAGE_SHIFT)",
        "kept = batch.store_pages[: len(slots)]\n"
        "        kept.copy_(torch.where(kept > 0, kept, slots.int() >> PAGE_SHIFT))",
        (FUZZ,),
    ),
    Mutation(
        "padded rows keep the pages of an earlier step",
        METADATA,
        "batch.store_pages[len(slots) :].zero_()",
        "pass",
        (TEST_KNOWN,),
    ),
    Mutation(
        "padded rows keep the requests of an earlier step",
        METADATA,
        "rows.view(requests, each).copy_(forward_batch.req_pool_indices[:requests, None])",
        "real = forward_batch.req_pool_indices[:requests, None]\n"
        "        rows.view(requests, each).copy_(torch.where(real > 0, real, rows.view(requests, each)))",
        (TEST_KNOWN,),
    ),
    Mutation(
        "page to encode into is that of the next token",
        METADATA,
        "batch.store_pages[: len(slots)].copy_(slots).",
        "batch.store_pages[: len(slots)].copy_(slots + 1).",
        (FUZZ,),
    ),
    Mutation(
        "padded rows keep the lengths of an earlier step",
        METADATA,
        "batch.seq_lens.view(requests, each).copy_(forward_batch.seq_lens[:requests, None])",
        "real = len(forward_batch.out_cache_loc) // each\n"
        "        batch.seq_lens.view(requests, each)[:real].copy_(forward_batch.seq_lens[:real, None])",
        (TEST_KNOWN,),
    ),
    Mutation(
        "exact starts by place in the batch, not by row",
        METADATA,
        "exact_starts=rings.exact_starts.index_select(0, rows)",
        "exact_starts=rings.exact_starts[1 : size + 1]",
        (FUZZ,),
    ),
    Mutation(
        "pages of the first request's length for the whole batch",
        METADATA,
        "req_to_token[:, : max(seq_host) : PAGE_SIZE]",
        "req_to_token[:, : seq_host[0] : PAGE_SIZE]",
        (FUZZ,),
    ),
)
