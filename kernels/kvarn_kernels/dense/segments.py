# SPDX-License-Identifier: Apache-2.0
"""Which pages the new tokens of a step read, as pseudo-requests of paged calls: host arithmetic only.

A query page is the new tokens of one request that lie in one page: all of them see the same keys, up to causality.
It reads the pages before its window as records, its window and itself exactly, in this order; causality, aligned to
the right, only concerns its own page.

What a step reads is one list of pages: first the exact ones (of each request, from the window of its first query page
to its last page), then the records. Query pages share them by index. A segment is a part of that list and the query
pages that read it.

Layers with a sliding window read no page before it. There a segment holds all that its query pages read, records and
exact pages, so that what a query sees ends as many tokens before its own in every call, which a library masks.

FlashInfer runs a program for each query page and query head, over all its keys: too few to fill a GPU where a turn of
some hundred tokens comes on top of a long context. There the records are read in splits, each by pseudo-requests of
its own over a repeated query, and merged like segments.

Example, window 1, prefix 300, 200 new tokens: the query pages 2 (84 tokens) and 3 (116 tokens); exact: the pages 1, 2
and 3; records: the pages 0 and 1. Query page 2 reads record 0 and the exact pages 1 and 2, query page 3 the records 0
and 1, the exact page 2 and 116 tokens of the exact page 3.

In NumPy: torch's CPU operators wake a team of threads (repeat_interleave took 0.3 ms a call on the host of an H100).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.record.tile import TILE_SIZE

# if some query page reads at least SPLIT_PAGES records, records are read in up to MAX_SPLITS parallel splits. Splitting
# costs the host about 400 us a layer more, so it pays only where the GPU is the slower side (H100, 32/8 heads, 128 new
# tokens on 32,768: the GPU takes 372 instead of 654 us, the host 1,020 instead of 610)
SPLIT_PAGES, MAX_SPLITS = 384, 8


@dataclass(frozen=True)
class PagedCall:
    """Hold what paged attention plans with: N pseudo-requests, int32 on the host.

    Attributes:
        qo_indptr: [N + 1], first query of each.
        kv_indptr: [N + 1], first of the page indices of each; kv_indices: [kv_indptr[N]].
        last_page_len: [N], tokens in the last page of each.
    """

    qo_indptr: torch.Tensor
    kv_indptr: torch.Tensor
    kv_indices: torch.Tensor
    last_page_len: torch.Tensor

    def page_table(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (page indices [N, most pages], padded with 0; tokens [N]) of the pseudo-requests, int32."""
        counts = np.diff(self.kv_indptr.numpy())
        table = np.zeros((len(counts), counts.max()), np.int32)
        table[np.arange(table.shape[1]) < counts[:, None]] = self.kv_indices.numpy()
        return torch.from_numpy(table), _int32((counts - 1) * TILE_SIZE + self.last_page_len.numpy())


@dataclass(frozen=True)
class Segment:
    """Describe one filling of the workspace and its readers.

    Attributes:
        requests, pages: int32 [M]; page i of the workspace holds page pages[i] of request requests[i] of the batch.
        num_exact: how many of them, the first ones, are exact pages.
        begin, end: queries begin .. end - 1 of the batch are the readers; the first and the last query page of them
            read something.
        splits: into how many parts what each of them reads is cut.
        seen: bool [splits, end - begin], queries that read something of a split. The others get one key of the first
            page, so that no pseudo-request is empty (FlashInfer 0.6.14 answers those wrongly on Hopper), and their
            results are not merged.
        causal: the readers' own pages are among the exact pages; such segments hold every query once.
        call: queries counted from begin, all of them again for each split; pages of the workspace.
    """

    requests: torch.Tensor
    pages: torch.Tensor
    num_exact: int
    begin: int
    end: int
    splits: int
    seen: torch.Tensor
    causal: bool
    call: PagedCall


