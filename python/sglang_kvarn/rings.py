# SPDX-License-Identifier: Apache-2.0
"""The exact tokens of every request: a ring of pages, taken from the pool for a row and given back with it.

A ring is N pages of SGLang's pool. It is reserved before a request is admitted (`admission`), handed out when the
request gets its row, and given back when the row is freed, so a server that is idle holds none.

Nothing has to be cleared. A request reads its ring only from its own exact start on, and it has written all of that
itself before. Kernels find a ring by the pages that were copied into their batch when the step was prepared, never by
the row: a step that was prepared for a request that has ended meanwhile writes to pages that it owned, before any step
of their next owner.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from sglang_kvarn import compat
from sglang_kvarn.settings import PAGE_SIZE

# of ReqToTokenPool and of our pool
ATTRIBUTE = "kvarn_rings"
# on SGLang's Req: the pages reserved for it; tokens that its first row took from the prefix cache
_RESERVED, _FIRST_PREFIX = "kvarn_ring", "kvarn_first_prefix"


class Held(NamedTuple):
    """What a row has.

    Attributes:
        pages: of its ring, int64 [N] on the device; exact_start: as in `Rings`, on the host.
    """

    pages: torch.Tensor
    exact_start: int


class Rings:
    """Own the rings of requests, and the table of exact starts. R rows; row 0 is SGLang's padding target.

    Attributes:
        pages: int32 [R, N], the pages of the ring of each row; 0, the padding page, where a row had none yet.
        exact_starts: int32 [R], tokens that a row's request took from the prefix cache when it got the row.
        allocator: SGLang's, None until it is made.
    """

    def __init__(self, rows: int, pages_per_ring: int, device: str, *, hit_reads_as_miss: bool) -> None:
        self.pages = torch.zeros(rows, pages_per_ring, dtype=torch.int32, device=device)
        self.exact_starts = torch.zeros(rows, dtype=torch.int32, device=device)
        self.allocator: Any = None
        self._hit_reads_as_miss = hit_reads_as_miss
        # by row
        self._held: dict[int, Held] = {}
        self._promised = 0

    @property
    def pages_per_ring(self) -> int:
        """N."""
        return self.pages.shape[1]

    @property
    def tokens_per_ring(self) -> int:
        """Tokens of the pool that a ring takes the place of."""
        return self.pages_per_ring * PAGE_SIZE

    @property
    def max_requests(self) -> int:
        """Requests that have a row at a time: every row but the padding row."""
        return self.exact_starts.shape[0] - 1

    @property
    def out(self) -> int:
        """Rings that are not in the pool: of rows, and of requests that are admitted and have no row yet."""
        return len(self._held) + self._promised

    def promise(self, req: Any, tree_cache: Any) -> bool:
        """Take a ring for a request that is about to be admitted, evicting from the prefix cache if need be.

        Returns:
            Whether there was one.
        """
        compat.evict(tree_cache, self.tokens_per_ring)
        return self.assign([req])

    def take_back(self, req: Any) -> None:
        """Give the ring of a request back that was not admitted after all."""
        compat.free_pages(self.allocator, self._claim(req))

    def assign(self, reqs: list[Any]) -> bool:
        """Promise a ring to each request that is to get a row and has none yet.

        Returns:
            Whether all have one. If not, no ring was taken.
        """
        missing = [req for req in reqs if getattr(req, _RESERVED, None) is None]
        found: list[torch.Tensor] = []
        for _ in missing:
            if (ring := self._allocate()) is None:
                for ring in found:
                    compat.free_pages(self.allocator, ring)
                return False
            found.append(ring)
        for req, ring in zip(missing, found, strict=True):
            setattr(req, _RESERVED, ring)
            self._promised += 1
        return True

    def note_rows(self, reqs: list[Any]) -> None:
        """Bind the rings of requests to the rows that they just got, and note what came from the prefix cache.

        Each request remembers what its first row took from there, for `limit_prefix`. The tables are written in stream
        order and without waiting for the device.
        """
        rows, starts = [compat.request_row(req) for req in reqs], [compat.prefix_len(req) for req in reqs]
        rings = [self._claim(req) for req in reqs]
        self._held.update(zip(rows, map(Held, rings, starts), strict=True))
        on_device = self._write_starts(rows, starts)
        self.pages.index_copy_(0, on_device, torch.stack(rings).int())
        if self._hit_reads_as_miss:
            return
        for req, start in zip(reqs, starts, strict=True):
            if not hasattr(req, _FIRST_PREFIX):
                setattr(req, _FIRST_PREFIX, start)

    def held(self, row: int) -> Held:
        """Return what a row has."""
        return self._held[row]

    def set_exact_start(self, row: int, start: int) -> None:
        """Note what the request of a row took from the prefix cache, where another process has found it."""
        self._held[row] = self._held[row]._replace(exact_start=start)
        self._write_starts([row], [start])

    def _write_starts(self, rows: list[int], starts: list[int]) -> torch.Tensor:
        """Write exact starts in stream order, without waiting for the device; return the rows there, int64."""
        update = torch.tensor([rows, starts], dtype=torch.int64, pin_memory=self.pages.is_cuda)
        update = update.to(self.pages.device, non_blocking=True)
        self.exact_starts.index_copy_(0, update[0], update[1].int())
        return update[0]

    def free_row(self, row: int) -> None:
        """Give the ring of a row back to the pool."""
        if (held := self._held.pop(row, None)) is not None:
            compat.free_pages(self.allocator, held.pages)

    def forget(self) -> None:
        """Drop all rings, whose pages the allocator has made free itself."""
        self._held.clear()
        self._promised = 0

    def _allocate(self) -> torch.Tensor | None:
        slots = self.allocator.alloc(self.tokens_per_ring)
        return None if slots is None else slots[::PAGE_SIZE] // PAGE_SIZE

    def _claim(self, req: Any) -> torch.Tensor:
        ring = getattr(req, _RESERVED)
        setattr(req, _RESERVED, None)
        self._promised -= 1
        return ring


def of_pool(pool: Any) -> Rings | None:
    """Return the rings of SGLang's ReqToTokenPool or of a token pool, None where the cache is another."""
    return getattr(pool, ATTRIBUTE, None)


