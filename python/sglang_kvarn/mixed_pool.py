# SPDX-License-Identifier: Apache-2.0
"""The token pool of a model with sliding windows: records for the layers with full attention, 16 bits for the rest.

SGLang's allocator for such models hands out slots of the records; a table of its own gives the slot of the sliding
windows that belongs to each.
"""

from __future__ import annotations

from typing import Any

import torch

from sglang_kvarn import compat
from sglang_kvarn.pool import KVarNTokenToKVPool


class MixedPool(compat.SWAKVPool):
    """Hold records, and 16-bit tokens for layers with a sliding window. A subclass, as SGLang asks by class.

    Attributes:
        full_kv_pool: the records; swa_kv_pool: SGLang's pool of the sliding windows.
    """

    def __init__(
        self, records: KVarNTokenToKVPool, tokens: int, layer_ids: list[int], shape: tuple[int, int, int]
    ) -> None:
        """Make the pool of the sliding windows beside the records.

        Args:
            tokens: of the sliding windows, whole pages; layer_ids: of the layers that have them.
            shape: of these layers: KV heads, channels of a key, channels of a value.
        """
        heads, head_dim, v_head_dim = shape

        def make(**arguments: Any) -> Any:
            # SGLang calls it for both parts, and names the shape of a sliding window for one of them
            return compat.MHATokenToKVPool(**arguments) if "swa_head_num" in arguments else records

        super().__init__(
            size=records.size,
            size_swa=tokens,
            page_size=records.page_size,
            dtype=records.shape.dtype,
            head_num=records.head_num,
            head_dim=records.head_dim,
            v_head_dim=records.head_dim,
            swa_head_num=heads,
            swa_head_dim=head_dim,
            swa_v_head_dim=v_head_dim,
            swa_attention_layer_ids=layer_ids,
            full_attention_layer_ids=records.layer_ids,
            device=records.device,
            token_to_kv_pool_class=make,
        )
        # no row for a slot, but the width of one, for which SGLang's backends ask
        self._no_rows = torch.empty(0, heads, v_head_dim, dtype=self.dtype, device=self.device)

    def get_kv_size_bytes(self) -> tuple[int, int]:
        """Return the bytes of the records and those of the sliding windows."""
        return self.full_kv_pool.get_kv_size_bytes(), sum(self.swa_kv_pool.get_kv_size_bytes())

    def register_layer_transfer_counter(self, layer_transfer_counter: Any) -> None:
        """Let both parts wait for what host memory brings: records are read past this pool."""
        super().register_layer_transfer_counter(layer_transfer_counter)
        self.full_kv_pool.register_layer_transfer_counter(layer_transfer_counter)

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Return the values of a sliding window; of another layer no row, whose width SGLang's Triton backend asks."""
        _, is_sliding = self.layers_mapping[layer_id]
        return super().get_value_buffer(layer_id) if is_sliding else self._no_rows

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Move what the records move, nothing: accepted drafts of a chain have the slots of their places in both."""
        self.full_kv_pool.move_kv_cache(tgt_loc, src_loc)

    def request_state_transfer_indices(self, row: int, tokens: int) -> list[int]:
        """Return pages of the records, which another server gets beside sliding windows; as the records do."""
        return self.full_kv_pool.request_state_transfer_indices(row, tokens)