@dataclass(frozen=True)
class QueryPages:
    """Hold the query pages of a batch, N in all, and the list of pages that they read; int64.

    Attributes:
        queries: [N], tokens of each; last_page_len: [N], tokens of its page up to the last of them.
        exact_begin, exact_end, record_begin, record_end: [N], ranges of the list; those of exact pages never shrink.
        requests, pages: [M], request and page of each entry of the list.
        num_exact: entries of the list that are exact pages, the first ones.
        slides: whether the queries have a sliding window.
    """

    queries: np.ndarray
    last_page_len: np.ndarray
    exact_begin: np.ndarray
    exact_end: np.ndarray
    record_begin: np.ndarray
    record_end: np.ndarray
    requests: np.ndarray
    pages: np.ndarray
    num_exact: int
    slides: bool


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return starts[i] .. starts[i] + counts[i] - 1 of all i, one after the other."""
    return np.arange(counts.sum()) + np.repeat(starts - counts.cumsum() + counts, counts)


def _indptr(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], counts.cumsum()])


def _int32(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x.astype(np.int32))


def query_pages(
    prefix_lens: list[int], seq_lens: list[int], config: KVarNConfig, sliding_window: int = 0
) -> QueryPages:
    """Return the query pages of a batch of requests with seq_len - prefix_len >= 1 new tokens each.

    Args:
        sliding_window: tokens that a query reads, 0 for all.
    """
    page = TILE_SIZE
    prefix, seq = np.array(prefix_lens), np.array(seq_lens)
    first, stop = prefix // page, -(-seq // page)
    counts = stop - first
    all_requests = np.arange(len(prefix_lens))
    b, number = np.repeat(all_requests, counts), _ranges(first, counts)
    begin, end = np.maximum(number * page, prefix[b]), np.minimum((number + 1) * page, seq[b])
    # the first page that a query page reads, and the first that it reads exactly
    oldest = np.maximum(begin - sliding_window + 1, 0) // page if sliding_window else np.zeros_like(number)
    exact = np.maximum(number - config.window_pages, oldest)
    own = _indptr(counts)
    exact_first, record_first = exact[own[:-1]], oldest[own[:-1]]
    num_exact, num_records = stop - exact_first, np.maximum(exact[own[1:] - 1] - record_first, 0)
    exact_indptr, record_indptr = _indptr(num_exact), _indptr(num_records)
    exact_origin = (exact_indptr[:-1] - exact_first)[b]
    record_origin = (exact_indptr[-1] + record_indptr[:-1] - record_first)[b]
    return QueryPages(
        queries=end - begin,
        last_page_len=end - number * page,
        exact_begin=exact_origin + exact,
        exact_end=exact_origin + number + 1,
        record_begin=record_origin + oldest,
        record_end=record_origin + exact,
        requests=np.concatenate([np.repeat(all_requests, n) for n in (num_exact, num_records)]),
        pages=np.concatenate([_ranges(exact_first, num_exact), _ranges(record_first, num_records)]),
        num_exact=int(exact_indptr[-1]),
        slides=sliding_window > 0,
    )


def _segment(
    queries: QueryPages,
    readers: tuple[int, int],
    exact: tuple[int, int],
    records: tuple[int, int],
    splits: int = 1,
) -> Segment:
    """Return the segment of two slices of the list; `readers`: the query pages that may read something of it."""
    (first, last), causal = readers, exact[1] > exact[0]
    assert splits == 1 or not causal, "the own page of a query is in one piece with its window"
    num_exact, own = exact[1] - exact[0], slice(first, last)
    record_begin, record_end = (x[own].clip(*records) for x in (queries.record_begin, queries.record_end))
    cuts = record_begin + (record_end - record_begin) * np.arange(splits + 1)[:, None] // splits
    record_begin, record_end = cuts[:-1].ravel(), cuts[1:].ravel()
    seen = (record_end > record_begin) | causal
    sizes, last_page_len = (np.tile(x[own], splits) for x in (queries.queries, queries.last_page_len))
    last_page_len = np.where(seen, last_page_len if causal else TILE_SIZE, 1)
    record_begin = np.where(seen, record_begin, records[0])
    record_end = np.where(seen, record_end, records[0] + 1)
    exact_begin, exact_end = (np.tile(x[own], splits) for x in (queries.exact_begin, queries.exact_end))
    starts = np.stack([record_begin - records[0] + num_exact, exact_begin - exact[0]], 1)
    counts = np.stack([record_end - record_begin, (exact_end - exact_begin) * causal], 1)
    rows = _indptr(queries.queries)
    parts = (slice(*exact), slice(*records))
    return Segment(
        requests=_int32(np.concatenate([queries.requests[part] for part in parts])),
        pages=_int32(np.concatenate([queries.pages[part] for part in parts])),
        num_exact=num_exact,
        begin=int(rows[first]),
        end=int(rows[last]),
        splits=splits,
        seen=torch.from_numpy(np.repeat(seen, sizes).reshape(splits, -1)),
        causal=causal,
        call=PagedCall(
            qo_indptr=_int32(_indptr(sizes)),
            kv_indptr=_int32(_indptr(counts.sum(1))),
            kv_indices=_int32(_ranges(starts.ravel(), counts.ravel())),
            last_page_len=_int32(last_page_len),
        ),
    )


def _groups(queries: QueryPages, capacity: int) -> list[tuple[int, int]]:
    """Cut the query pages into groups whose pages are at most `capacity`, as few as possible.

    Counted are exact pages, of layers with a sliding window records too.
    """
    begin, end, groups, first = queries.exact_begin, queries.exact_end, [], 0
    if queries.slides:
        begin, end = begin + queries.record_begin, end + queries.record_end
    while first < len(queries.queries):
        last = int(np.searchsorted(end, begin[first] + capacity, side="right"))
        assert last > first, "what one query page reads fits"
        groups.append((first, last))
        first = last
    return groups


def _pages_of(queries: QueryPages, group: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the slices of the list, of exact pages and of records, that a group of query pages reads."""
    first, last = group[0], group[1] - 1
    exact = (int(queries.exact_begin[first]), int(queries.exact_end[last]))
    return exact, (int(queries.record_begin[first]), int(queries.record_end[last]))