def records_of(pool: Any) -> Any:
    """Return the records in SGLang's token pool, alone or beside sliding windows; None where the cache is another."""
    records = getattr(pool, "full_kv_pool", pool)
    return None if of_pool(records) is None else records


def attach_allocator(result: Any, allocator: Any, *args: Any, **kwargs: Any) -> None:
    """Let rings find the allocator of their pages. Hook after ``PagedTokenToKVPoolAllocator.__init__``."""
    if (rings := of_pool(allocator.get_kvcache())) is not None:
        rings.allocator = allocator


def alloc_rows(original: Callable[..., Any], pool: Any, reqs: list[Any]) -> Any:
    """Give a ring to each request that gets a row. Hook around ``ReqToTokenPool.alloc``.

    A request that comes back with its next chunk keeps its row, its ring and its exact start.
    """
    if (rings := of_pool(pool)) is None:
        return original(pool, reqs)
    fresh = [req for req in reqs if compat.request_row(req) is None]
    if not rings.assign(fresh):
        return None
    rows = original(pool, reqs)
    if fresh and rows is not None:
        rings.note_rows(fresh)
    return rows


def free_row(original: Callable[..., Any], pool: Any, req: Any) -> Any:
    """Give the ring of a row back with the row. Hook around ``ReqToTokenPool.free``."""
    if (rings := of_pool(pool)) is not None:
        rings.free_row(compat.request_row(req))
    return original(pool, req)


def forget_rows(result: Any, pool: Any, *args: Any, **kwargs: Any) -> None:
    """Forget all rings with all rows; the allocator is cleared with them. Hook after ``ReqToTokenPool.clear``."""
    if (rings := of_pool(pool)) is not None:
        rings.forget()


def limit_prefix(result: int, req: Any, *args: Any, **kwargs: Any) -> int | None:
    """Let a request that lost its row find in the prefix cache at most what it found at first.

    Hook after ``Req._compute_max_prefix_len``. A request that is retracted, preempted or paused has its prompt in the
    prefix cache when it comes back. With an exact window, the page after a cached prefix reads that prefix from
    records, where the request read it exactly before: its answer would depend on the scheduler. So it computes again
    what it had computed itself, and its exact start is what it was.
    """
    first = getattr(req, _FIRST_PREFIX, None)
    return None if first is None else min(result, first)
