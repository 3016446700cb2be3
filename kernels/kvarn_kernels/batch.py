# SPDX-License-Identifier: Apache-2.0
"""A step of a serving engine and what bounds it, and nothing of how it runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from kvarn_kernels.record.tile import TILE_SIZE


class QKV(NamedTuple):
    """Hold the new tokens of a step in one layer.

    Attributes:
        q: [T, Hq, D]; k, v: [T, Hk, D]; last dimension contiguous.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


@dataclass(frozen=True)
class DecodeBatch:
    """Describe a decode or verify step: B rows, one new token each. All on the device, nothing is read by the host.

    In a decode step a row is a request. In a verify step of speculative decoding a request has a row for each of its
    draft tokens, at consecutive lengths. All of them are stored before one is attended, and one that ends a page has it
    encoded, whether it is accepted later or not: whoever reads a record whose tokens are not all accepted is a draft
    after them and rejected itself, and the step that completes the page with accepted tokens encodes it once more.

    Attributes:
        ring_pages: int32 [B, N], contiguous, pages of the ring of each row's request. Padded rows have page 0
            everywhere and less than a page of tokens.
        seq_lens: int32 [B], tokens including the new one (its position is seq_len - 1).
        page_table: int32 [B, P_max], page id of each page of the request; only pages that hold tokens are valid.
        store_pages: int32 [B], page of the new token, the target of the encoder when the token fills it.
        exact_starts: int32 [B], tokens taken from the prefix cache, a multiple of the page.
        drafts: rows of each request, which stand together; 1 in a decode step.
    """

    ring_pages: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    store_pages: torch.Tensor
    exact_starts: torch.Tensor
    drafts: int = 1

    @property
    def num_tokens(self) -> int:
        """New tokens, one per row."""
        return self.seq_lens.shape[0]


@dataclass(frozen=True)
class ExtendBatch:
    """Describe an extend (prefill) step: B requests with one or more new tokens each, T in total.

    Attributes:
        ring_pages, page_table, exact_starts: as in `DecodeBatch`.
        prefix_lens: int32 [B], tokens before the new ones, any number (not only whole pages).
        seq_lens: int32 [B], tokens including the new ones.
        qo_indptr: int32 [B + 1], first new token of each request in q, k, v.
        prefix_lens_host, seq_lens_host: the same numbers as Python lists; they size the grids.
    """

    ring_pages: torch.Tensor
    prefix_lens: torch.Tensor
    seq_lens: torch.Tensor
    qo_indptr: torch.Tensor
    page_table: torch.Tensor
    exact_starts: torch.Tensor
    prefix_lens_host: list[int]
    seq_lens_host: list[int]

    @cached_property
    def new_tokens(self) -> list[int]:
        """New tokens of each request."""
        return [seq - prefix for prefix, seq in zip(self.prefix_lens_host, self.seq_lens_host, strict=True)]

    @cached_property
    def num_tokens(self) -> int:
        """New tokens of all requests; q, k, v may have more rows (padding), which are neither read nor written."""
        return sum(self.new_tokens)

    def stored_tokens(self, page_tokens: int) -> int:
        """Return the most new tokens that a request stores in its ring; page_tokens: that a page of a ring has."""
        return min(self.ring_pages.shape[1] * page_tokens, max(self.new_tokens, default=0))

    @cached_property
    def full_pages(self) -> list[int]:
        """Pages that each request completes."""
        lens = zip(self.prefix_lens_host, self.seq_lens_host, strict=True)
        return [seq // TILE_SIZE - prefix // TILE_SIZE for prefix, seq in lens]

    @cached_property
    def max_full_pages(self) -> int:
        """The most pages that one request completes."""
        return max(self.full_pages, default=0)


@dataclass(frozen=True)
class Limits:
    """Bound the steps of a server; they size the workspaces.

    Attributes:
        decode_batch: rows of a decode or verify step, padding included.
        request_pages: pages of the longest request.
        extend_requests: requests of an extend step.
        chunk_pages: pages that the new tokens of a request touch in one extend step.
        draft_tokens: rows of a request in a verify step, 1 without speculative decoding.
    """

    decode_batch: int
    request_pages: int
    extend_requests: int
    chunk_pages: int
    draft_tokens: int = 1

    @property
    def extend_pages(self) -> int:
        """The most pages that an extend step reads: all of every request, exact and as records."""
        return self.extend_requests * 2 * self.request_pages
