# SPDX-License-Identifier: Apache-2.0
"""A decode or verify step of requests of one length, the same for every provider."""

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
    """Describe a step: batch requests of context tokens each, the new ones included.

    Attributes:
        drafts: new tokens of a request: 1 when it decodes, more when drafts are verified.
    """

    batch: int
    context: int
    heads: AttentionShape
    drafts: int = 1

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
        q: [B * drafts, Hq, D]; k_new, v_new: [B * drafts, Hk, D]; the drafts of a request stand together, in order.
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
        rows = shape.batch * shape.drafts
        q = draw(source, rows, heads.num_qo_heads, heads.head_dim)
        new = [draw(source, rows, heads.num_kv_heads, heads.head_dim) for _ in range(2)]
        pages = distinct_pages(source, unique, heads)
        page_of = torch.randint(unique, (shape.batch, shape.pages), generator=source, device=DEVICE)
        return cls(shape, q, *new, pages, page_of)

    @property
    def samples(self) -> list[int]:
        """The rows of q that a check computes: the first and the last draft of a request, the last of another."""
        rows = self.shape.batch * self.shape.drafts
        return sorted({0, self.shape.drafts - 1, rows - 1})

    def keys_values(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [n, Hk, D] of the tokens that a row of q sees, its own the last."""
        b, draft = divmod(row, self.shape.drafts)
        k, v = (x[self.page_of[b]].flatten(0, 1)[: self.shape.context].clone() for x in self.pages)
        own, end = slice(b * self.shape.drafts, (b + 1) * self.shape.drafts), self.shape.context - self.shape.drafts
        k[end:], v[end:] = self.k_new[own], self.v_new[own]
        return k[: end + draft + 1], v[: end + draft + 1]

    @property
    def seq_lens(self) -> torch.Tensor:
        """Tokens that each row of q sees, its own included: int32 [B * drafts]."""
        ends = torch.arange(self.shape.drafts, device=DEVICE) + self.shape.context - self.shape.drafts + 1
        return ends.repeat(self.shape.batch).int()

    def physical_pages(self) -> torch.Tensor:
        """Return a random physical page for every logical one, int32 [B, P]; page 0 is padding."""
        order = torch.randperm(self.page_of.numel(), device=DEVICE) + 1
        return order.view_as(self.page_of).int()

    def paged(self, page_table: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return keys and values in pages [P, G, Hk, D] as a page table places them; page 0 is not written."""
        at, drafts = page_table.flatten().long(), self.shape.drafts
        positions = torch.arange(self.shape.context - drafts, self.shape.context, device=DEVICE)
        own = page_table[:, positions // PAGE].long()
        found = []
        for pages, new in zip(self.pages, (self.k_new, self.v_new), strict=True):
            cache = torch.empty(page_table.numel() + 1, *pages.shape[1:], dtype=dtype, device=DEVICE)
            cache[at] = pages.to(dtype)[self.page_of.flatten()]
            cache[own, positions % PAGE] = new.to(dtype).unflatten(0, (-1, drafts))
            found.append(cache)
        return found

    def exact(self, row: int) -> torch.Tensor:
        """Return float32 attention of a row of q in plain torch, [Hq, D]."""
        return attend_exactly(self.q[row], *self.keys_values(row))
