# SPDX-License-Identifier: Apache-2.0
"""A decode step of requests of one length, the same for every provider."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from kvarn_kernels.shape import AttentionShape

from benchmarks.kernels.attention_problem import DEVICE, PAGE, attend_exactly, distinct_pages, draw, generator

# bytes of the L2 of an H100 or H200
L2 = 60e6


@dataclass(frozen=True)
class Shape:
    """Describe a decode step: batch requests of context tokens each, the new one included."""

    batch: int
    context: int
    heads: AttentionShape

    @property
    def pages(self) -> int:
        """Pages of a request."""
        return -(-self.context // PAGE)

    @property
    def full_bytes(self) -> int:
        """Bytes of the keys and values of all requests in the model's dtype."""
        return self.batch * self.context * self.heads.full_token_bytes

    def layers(self, bytes_per_layer: int) -> int:
        """Return how many layers keep a replay out of the L2, at most 8."""
        return max(1, min(8, math.ceil(4 * L2 / bytes_per_layer)))


@dataclass
class Problem:
    """Hold the inputs of all providers.

    Attributes:
        q: [B, Hq, D]; k_new, v_new: [B, Hk, D].
        pages: keys and values of the distinct pages [U, G, Hk, D]; page_of: [B, P], which of them each page repeats.
    """

    shape: Shape
    q: torch.Tensor
    k_new: torch.Tensor
    v_new: torch.Tensor
    pages: tuple[torch.Tensor, torch.Tensor]
    page_of: torch.Tensor

    @classmethod
    def make(cls, shape: Shape, unique: int = 64) -> Problem:
        """Return the problem of a shape, the same in every process."""
        source, heads = generator(), shape.heads
        q = draw(source, shape.batch, heads.num_qo_heads, heads.head_dim)
        new = [draw(source, shape.batch, heads.num_kv_heads, heads.head_dim) for _ in range(2)]
        pages = distinct_pages(source, unique, heads)
        page_of = torch.randint(unique, (shape.batch, shape.pages), generator=source, device=DEVICE)
        return cls(shape, q, *new, pages, page_of)

    @property
    def samples(self) -> list[int]:
        """The requests that a check computes."""
        return sorted({0, self.shape.batch - 1})

    def keys_values(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [context, Hk, D] of request b."""
        k, v = (x[self.page_of[b]].flatten(0, 1)[: self.shape.context].clone() for x in self.pages)
        k[-1], v[-1] = self.k_new[b], self.v_new[b]
        return k, v

    def physical_pages(self) -> torch.Tensor:
        """Return a random physical page for every logical one, int32 [B, P]; page 0 is padding."""
        order = torch.randperm(self.page_of.numel(), device=DEVICE) + 1
        return order.view_as(self.page_of).int()

    def paged(self, page_table: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return keys and values in pages [P, G, Hk, D] as a page table places them; page 0 is not written."""
        at, last = page_table.flatten().long(), (self.shape.context - 1) % PAGE
        found = []
        for pages, new in zip(self.pages, (self.k_new, self.v_new), strict=True):
            cache = torch.empty(page_table.numel() + 1, *pages.shape[1:], dtype=dtype, device=DEVICE)
            cache[at] = pages.to(dtype)[self.page_of.flatten()]
            cache[page_table[:, -1].long(), last] = new.to(dtype)
            found.append(cache)
        return found

    def exact(self, b: int) -> torch.Tensor:
        """Return float32 attention of request b in plain torch, [Hq, D]."""
        return attend_exactly(self.q[b], *self.keys_values(b))
