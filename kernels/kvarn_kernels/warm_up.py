# SPDX-License-Identifier: Apache-2.0
"""Build every kernel of extend steps before the first request, which would wait seconds for a compiler otherwise.

Those of decode steps are built when their CUDA graphs are captured, what only steps on FlashInfer need with their
workspace.
"""

from __future__ import annotations

import dataclasses

import torch

from kvarn_kernels import extend, merge, ops
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.prefill import PrefillWorkspace, plan_prefill


def warm_up(
    cache: LayerCache, num_qo_heads: int, config: KVarNConfig, workspace: PrefillWorkspace | None
) -> None:
    """Run an extend step of zeros in every form, on page 0 and row 0, which are padding.

    Args:
        cache: of any layer; record 0 and ring 0 are written.
        workspace: of steps that run on FlashInfer; None if none does.
    """
    page = config.tile_size
    # a full page and nothing cached; splits, with a merge of few and of many rows
    steps: list[tuple[int, int, PrefillWorkspace | None]] = [(0, page, None)]
    if not config.is_canonical:
        cached = (2 * extend.MIN_SPLIT_PAGES + 1) * page
        steps += [(cached, 1, None), (cached, -(-merge.FEW_ROWS // num_qo_heads), None)]
    if workspace is not None:
        steps += [(0, page, workspace)]
    for cached, new, form in steps:
        _step(cache, num_qo_heads, config, cached, new, form)


def _step(
    cache: LayerCache, num_qo_heads: int, config: KVarNConfig, cached: int, new: int, workspace: PrefillWorkspace | None
) -> None:
    """Run a step of one request with `new` tokens after `cached` ones, all of whose pages are page 0."""
    kv_heads, head_dim = cache.ring_k.shape[2:]
    device, length = cache.records.device, cached + new

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    batch = ExtendBatch(
        rows=torch.zeros(1, dtype=torch.int64, device=device),
        prefix_lens=int32(cached),
        seq_lens=int32(length),
        qo_indptr=int32(0, new),
        page_table=torch.zeros(1, -(-length // config.tile_size), dtype=torch.int32, device=device),
        exact_starts=int32(0),
        prefix_lens_host=[cached],
        seq_lens_host=[length],
    )
    if workspace is not None:
        plan = plan_prefill(workspace, batch.prefix_lens_host, batch.seq_lens_host, config)
        batch = dataclasses.replace(batch, prefill=plan)
    q = torch.zeros(new, num_qo_heads, head_dim, dtype=cache.ring_k.dtype, device=device)
    k = q.new_zeros(new, kv_heads, head_dim)
    ops.extend_attention(q, k, torch.zeros_like(k), torch.empty_like(q), cache, batch, config, 1.0)
