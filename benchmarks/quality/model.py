# SPDX-License-Identifier: Apache-2.0
"""A causal language model whose attention can be given any cache."""

from __future__ import annotations

from typing import Any

import torch

from quality import caches
from quality.frames import UNTOUCHED, Frame

ATTENTION = "bench_quality"


class Model:
    """A model in float32 that attends with a cache.

    Attributes:
        head_dim, kv_heads: of the network.
        dtype: of q, k and v as they enter the cache.
    """

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        AttentionInterface.register(ATTENTION, self._attention)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION
        ).to(device)
        self.device, self.dtype = device, dtype
        self.attend, self.frame = caches.unquantised().attend, UNTOUCHED
        config = self.network.config.get_text_config()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads = config.num_key_value_heads

    def _attention(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend [1, H, T, D] after RoPE with the cache and in the frame of this pass: [1, T, Hq, D]."""
        inputs = self.frame.enter(*(x[0].transpose(0, 1) for x in (q, k, v)))
        out = self.attend(*(x.to(self.dtype).contiguous() for x in inputs), scaling)
        return self.frame.leave(out)[None].to(q.dtype), None

    @torch.inference_mode()
    def logits(self, tokens: list[int], attend: caches.Attend, frame: Frame = UNTOUCHED) -> torch.Tensor:
        """Return the logits [T, V] of a text with a cache, which is fed in a frame."""
        self.attend, self.frame = attend, frame
        ids = torch.tensor([tokens], device=self.device)
        return self.network(ids, use_cache=False).logits[0]
