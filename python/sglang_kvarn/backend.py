# SPDX-License-Identifier: Apache-2.0
"""The attention backend: hands SGLang's tensors to kvarn_kernels."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from kvarn_kernels.attention import Attention, Step
from kvarn_kernels.batch import QKV, Limits

from sglang_kvarn import balanced_layers, budget, compat, hook, refusals, rings, scales, settings
from sglang_kvarn.metadata import DecodeBuffers, extend_batch
from sglang_kvarn.refused import Refused

logger = logging.getLogger(__name__)


class KVarNAttentionBackend(compat.AttentionBackend):
    """Attend over records and rings. One instance per model runner."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        hook.verify_hooks()
        pool = rings.records_of(model_runner.token_to_kv_pool)
        if pool is None:
            raise Refused(
                f"--attention-backend kvarn needs a kvarn cache, not {type(model_runner.token_to_kv_pool).__name__}: "
                "add --kv-cache-dtype kvarn or drop --attention-backend"
            )
        refusals.check_device(model_runner.device, model_runner.dtype)
        refusals.check_states_on_device(model_runner.device, model_runner.model_config)
        windows = compat.windows_in_records(model_runner.model_config)
        refusals.check_layers(model_runner.model, pool.layer_ids, pool.shape, windows)
        self.pool = pool
        # copies to and from host memory wait for it
        pool.forward_stream = getattr(model_runner, "forward_stream", None)
        pool.balance_tag = partial(balanced_layers.fingerprint, model_runner.model)
        # SGLang sizes masks of drafts by it, where it has no `verify_mask`
        self.max_context_len = model_runner.model_config.context_len
        # SGLang's HybridLinearAttnBackend takes them from here
        self.token_to_kv_pool, self.req_to_token_pool = pool, model_runner.req_to_token_pool
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        limits = self._limits(model_runner)
        self._buffers = DecodeBuffers(limits.decode_batch, self.req_to_token, pool.rings)
        device = self.req_to_token.device
        self.attention = Attention(pool.shape, pool.config, device, limits, sliding_windows=windows)
        if self.req_to_token.is_cuda:
            first, sinks = pool.layer_cache(pool.layer_ids[0]), compat.attention_sinks(model_runner.model)
            self.attention.warm_up(first, pool.rings.pages_per_ring, sinks)
        self._step: Step | None = None
        drafts = limits.draft_tokens
        self._verify_mask = compat.unread_verify_mask(limits.decode_batch // drafts, drafts, model_runner.device)
        logger.info("KVarN on %s: %s", self.req_to_token.device, self.attention.describe())
        scales.log_unused(model_runner)

    def _limits(self, model_runner: Any) -> Limits:
        # a decode server has more rows than requests that run: others are received meanwhile
        requests, tokens = self.req_to_token_pool.size, self.req_to_token.shape[1]
        pages, context_len = -(-tokens // settings.PAGE_SIZE), model_runner.model_config.context_len
        limits = budget.bounds(model_runner.server_args, context_len).steps(requests, pages)
        # rings have room for the most drafts; where their number changes, each has a backend
        return replace(limits, draft_tokens=compat.verified_tokens(model_runner.server_args))

    @property
    def verify_mask(self) -> Any:
        """Where SGLang is to write which draft follows which; a chain needs no mask, so nobody reads it."""
        return self._verify_mask

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the static buffers larger if a graph is; called before any capture."""
        if max_num_tokens > self._buffers.max_batch:
            self._buffers = DecodeBuffers(max_num_tokens, self.req_to_token, self.pool.rings)
            self.attention.reserve(max_num_tokens)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the seq_len of padded requests: one token, on page 0."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Describe the step, before the forward pass and before every capture and replay."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_decode():
            self._step = self.attention.plan(self._buffers.fill(forward_batch))
        elif mode.is_target_verify():
            drafts = forward_batch.spec_info.draft_token_num
            self._step = self.attention.plan(self._buffers.fill(forward_batch, drafts))
        else:
            self._step = self.attention.plan(extend_batch(forward_batch, self.req_to_token, self.pool.rings))

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend one new token per request: q [B, Hq * D], k and v [B, Hk, D]; return [B, Hq * D]."""
        return self._attend((q, k, v), layer, forward_batch, save_kv_cache, kwargs)

    def forward_extend(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Attend the new tokens of each request: q [T, Hq * D], k, v [T, Hk, D]; return [T, Hq * D]."""
        return self._attend((q, k, v), layer, forward_batch, save_kv_cache, kwargs)

    def _attend(
        self,
        qkv: tuple[torch.Tensor, ...],
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        extra: dict[str, Any],
    ) -> torch.Tensor:
        q, k, v = qkv
        step = self._step
        assert step is not None, "init_forward_metadata comes before the forward pass"
        sinks = extra.pop("sinks", None)
        refusals.check_call(k, save_kv_cache, extra)
        head_dim = layer.head_dim
        q = q.reshape(-1, layer.tp_q_head_num, head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, head_dim)
        v = v.reshape(-1, layer.tp_v_head_num, head_dim)
        q, k = balanced_layers.multiplied(layer, q, k)
        out = _output(q, step.batch.num_tokens, compat.attention_output(forward_batch))
        cache = self.pool.layer_cache(layer.layer_id)
        # SGLang counts the tokens before the query's own, and has -1 for all
        window = layer.sliding_window_size + 1
        self.attention.attend(QKV(q, k, v), out, cache, step, layer.scaling, sinks, window)
        balanced_layers.add_output_bias(layer, out)
        return out.view(-1, layer.tp_q_head_num * head_dim)


def _output(q: torch.Tensor, num_tokens: int, wanted: torch.Tensor | None) -> torch.Tensor:
    """Return where the output goes: [T, Hq, D] contiguous, as the queries are; rows behind the tokens are zeros.

    Args:
        q: of the layer; num_tokens: of the step, at most T, since a prefill graph pads the tokens.
        wanted: from `compat.attention_output`.
    """
    if q.shape[0] > num_tokens:
        # so that nothing undefined flows on through these rows
        return torch.zeros_like(q, memory_format=torch.contiguous_format)
    if wanted is not None and wanted.numel() == q.numel() and wanted.dtype == q.dtype and wanted.is_contiguous():
        return wanted.view(q.shape)
    return torch.empty_like(q, memory_format=torch.contiguous_format)
