# SPDX-License-Identifier: Apache-2.0
"""The attention backend of a model with sliding windows: ours for the records, one of SGLang's for the windows."""

from __future__ import annotations

from typing import Any

import torch

from sglang_kvarn import compat
from sglang_kvarn.backend import KVarNAttentionBackend


class MixedBackend(compat.AttentionBackend):
    """Hand each layer to the backend that knows its cache, and each step to both."""

    def __init__(self, full: KVarNAttentionBackend, sliding: Any, sliding_ids: list[int]) -> None:
        """Compose two backends.

        Args:
            sliding: made by SGLang as ``--attention-backend`` says; sliding_ids: the layers that it attends.
        """
        self._full, self._sliding, self._sliding_ids = full, sliding, frozenset(sliding_ids)
        # SGLang walks it where a backend is made of others
        self.attn_backend_list = [full, sliding]
        self.token_to_kv_pool, self.req_to_token_pool = sliding.token_to_kv_pool, full.req_to_token_pool
        self.needs_cpu_seq_lens = full.needs_cpu_seq_lens or sliding.needs_cpu_seq_lens
        self.max_context_len = full.max_context_len

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Describe a step that runs without a graph."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata(forward_batch)

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Describe a step before a graph of it is captured or replayed."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Record what describes a step within its graph."""
        for backend in self.attn_backend_list:
            backend.init_forward_metadata_in_graph(forward_batch)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make static buffers."""
        for backend in self.attn_backend_list:
            backend.init_cuda_graph_state(max_bs, max_num_tokens)

    def on_after_cuda_graph_warmup(self) -> None:
        """Pass on that the steps before a capture have run."""
        for backend in self.attn_backend_list:
            backend.on_after_cuda_graph_warmup()

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the seq_len of padded requests, one token for both."""
        return self._full.get_cuda_graph_seq_len_fill_value()

    def shared_read_ends(self, forward_mode: Any) -> Any:
        """Return when a step has read what SGLang may change then; from 0.5.23 on."""
        ends = [backend.shared_read_ends(forward_mode) for backend in self.attn_backend_list]
        return max(ends, key=lambda end: end.value)

    def forward(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend in a layer."""
        backend = self._sliding if layer.layer_id in self._sliding_ids else self._full
        return backend.forward(q, k, v, layer, forward_batch, save_kv_cache, **kwargs)
