# SPDX-License-Identifier: Apache-2.0
"""Which keys the new tokens read, as pseudo-requests of a paged prefill: host arithmetic only.

A query page is the new tokens of one request that lie in one page: all of them see the same keys, up to causality.
With e = max(page - window_pages, 0) and a prefix of P tokens they are

    past    the pages 0 .. e - 1 as records, then the positions 128 e .. P - 1; every query of the page sees them all
    own     the positions max(128 e, P) .. of the chunk itself, causal, never empty

The past of all requests is one list of pages: first the windows (pages that hold the positions 128 e .. P - 1 of some
query page), then the records. Query pages share them by index. A segment is a slice of that list.

Example, window 1, prefix 300, 200 new tokens: the query pages 2 (84 tokens) and 3 (116 tokens); windows: pages 1 and 2
(44 tokens); records: pages 0 and 1. Query page 2 reads record 0, windows 1 and 2, its own 84 tokens; query page 3
reads the records 0 and 1, window 2 and all 200 new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn_kernels.config import KVarNConfig


@dataclass(frozen=True)
class PagedCall:
    """Hold what FlashInfer's paged prefill plans with: N pseudo-requests, int32 on the host.

    Attributes:
        qo_indptr: [N + 1], first query of each.
        kv_indptr: [N + 1], first of the page indices of each; kv_indices: [kv_indptr[N]].
        last_page_len: [N], tokens in the last page of each.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor


@dataclass(frozen=True)
class Segment:
    """Describe one filling of the workspace and its readers.

    Attributes:
        requests, pages: int32 [M]; page i of the workspace holds page pages[i] of request requests[i] of the batch.
        num_windows: how many of them, the first ones, are windows.
        begin, end: queries begin .. end - 1 of the batch are the readers; the first and the last query page of them
            read something.
        seen: bool [end - begin], queries that read something; None if all do. The others get one key of the first
            page, so that no pseudo-request is empty (FlashInfer 0.6.14 answers those wrongly on Hopper), and their
            results are not merged.
        call: queries counted from begin, pages of the workspace.
    """

    requests: torch.Tensor
    pages: torch.Tensor
    num_windows: int
    begin: int
    end: int
    seen: torch.Tensor | None
    call: PagedCall


@dataclass(frozen=True)
class QueryPages:
    """Hold the query pages of a batch, N in all, and the list of past pages; int64 on the host.

    Attributes:
        queries: [N], tokens of each.
        own_begin, own_len: [N], first own key (a row of k) and number of own keys.
        window_begin, window_end, record_begin, record_end: [N], ranges of the past list.
        tail: [N], prefix tokens in the last window page of the request.
        requests, pages: [M], request and page of each entry of the past list.
        num_windows: entries of the list that are windows, the first ones.
    """

    queries: torch.Tensor
    own_begin: torch.Tensor
    own_len: torch.Tensor
    window_begin: torch.Tensor
    window_end: torch.Tensor
    record_begin: torch.Tensor
    record_end: torch.Tensor
    tail: torch.Tensor
    requests: torch.Tensor
    pages: torch.Tensor
    num_windows: int


def _ranges(starts: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return starts[i] .. starts[i] + counts[i] - 1 of all i, one after the other."""
    ends = counts.cumsum(0)
    return torch.arange(int(counts.sum())) + (starts - ends + counts).repeat_interleave(counts)


def _indptr(counts: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def query_pages(prefix_lens: list[int], seq_lens: list[int], config: KVarNConfig) -> QueryPages:
    """Return the query pages of a batch of requests with seq_len - prefix_len >= 1 new tokens each."""
    page = config.tile_size
    prefix, seq = torch.tensor(prefix_lens), torch.tensor(seq_lens)
    first = prefix // page
    counts = -(-seq // page) - first
    all_requests = torch.arange(len(prefix_lens))
    b, number = all_requests.repeat_interleave(counts), _ranges(first, counts)
    records = (number - config.window_pages).clamp_min(0)
    own_start, end = torch.maximum(records * page, prefix[b]), torch.minimum((number + 1) * page, seq[b])
    # row of k that position 0 of each request would have
    origin = _indptr(seq - prefix)[:-1] - prefix
    window_first = (first - config.window_pages).clamp_min(0)
    num_windows = -(-prefix // page) - window_first
    num_records = ((seq - 1) // page - config.window_pages).clamp_min(0)
    window_indptr, record_indptr = _indptr(num_windows), _indptr(num_records)
    window_end, record_begin = window_indptr[1:][b], (window_indptr[-1] + record_indptr)[b]
    return QueryPages(
        queries=end - torch.maximum(number * page, prefix[b]),
        own_begin=origin[b] + own_start,
        own_len=end - own_start,
        window_begin=torch.minimum((window_indptr[:-1] - window_first)[b] + records, window_end),
        window_end=window_end,
        record_begin=record_begin,
        record_end=record_begin + records,
        tail=((prefix - 1) % page + 1)[b],
        requests=torch.cat([all_requests.repeat_interleave(n) for n in (num_windows, num_records)]),
        pages=torch.cat([_ranges(window_first, num_windows), _ranges(torch.zeros_like(first), num_records)]),
        num_windows=int(window_indptr[-1]),
    )


def own_call(queries: QueryPages) -> PagedCall:
    """Return the call over the chunk's own keys; a page is one row of k and v."""
    return PagedCall(
        qo_indptr=_indptr(queries.queries).int(),
        kv_indptr=_indptr(queries.own_len).int(),
        kv_indices=_ranges(queries.own_begin, queries.own_len).int(),
        last_page_len=torch.ones(len(queries.queries), dtype=torch.int32),
    )


def segment(queries: QueryPages, start: int, stop: int, page: int) -> Segment:
    """Return the segment of the entries start .. stop - 1 of the past list; `page`: tokens of a page."""
    record_begin, record_end, window_begin, window_end = (
        x.clamp(start, stop)
        for x in (queries.record_begin, queries.record_end, queries.window_begin, queries.window_end)
    )
    seen = (record_end > record_begin) | (window_end > window_begin)
    readers = seen.nonzero()
    first, last = int(readers[0]), int(readers[-1]) + 1
    has_tail = (window_end > window_begin) & (window_end == queries.window_end)
    last_page_len = torch.where(has_tail, queries.tail, page)
    record_begin = torch.where(seen, record_begin, start)
    record_end = torch.where(seen, record_end, start + 1)
    last_page_len = torch.where(seen, last_page_len, 1)[first:last]
    starts = torch.stack([record_begin, window_begin], 1)[first:last] - start
    counts = torch.stack([record_end - record_begin, window_end - window_begin], 1)[first:last]
    rows = _indptr(queries.queries)
    sizes = queries.queries[first:last]
    return Segment(
        requests=queries.requests[start:stop].int(),
        pages=queries.pages[start:stop].int(),
        num_windows=min(max(queries.num_windows - start, 0), stop - start),
        begin=int(rows[first]),
        end=int(rows[last]),
        seen=None if seen[first:last].all() else seen[first:last].repeat_interleave(sizes),
        call=PagedCall(
            qo_indptr=_indptr(sizes).int(),
            kv_indptr=_indptr(counts.sum(1)).int(),
            kv_indices=_ranges(starts.flatten(), counts.flatten()).int(),
            last_page_len=last_page_len.int(),
        ),
    )


def segments(queries: QueryPages, capacity: int, page: int) -> list[Segment]:
    """Cut the past list into segments of at most `capacity` pages; empty if no query has a past."""
    total = len(queries.pages)
    return [
        segment(queries, start, min(start + capacity, total), page) for start in range(0, total, capacity)
    ]
