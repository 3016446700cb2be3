# SPDX-License-Identifier: Apache-2.0
"""The tensors that the attention wrappers read and write: one layer's memory, and one batch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from kvarn_kernels import tile

if TYPE_CHECKING:
    from kvarn_kernels.prefill import PrefillPlan


@dataclass(frozen=True)
class LayerCache:
    """Hold the memory of one layer. P pages (page 0 is the padding target), R request rows (row 0 likewise).

    Attributes:
        records: uint8 [P, Hk, record_bytes], contiguous; record of page p and KV head h.
        ring_k, ring_v: [R, ring_len, Hk, D] model dtype, contiguous, rotated; the token at position i of the request
            in row r is at [r, i % ring_len].
    """

    records: torch.Tensor
    ring_k: torch.Tensor
    ring_v: torch.Tensor


@dataclass(frozen=True)
class DecodeWorkspace:
    """Hold what the decode kernels of all layers share; made once by `decode.make_workspace`, so that CUDA graphs see
    fixed addresses.

    A step of B requests has S splits (`decode_plan`), at most max_splits[B - 1].

    Attributes:
        rotated_q: float32 [B_max, Hq, D], the rotated query.
        partial_out: float32 [S_max, Hq, D], the normalised output of each split.
        partial_lse: float32 [S_max, Hq], base-2 log sum of exp; -inf where a split holds no key.
        split_requests: int32 [S_max], the request of each split.
        split_indptr: int32 [B_max + 1], the first split of each request.
        wanted_splits, max_splits: for each batch size from 1 to B_max.
    """

    rotated_q: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    split_requests: torch.Tensor
    split_indptr: torch.Tensor
    wanted_splits: tuple[int, ...]
    max_splits: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        tensors = (self.rotated_q, self.partial_out, self.partial_lse, self.split_requests, self.split_indptr)
        return sum(x.nbytes for x in tensors)


@dataclass(frozen=True)
class DecodeBatch:
    """Describe a decode step: B requests, one new token each. All tensors on the device, none is read by the host.

    Attributes:
        rows: int64 [B], request row. Padded requests have row 0, seq_len 1, page 0.
        seq_lens: int32 [B], tokens including the new one (its position is seq_len - 1).
        page_table: int32 [B, P_max], page id of each page of the request; only pages that hold tokens are valid.
        store_pages: int32 [B], page of the new token, the target of the encoder when the token fills it.
        exact_starts: int32 [B], tokens taken from the prefix cache, a multiple of the page.
        workspace: buffers for at least B requests, with the step's plan (`decode_plan.plan_decode`); None for the
            torch form.
    """

    rows: torch.Tensor
    seq_lens: torch.Tensor
    page_table: torch.Tensor
    store_pages: torch.Tensor
    exact_starts: torch.Tensor
    workspace: DecodeWorkspace | None = None

    @property
    def num_tokens(self) -> int:
        """New tokens, one per request."""
        return self.rows.shape[0]


@dataclass(frozen=True)
class ExtendBatch:
    """Describe an extend (prefill) step: B requests with one or more new tokens each, T in total.

    Attributes:
        rows, page_table, exact_starts: as in `DecodeBatch`.
        prefix_lens: int32 [B], tokens before the new ones, any number (not only whole pages).
        seq_lens: int32 [B], tokens including the new ones.
        qo_indptr: int32 [B + 1], first new token of each request in q, k, v.
        prefix_lens_host, seq_lens_host: the same numbers as Python lists; they size the grids.
        prefill: the step as FlashInfer runs it; None for the Triton and the torch form.
    """

    rows: torch.Tensor
    prefix_lens: torch.Tensor
    seq_lens: torch.Tensor
    qo_indptr: torch.Tensor
    page_table: torch.Tensor
    exact_starts: torch.Tensor
    prefix_lens_host: list[int]
    seq_lens_host: list[int]
    prefill: PrefillPlan | None = None

    @cached_property
    def new_tokens(self) -> list[int]:
        """New tokens of each request."""
        return [seq - prefix for prefix, seq in zip(self.prefix_lens_host, self.seq_lens_host, strict=True)]

    @cached_property
    def num_tokens(self) -> int:
        """New tokens of all requests; q, k, v may have more rows (padding), which are neither read nor written."""
        return sum(self.new_tokens)

    @cached_property
    def max_full_pages(self) -> int:
        """The most pages that one request completes."""
        lens = zip(self.prefix_lens_host, self.seq_lens_host, strict=True)
        return max((seq // tile.TILE_SIZE - prefix // tile.TILE_SIZE for prefix, seq in lens), default=0)
