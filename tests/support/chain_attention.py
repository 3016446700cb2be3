# SPDX-License-Identifier: Apache-2.0
"""Attention to a 16-bit cache in torch, for models on a machine without a GPU that draft, or that verify drafts.

It takes the place of SGLang's Triton kernels, which the interpreter runs hundreds of times slower.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from sglang_kvarn import compat
from torch.nn.functional import scaled_dot_product_attention

_MODULE = "sglang.srt.layers.attention.triton_backend"


def install() -> None:
    """Put the torch form in place of SGLang's Triton backend, for good."""
    module = compat.resolve(_MODULE)
    module.TritonAttnBackend = ChainAttention
    module.TritonMultiStepDraftBackend = ChainSteps
    corpus = compat.resolve("sglang.srt.speculative.cpp_ngram.ngram_corpus.NgramCorpus")
    corpus.batch_get = always_chains(corpus.batch_get)


class ChainAttention(compat.AttentionBackend):
    """Attend to everything up to a token's own position; layers of encoders also to the tokens behind it in a step."""

    needs_cpu_seq_lens = False
    # what `triton_attention_on_cpu` looks at, if it is installed later
    sliding_window_size = None

    def __init__(self, model_runner, *args, **kwargs) -> None:
        super().__init__()
        self.rows, self.pool = model_runner.req_to_token_pool.req_to_token, model_runner.token_to_kv_pool
        self.max_context_len = model_runner.model_config.context_len

    def init_forward_metadata(self, forward_batch) -> None:
        """Do nothing: rows and positions say all."""

    def forward_decode(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
        return self.forward_extend(q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(self, q, k, v, layer, forward_batch, save_kv_cache=True, **kwargs) -> torch.Tensor:
        if save_kv_cache:
            shape = (-1, layer.tp_k_head_num, layer.head_dim)
            self._store(layer, forward_batch.out_cache_loc, k.view(shape), v.view(shape))
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        requests = forward_batch.req_pool_indices.tolist()
        lens = forward_batch.extend_seq_lens
        lens = [len(q) // len(requests)] * len(requests) if lens is None or sum(lens) != len(q) else lens.tolist()
        looks_ahead = layer.attn_type == compat.AttentionType.ENCODER_ONLY
        outs = []
        queries = q.view(-1, layer.tp_q_head_num, layer.head_dim).split(lens)
        for b, (row, x) in enumerate(zip(requests, queries, strict=True)):
            places = forward_batch.positions.split(lens)[b]
            end = int(forward_batch.seq_lens[b]) + len(x) if looks_ahead else int(places[-1]) + 1
            slots = self.rows[row, :end]
            own = (buffer[slots].to(x.dtype).transpose(0, 1)[None] for buffer in (keys, values))
            mask = None if looks_ahead else torch.arange(end) <= places[:, None]
            scale = {"scale": layer.scaling, "enable_gqa": True}
            outs.append(scaled_dot_product_attention(x.transpose(0, 1)[None], *own, mask, **scale)[0].transpose(0, 1))
        return torch.cat(outs).reshape(q.shape)

    def _store(self, layer, slots, k, v) -> None:
        keys, values = self.pool.get_kv_buffer(layer.layer_id)
        keys[slots], values[slots] = k.to(keys.dtype), v.to(values.dtype)


class ChainSteps:
    """Hold what attends in each step of a draft model; the last draft of a chain is not run."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner, topk: int, speculative_num_steps: int) -> None:
        assert topk == 1, "only chains are drafted"
        self.attn_backends = [ChainAttention(model_runner) for _ in range(speculative_num_steps - 1)]
        self.max_context_len = self.attn_backends[0].max_context_len

    def init_forward_metadata(self, forward_batch) -> None:
        """Do nothing, as each step."""


def always_chains(batch_get):
    """Return the function of SGLang's corpus with drafts that follow one another, whatever the cache.

    The plugin does that for its own caches, and a cache that it is compared with is to verify the same drafts.
    """

    @functools.wraps(batch_get)
    def in_a_chain(corpus, req_ids, *args):
        tokens, mask = batch_get(corpus, req_ids, *args)
        drafts = tokens.size // len(req_ids)
        chain = np.tril(np.ones((drafts, drafts), mask.dtype))
        return tokens, np.tile(chain, (len(req_ids), 1, 1)).reshape(mask.shape)

    return in_a_chain
