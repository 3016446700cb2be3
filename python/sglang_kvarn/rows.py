# SPDX-License-Identifier: Apache-2.0
"""The exact tokens of every request: one ring per request row, and where each request's own tokens begin.

A ring is neither freed nor cleared. The next request of a row reads its ring only from its own exact start on, and it
has written all of that itself, so what another request left there is never read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn import compat

_ATTRIBUTE = "kvarn_tail"
# on SGLang's Req: tokens that its first row took from the prefix cache
_FIRST_PREFIX = "kvarn_first_prefix"


class Tail:
    """Hold the rings of R request rows and the table of exact starts. Row 0 is SGLang's padding target.

    Attributes:
        ring_k, ring_v: per layer [R, ring_len, Hk, D] model dtype, rotated.
        exact_starts: int32 [R], tokens that a row's request took from the prefix cache when it got the row.
    """

    def __init__(self, rows: int, layers: int, shape: AttentionShape, config: KVarNConfig, device: str) -> None:
        size = (rows, config.ring_len, shape.num_kv_heads, shape.head_dim)
        self.ring_k = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(layers)]
        self.ring_v = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(layers)]
        self.exact_starts = torch.zeros(rows, dtype=torch.int32, device=device)
        self._hit_reads_as_miss = config.window_pages == 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all rings."""
        return sum(ring.nbytes for ring in (*self.ring_k, *self.ring_v))

    @property
    def max_requests(self) -> int:
        """Requests that have a ring at a time: every row but the padding row."""
        return self.exact_starts.shape[0] - 1

    def set_exact_starts(self, rows: list[int], starts: list[int]) -> None:
        """Write the exact starts of rows, in stream order and without waiting for the device."""
        pinned = self.exact_starts.is_cuda
        update = torch.tensor([rows, starts], dtype=torch.int64, pin_memory=pinned)
        update = update.to(self.exact_starts.device, non_blocking=True)
        self.exact_starts.index_copy_(0, update[0], update[1].int())

    def note_rows(self, reqs: list[Any]) -> None:
        """Note what requests that just got their rows took from the prefix cache.

        Each remembers what its first row took, for `limit_prefix`.
        """
        starts = [compat.prefix_len(req) for req in reqs]
        self.set_exact_starts([compat.request_row(req) for req in reqs], starts)
        if self._hit_reads_as_miss:
            return
        for req, start in zip(reqs, starts, strict=True):
            if not hasattr(req, _FIRST_PREFIX):
                setattr(req, _FIRST_PREFIX, start)

    def attach(self, req_to_token_pool: Any) -> None:
        """Let `record_exact_starts` find this tail from SGLang's ReqToTokenPool."""
        setattr(req_to_token_pool, _ATTRIBUTE, self)


def record_exact_starts(original: Callable[..., Any], pool: Any, reqs: list[Any]) -> Any:
    """Note the prefix length of each request that gets a row. Hook around ``ReqToTokenPool.alloc``.

    A request that comes back with its next chunk keeps its row and its exact start. Other caches have no tail.
    """
    if (tail := getattr(pool, _ATTRIBUTE, None)) is None:
        return original(pool, reqs)
    fresh = [req for req in reqs if compat.request_row(req) is None]
    rows = original(pool, reqs)
    if fresh and rows is not None:
        tail.note_rows(fresh)
    return rows


def limit_prefix(result: int, req: Any, *args: Any, **kwargs: Any) -> int | None:
    """Let a request that lost its row find in the prefix cache at most what it found at first.

    Hook after ``Req._compute_max_prefix_len``. A request that is retracted, preempted or paused has its prompt in the
    prefix cache when it comes back. With an exact window, the page after a cached prefix reads that prefix from
    records, where the request read it exactly before: its answer would depend on the scheduler. So it computes again
    what it had computed itself, and its exact start is what it was.
    """
    first = getattr(req, _FIRST_PREFIX, None)
    return None if first is None else min(result, first)