def fewest_pages(sliding_window: int) -> int:
    """Return the pages that a segment must have room for: what a page of queries with a sliding window reads."""
    return (sliding_window - 2) // TILE_SIZE + 2


def num_splits(queries: QueryPages, num_qo_heads: int, multiprocessors: int) -> int:
    """Return into how many splits the records of a step are cut: 1, or so many that FlashInfer fills the device."""
    if queries.slides:
        return 1
    longest = int((queries.record_end - queries.record_begin).max())
    programs = len(queries.queries) * num_qo_heads
    return min(max(multiprocessors // programs, 1), MAX_SPLITS) if longest >= SPLIT_PAGES else 1


def segments(queries: QueryPages, capacity: int, splits: int = 1) -> list[Segment]:
    """Cut the list into segments of at most `capacity` pages, at least a window and one more, or `fewest_pages`.

    The causal ones come first. Where one of them holds all exact pages, it takes as many records as still fit: most
    steps are a single segment. Not where records are read in several splits.
    """
    num_exact, total = queries.num_exact, len(queries.pages)
    groups = _groups(queries, capacity)
    if queries.slides:
        return [_segment(queries, group, *_pages_of(queries, group)) for group in groups]
    start = min(capacity, total) if len(groups) == 1 and splits == 1 else num_exact
    found = []
    for first, last in groups:
        exact = (int(queries.exact_begin[first]), int(queries.exact_end[last - 1]))
        found.append(_segment(queries, (first, last), exact, (num_exact, start)))
    while start < total:
        stop = min(start + capacity, total)
        begin, end = (x.clip(start, stop) for x in (queries.record_begin, queries.record_end))
        (seen,) = (end > begin).nonzero()
        readers = (int(seen[0]), int(seen[-1]) + 1)
        found.append(_segment(queries, readers, (0, 0), (start, stop), splits))
        start = stop
    return found
