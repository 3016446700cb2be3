# SPDX-License-Identifier: Apache-2.0
"""The memory of one layer: pages, each of records or of exact tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from kvarn_kernels.record.format import first_token_dtype


@dataclass(frozen=True)
class LayerCache:
    """Hold the memory of one layer. P pages; page 0 is the padding target.

    Attributes:
        records: uint8 [P, Hk, record_bytes], contiguous; the record of page p and KV head h, or its exact tokens if the
            page belongs to a ring (`record.ring`).
        head_dim: D; dtype: the model's, that of exact tokens.
    """

    records: torch.Tensor
    head_dim: int
    dtype: torch.dtype

    @property
    def num_kv_heads(self) -> int:
        """Hk."""
        return self.records.shape[1]

    @cached_property
    def exact(self) -> torch.Tensor:
        """The pages in the model's dtype, as rings hold them: [P, Hk, record_bytes / itemsize]."""
        return self.records.view(self.dtype)

    @cached_property
    def first_tokens(self) -> torch.Tensor:
        """The records in the dtype of their exact first tokens: [P, Hk, record_bytes / 2]."""
        return self.records.view(first_token_dtype(self.dtype))
