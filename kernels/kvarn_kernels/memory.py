# SPDX-License-Identifier: Apache-2.0
"""The memory of one layer: records by page, rings by request row."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn_kernels.record.format import first_token_dtype


@dataclass(frozen=True)
class LayerCache:
    """Hold the memory of one layer. P pages (page 0 is the padding target), R request rows (row 0 likewise).

    Attributes:
        records: uint8 [P, Hk, record_bytes], contiguous; record of page p and KV head h.
        ring_k, ring_v: [R, ring_len, Hk, D] model dtype, contiguous, rotated; the token at position i of the request
            in row r is at [r, i % ring_len]. ring_len is `KVarNConfig.ring_len` or more.
    """

    records: torch.Tensor
    ring_k: torch.Tensor
    ring_v: torch.Tensor

    @property
    def ring_len(self) -> int:
        """Tokens in the ring of a row."""
        return self.ring_k.shape[1]

    @property
    def num_kv_heads(self) -> int:
        """Hk."""
        return self.ring_k.shape[2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.ring_k.shape[3]

    @property
    def dtype(self) -> torch.dtype:
        """The model's dtype."""
        return self.ring_k.dtype

    @property
    def first_tokens(self) -> torch.Tensor:
        """The records in the dtype of their exact first tokens: [P, Hk, record_bytes / 2]."""
        return self.records.view(first_token_dtype(self.dtype))
