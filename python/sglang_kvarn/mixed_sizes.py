# SPDX-License-Identifier: Apache-2.0
"""Sizes the pool of a model with sliding windows: tokens of records, and tokens of sliding windows."""

from __future__ import annotations

from typing import Any

from sglang_kvarn import budget, compat


class MixedPoolConfigurator(compat.MemoryPoolConfigurator):
    """Size both parts. SGLang asks it where it would ask a configurator of its own."""

    def __init__(self, kvc: Any) -> None:
        """Read shapes and arguments from SGLang's KVCacheConfigurator."""
        self._share = budget.sliding_share(kvc)
        self._most: int | None = None

    def calculate_pool_sizes(self, available_bytes: int, page_size: int) -> Any:
        """Return SGLang's MemoryPoolConfig for the bytes that both parts may take."""
        tokens, self._most = self._share.of_memory(available_bytes)
        return self._found(tokens, self._most)

    def calculate_pool_sizes_from_max_tokens(self, max_total_num_tokens: int, page_size: int) -> Any:
        """Return it for fewer tokens than there is memory for."""
        tokens = max_total_num_tokens // page_size * page_size
        return self._found(tokens, self._share.of_tokens(tokens, self._most))

    def _found(self, tokens: int, sliding_tokens: int) -> Any:
        return compat.MemoryPoolConfig(
            max_total_num_tokens=tokens,
            full_max_total_num_tokens=tokens,
            swa_max_total_num_tokens=sliding_tokens,
        )

