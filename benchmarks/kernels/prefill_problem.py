# SPDX-License-Identifier: Apache-2.0
"""Requests that add new tokens to a prefix in the cache, the same for every provider."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kvarn_kernels.shape import AttentionShape

from benchmarks.kernels.attention_problem import DEVICE, PAGE, attend_exactly, distinct_pages, draw, generator


@dataclass(frozen=True)
class Shape:
    """Describe one problem: requests with `new` tokens each after `prefix` cached ones."""

    new: int
    prefix: int
    heads: AttentionShape
    requests: int = 1

    @property
    def seq_len(self) -> int:
        """Tokens of a request."""
        return self.prefix + self.new

    @property
    def pages(self) -> int:
        """Pages of a request."""
        return -(-self.seq_len // PAGE)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the scores that causality leaves, and of their values."""
        keys = self.new * self.prefix + self.new * (self.new + 1) // 2
        return 4 * self.requests * keys * self.heads.num_qo_heads * self.heads.head_dim


@dataclass
class Problem:
    """Hold the inputs of all providers; the prefix repeats a few distinct pages.

    Attributes:
        q: [requests * new, Hq, D]; k, v: [seq_len, Hk, D], of every request, which have them in pages of their own.
        page_of: [prefix pages], which of the distinct pages each repeats; distinct: [U, G, Hk, D], keys and values.
        page_table: int32 [requests, pages], physical pages in random order, from 1 on.
    """

    shape: Shape
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    page_of: torch.Tensor
    distinct: tuple[torch.Tensor, torch.Tensor]
    page_table: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, distinct: int = 64) -> Problem:
        """Return the problem of a shape, the same in every process."""
        assert shape.prefix % PAGE == 0, "a prefix of whole pages"
        source, heads = generator(), shape.heads
        page_of = torch.randint(distinct, (shape.prefix // PAGE,), generator=source, device=DEVICE)
        pages = distinct_pages(source, distinct, heads)
        k, v = (
            torch.cat([x[page_of].flatten(0, 1), draw(source, shape.new, heads.num_kv_heads, heads.head_dim)])
            for x in pages
        )
        order = torch.randperm(shape.requests * shape.pages, generator=source, device=DEVICE) + 1
        q = draw(source, shape.requests * shape.new, heads.num_qo_heads, heads.head_dim)
        return cls(shape, q, k, v, page_of, pages, order.int().unflatten(0, (shape.requests, -1)))

    @property
    def samples(self) -> list[int]:
        """The queries that a check computes."""
        new = self.shape.new
        first = (self.shape.requests - 1) * new
        return sorted({0, *(first + n for n in (0, min(PAGE + 1, new - 1), new // 2, new - 1))})

    def exact(self, query: int) -> torch.Tensor:
        """Return float32 attention of a query in plain torch, [Hq, D]."""
        end = self.shape.prefix + query % self.shape.new + 1
        return attend_exactly(self.q[query], self.k[:end], self.v[:end])
