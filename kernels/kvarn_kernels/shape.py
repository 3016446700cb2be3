# SPDX-License-Identifier: Apache-2.0
"""The shape of a model's attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class AttentionShape:
    """Describe the attention of one layer on one rank.

    Example: a layer of Qwen3-8B on one GPU has 32 query heads and 8 KV heads of 128 channels in bfloat16.

    Attributes:
        num_qo_heads, num_kv_heads: heads of this rank; head_dim: channels of a head.
        dtype: the model's, that of q, k, v, of the output and of exact tokens.
    """

    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.num_qo_heads // self.num_kv_heads

    @property
    def full_token_bytes(self) -> int:
        """Bytes of the exact key and value of a token, all KV heads; 4,096 for the example."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize
