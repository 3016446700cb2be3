# SPDX-License-Identifier: Apache-2.0
"""The kernels' view of a batch, made from SGLang's ForwardBatch."""

from __future__ import annotations

from typing import Any

import torch
from kvarn_kernels.batch import DecodeBatch, ExtendBatch

from sglang_kvarn.rings import Rings
from sglang_kvarn.settings import PAGE_SIZE

PAGE_SHIFT = PAGE_SIZE.bit_length() - 1


class DecodeBuffers:
    """Hold the tensors of decode and verify steps of up to B rows: made once, filled in place, as graphs need it.

    Attributes:
        ring_pages, seq_lens, store_pages, page_table, exact_starts: as in `DecodeBatch`, for B rows.
    """

    def __init__(self, max_batch: int, req_to_token: torch.Tensor, rings: Rings) -> None:
        device = req_to_token.device
        # slot of the first token of each page; [R, P_max], a view
        self._first_slots = req_to_token[:, ::PAGE_SIZE]
        self.max_batch = max_batch
        self._rings = rings
        self._counted = torch.arange(1, max_batch + 1, dtype=torch.int32, device=device)
        self._rows = torch.zeros(max_batch, dtype=torch.int64, device=device)
        self.ring_pages = torch.zeros(max_batch, rings.pages_per_ring, dtype=torch.int32, device=device)
        self.seq_lens = torch.ones(max_batch, dtype=torch.int32, device=device)
        self.store_pages = torch.zeros(max_batch, dtype=torch.int32, device=device)
        self.exact_starts = torch.zeros(max_batch, dtype=torch.int32, device=device)
        pages = self._first_slots.shape[1]
        self.page_table = torch.zeros((max_batch, pages), dtype=torch.int32, device=device)

    def fill(self, forward_batch: Any, draft_tokens: int = 0) -> DecodeBatch:
        """Describe a decode or verify step: no allocation and no wait for the device.

        ``req_to_token`` and the tables of the rings are read here, never inside a CUDA graph: SGLang may rewrite them
        once a replay began.

        Args:
            forward_batch: SGLang's ForwardBatch, or the padded view of one that a graph replay gets. Its lengths count
                the new token of a decode step, and no draft of a verify step.
            draft_tokens: of each request in a verify step, 0 for a decode step.
        """
        requests, each = forward_batch.batch_size, max(draft_tokens, 1)
        size = requests * each
        batch = DecodeBatch(
            ring_pages=self.ring_pages[:size],
            seq_lens=self.seq_lens[:size],
            page_table=self.page_table[:size],
            store_pages=self.store_pages[:size],
            exact_starts=self.exact_starts[:size],
            drafts=each,
        )
        rows = self._rows[:size]
        rows.view(requests, each).copy_(forward_batch.req_pool_indices[:requests, None])
        batch.seq_lens.view(requests, each).copy_(forward_batch.seq_lens[:requests, None])
        if draft_tokens:
            batch.seq_lens.view(requests, each).add_(self._counted[:each])
        # a graph replay pads every tensor except out_cache_loc
        slots = forward_batch.out_cache_loc[:size]
        batch.store_pages[len(slots) :].zero_()
        batch.store_pages[: len(slots)].copy_(slots).bitwise_right_shift_(PAGE_SHIFT)
        torch.index_select(self._rings.exact_starts, 0, rows, out=batch.exact_starts)
        torch.index_select(self._rings.pages, 0, rows, out=batch.ring_pages)
        torch.index_select(self._first_slots, 0, rows, out=batch.page_table)
        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)
        return batch


def extend_batch(forward_batch: Any, req_to_token: torch.Tensor, rings: Rings) -> ExtendBatch:
    """Describe an extend step; the decode requests of a mixed batch are extends of one token."""
    size = forward_batch.batch_size
    prefix_host = [int(n) for n in forward_batch.extend_prefix_lens_cpu[:size]]
    new_host = [int(n) for n in forward_batch.extend_seq_lens_cpu[:size]]
    seq_host = [p + n for p, n in zip(prefix_host, new_host, strict=True)]
    rows = forward_batch.req_pool_indices[:size].long()
    prefix_lens = forward_batch.extend_prefix_lens[:size].int()
    new_lens = forward_batch.extend_seq_lens[:size].int()
    qo_indptr = torch.zeros(size + 1, dtype=torch.int32, device=rows.device)
    torch.cumsum(new_lens, 0, out=qo_indptr[1:])
    pages = req_to_token[:, : max(seq_host) : PAGE_SIZE].index_select(0, rows) >> PAGE_SHIFT
    return ExtendBatch(
        ring_pages=rings.pages.index_select(0, rows),
        prefix_lens=prefix_lens,
        seq_lens=prefix_lens + new_lens,
        qo_indptr=qo_indptr,
        page_table=pages,
        exact_starts=rings.exact_starts.index_select(0, rows),
        prefix_lens_host=prefix_host,
        seq_lens_host=seq_host,
    )
