# SPDX-License-Identifier: Apache-2.0
"""The attention backend: hands SGLang's tensors to kvarn_kernels."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import torch
from kvarn_kernels import ops
from kvarn_kernels.cache import DecodeBatch, ExtendBatch

from sglang_kvarn import balanced_layers, budget, compat, hooks, refusals, scales
from sglang_kvarn.metadata import DecodeBuffers, extend_batch
from sglang_kvarn.pool import KVarNTokenToKVPool
from sglang_kvarn.refused import Refused

if TYPE_CHECKING:
    from kvarn_kernels.prefill import PrefillWorkspace

logger = logging.getLogger(__name__)


class KVarNAttentionBackend(compat.AttentionBackend):
    """Attend over records and rings. One instance per model runner."""

    needs_cpu_seq_lens = False

    def __init__(self, model_runner: Any) -> None:
        hooks.verify_hooks()
        pool = model_runner.token_to_kv_pool
        if not isinstance(pool, KVarNTokenToKVPool):
            raise Refused(
                f"--attention-backend kvarn needs a kvarn cache, not {type(pool).__name__}: "
                "add --kv-cache-dtype kvarn or drop --attention-backend"
            )
        refusals.check_device(model_runner.device, model_runner.dtype)
        refusals.check_layers(model_runner.model)
        balanced_layers.balance_layers(model_runner)
        self.pool, self.config = pool, pool.config
        self.req_to_token = model_runner.req_to_token_pool.req_to_token
        self.form = ops.attention_form(self.req_to_token.device)
        self._qo_heads = model_runner.model_config.num_attention_heads // compat.get_parallel().attn_tp_size
        rows = self.req_to_token.shape[0]
        self._buffers = self._make_buffers(budget.decode_batch_size(model_runner.server_args, rows - 1))
        self._prefill = self._make_prefill_workspace()
        if self.req_to_token.is_cuda:
            from kvarn_kernels.warm_up import warm_up

            warm_up(self.pool.layer_cache(self.pool.start_layer), self._qo_heads, self.config, self._prefill)
        self._decode: DecodeBatch | None = None
        self._extend: ExtendBatch | None = None
        logger.info("KVarN on %s: %s", self.req_to_token.device, self._describe())
        scales.log_unused(model_runner)

    def _describe(self) -> str:
        pool, flashinfer = self.pool, self._prefill is not None
        device = pool.records[0].device
        return ops.describe(device, pool.model_dtype, pool.head_dim, self.config, flashinfer=flashinfer)

    def _make_buffers(self, max_batch: int) -> DecodeBuffers:
        buffers = DecodeBuffers(max_batch, self.req_to_token)
        if self.form == "triton":
            from kvarn_kernels.decode import make_workspace

            buffers.workspace = make_workspace(
                max_batch,
                self._qo_heads,
                self.pool.head_num,
                self.pool.head_dim,
                buffers.page_table.shape[1],
                self.config,
                self.req_to_token.device,
            )
        return buffers

    def _extend_form(self, *step: int) -> str:
        pool = self.pool
        return ops.extend_form(pool.records[0].device, pool.model_dtype, pool.head_dim, self.config, *step)

    def _make_prefill_workspace(self) -> PrefillWorkspace | None:
        """Return the workspace of extend steps on FlashInfer, None where none can run on it."""
        if self._extend_form() != "flashinfer":
            return None
        from kvarn_kernels.prefill import make_workspace

        pool = self.pool
        try:
            return make_workspace(
                self._qo_heads,
                pool.head_num,
                pool.head_dim,
                pool.model_dtype,
                budget.step_pages(self.req_to_token.shape[0], self._buffers.page_table.shape[1]),
                self.req_to_token.device,
            )
        except (RuntimeError, OSError) as error:
            # FlashInfer builds its kernels with nvcc where they are not installed ready-made
            logger.warning("FlashInfer's prefill kernels cannot be built, Triton's run instead (slower): %s", error)
            return None

    def _plan_prefill(self, batch: ExtendBatch) -> ExtendBatch:
        """Plan the step for all its layers if it runs on FlashInfer."""
        if self._prefill is None:
            return batch
        if self._extend_form(batch.num_tokens, max(batch.prefix_lens_host), self._qo_heads) != "flashinfer":
            return batch
        from kvarn_kernels.prefill import plan_prefill

        plan = plan_prefill(self._prefill, batch.prefix_lens_host, batch.seq_lens_host, self.config)
        return dataclasses.replace(batch, prefill=plan)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Make the static buffers larger if a graph is; called before any capture."""
        if max_bs > self._buffers.max_batch:
            self._buffers = self._make_buffers(max_bs)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        """Return the seq_len of padded rows: one token, on page 0."""
        return 1

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Describe the step, before the forward pass and before every capture and replay."""
        mode = forward_batch.forward_mode
        if mode.is_idle():
            return
        if mode.is_decode():
            self._decode = self._buffers.fill(forward_batch, self.pool.tail.exact_starts)
            ops.plan_decode(self._decode, self.config)
        else:
            batch = extend_batch(forward_batch, self.req_to_token, self.pool.tail.exact_starts)
            self._extend = self._plan_prefill(batch)

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
        assert self._decode is not None, "init_forward_metadata comes before the forward pass"
        return self._attend(ops.decode_attention, self._decode, (q, k, v), layer, save_kv_cache, kwargs)

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
        assert self._extend is not None, "init_forward_metadata comes before the forward pass"
        return self._attend(ops.extend_attention, self._extend, (q, k, v), layer, save_kv_cache, kwargs)

    def _attend(
        self, attention: Any, batch: Any, qkv: tuple, layer: Any, save_kv_cache: bool, extra: dict[str, Any]
    ) -> torch.Tensor:
        q, k, v = qkv
        refusals.check_call(k, save_kv_cache, extra)
        head_dim = layer.head_dim
        q = q.reshape(-1, layer.tp_q_head_num, head_dim)
        k = k.reshape(-1, layer.tp_k_head_num, head_dim)
        v = v.reshape(-1, layer.tp_v_head_num, head_dim)
        # a prefill graph pads the tokens; zeros, so that nothing undefined flows on through their rows
        out = torch.zeros_like(q) if q.shape[0] > batch.num_tokens else torch.empty_like(q)
        attention(q, k, v, out, self.pool.layer_cache(layer.layer_id), batch, self.config, layer.scaling)
        if (bias := balanced_layers.output_bias(layer)) is not None:
            # [T, Hk, M, D] += [Hk, 1, D]
            out.unflatten(1, (layer.tp_k_head_num, -1)).add_(bias[:, None])
        return out.view(-1, layer.tp_q_head_num * head_dim)
