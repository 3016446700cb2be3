# SPDX-License-Identifier: Apache-2.0
"""A causal language model whose attention can be given any cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvarn_kernels import balance

from benchmarks.quality import caches
from benchmarks.quality.frames import UNTOUCHED, Frame

ATTENTION = "bench_quality"
# classes of transformers that compute what SGLang's class of this name does, with RoPE over whole heads
BALANCED = {
    *("LlamaAttention", "MixtralAttention", "Qwen2Attention", "Qwen2MoeAttention"),
    *("Qwen3Attention", "Qwen3MoeAttention", "Gemma3Attention"),
}
# what classes of transformers add to the weight of an RMSNorm
NORM_OFFSETS = {"Gemma3RMSNorm": 1}


class Model:
    """A model in float32 that attends with a cache.

    Attributes:
        head_dim, kv_heads: of the network.
        dtype: of q, k and v as they enter the cache.
    """

    def __init__(self, network: Any, tokenizer: Any, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AttentionInterface

        AttentionInterface.register(ATTENTION, self._attention)
        network.set_attn_implementation(ATTENTION)
        self.network, self.tokenizer = network.to(device), tokenizer
        self.device, self.dtype = device, dtype
        self.attend, self.frame = caches.unquantised().attend, UNTOUCHED
        # what the weights of an attention module lack, by module
        self.balanced: dict[Any, balance.Balance] = {}
        config = self.network.config.get_text_config()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.kv_heads = config.num_key_value_heads

    @classmethod
    def load(cls, folder: str, device: torch.device, dtype: torch.dtype) -> Model:
        """Return the model of a folder."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return cls(network, AutoTokenizer.from_pretrained(folder), device, dtype)

    def _attention(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scaling: float,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend [1, H, T, D] after RoPE with the cache and in the frame of this pass: [1, T, Hq, D]."""
        chosen, inputs = self.balanced.get(module), [x[0].transpose(0, 1) for x in (q, k, v)]
        if chosen is not None and chosen.queries_and_keys is not None:
            inputs[:2] = (x * factors for x, factors in zip(inputs[:2], chosen.queries_and_keys, strict=True))
        inputs = self.frame.enter(*inputs)
        cached = (x.to(self.dtype).contiguous() for x in inputs)
        out = self.frame.leave(self.attend(*cached, scaling, sliding_window or 0))
        if chosen is not None and (bias := chosen.output_bias) is not None:
            out = out + bias.repeat_interleave(out.shape[1] // len(bias), 0)
        return out[None].to(q.dtype), None

    @contextmanager
    def form(self, frame: Frame, balanced: bool) -> Iterator[None]:
        """Be the model in another form within a with statement, with balanced weights where a server balances them."""
        layers = [layer for layer in self.network.get_decoder().layers if hasattr(layer, "self_attn")]
        own, self.frame = [layer.self_attn for layer in layers], frame
        try:
            for layer in layers:
                layer.self_attn = copy.deepcopy(layer.self_attn).requires_grad_(False)
                if frame.reweigh is not None:
                    frame.reweigh(layer.self_attn)
                if balanced:
                    self._balance(layer.self_attn, layer.input_layernorm)
            yield
        finally:
            self.frame = UNTOUCHED
            self.balanced.clear()
            for layer, module in zip(layers, own, strict=True):
                layer.self_attn = module

    def _balance(self, module: Any, norm: Any) -> None:
        if type(module).__name__ not in BALANCED:
            return
        projections = [(linear.weight, linear.bias) for linear in (module.q_proj, module.k_proj, module.v_proj)]
        offset, norms = NORM_OFFSETS.get(type(norm).__name__, 0), None
        if hasattr(module, "q_norm"):
            norms = balance.Norms(module.q_norm.weight, module.k_norm.weight, offset)
        weights = balance.attention_weights(
            [tuple(None if x is None else x.unflatten(0, (-1, module.head_dim)) for x in pair) for pair in projections],
            module.o_proj.weight,
            balance.rope_partners(module.head_dim, module.head_dim, neox=True),
            inputs=norm.weight.detach() + offset,
            norms=norms,
        )
        if (chosen := balance.choose(weights)) is not None:
            chosen.put_in(weights)
            self.balanced[module] = chosen

    @torch.inference_mode()
    def logits(self, tokens: list[int], attend: caches.Attend) -> torch.Tensor:
        """Return the logits [T, V] of a text with a cache, in the form that the model has."""
        self.attend = attend
        ids = torch.tensor([tokens], device=self.device)
        return self.network(ids, use_cache=False).logits[0]

    def error(self, frame: Frame, balanced: bool) -> float:
        """Return how far the logits of a form are from the model's without a cache, in float32: relative RMS."""
        tokens, exact = list(range(1, 65)), caches.unquantised().attend
        dtype, self.dtype = self.dtype, torch.float32
        try:
            expected = self.logits(tokens, exact)
            with self.form(frame, balanced):
                return ((self.logits(tokens, exact) - expected).norm() / expected.norm()).item()
        finally:
            self.dtype = dtype
