# SPDX-License-Identifier: Apache-2.0
"""Attention of one request by the position rule, the oracle of every attention kernel."""

from __future__ import annotations

import torch

from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.reference.hadamard import rotate
from kvarn_kernels.reference.record import decode_tile, encode_tile


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    config: KVarNConfig,
    *,
    exact_start: int = 0,
    sm_scale: float | None = None,
    sinks: torch.Tensor | None = None,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Attend the last Tq tokens of a sequence to all of it, by the position rule.

    For the query at position i and the key at position j <= i:
        1. page(j) >= page(i) - window_pages and j >= exact_start: the exact (rotated, model dtype) key and value;
        2. otherwise those of the record of page(j), in which the first token of the page is exact.
    With a sliding window of W tokens it reads the keys at i - W < j <= i alone, each as above.

    Args:
        q: [Tq, Hq, D] after RoPE, not rotated, positions T - Tq .. T - 1.
        k, v: [T, Hk, D] after RoPE, not rotated, positions 0 .. T - 1; their dtype is the model's.
        exact_start: tokens taken from the prefix cache, a multiple of the page; they are never read exactly.
        sm_scale: factor of the scores, default 1 / sqrt(D).
        sinks: [Hq], attention sinks: a score of each query head that takes weight and has no value, not scaled.
            weight(j) = exp(score(j)) / (exp(sink) + sum over keys of exp(score))
        sliding_window: the newest tokens that a query reads, its own among them; 0 for all.

    Returns:
        float32 [Tq, Hq, D], in the model's frame. Scores and sums in float64.

    Source: design section 3. Departs from the paper (section 4.1), which keeps the first page and the page in
    progress exact and attends a prompt exactly.
    """
    queries, qo_heads, head_dim = q.shape
    tokens, kv_heads, _ = k.shape
    page = TILE_SIZE
    sm_scale = head_dim**-0.5 if sm_scale is None else sm_scale
    exact_k, exact_v = (rotate(x).to(k.dtype).transpose(0, 1) for x in (k, v))
    record_k, record_v = exact_k.float(), exact_v.float()
    full = tokens // page * page
    if full:
        k_pages, v_pages = (x[:, :full].unflatten(1, (-1, page)) for x in (exact_k, exact_v))
        decoded = decode_tile(encode_tile(k_pages, v_pages, config), config, head_dim)
        record_k, record_v = (
            torch.cat([d.flatten(1, 2), x[:, full:].float()], 1)
            for d, x in zip(decoded, (exact_k, exact_v), strict=True)
        )
    i = torch.arange(tokens - queries, tokens, device=q.device)[:, None]
    j = torch.arange(tokens, device=q.device)[None, :]
    exact = (j // page >= i // page - config.window_pages) & (j >= exact_start)
    group = qo_heads // kv_heads
    rotated_q = rotate(q).double().transpose(0, 1)

    def expand(x: torch.Tensor) -> torch.Tensor:
        return x.double().repeat_interleave(group, 0)

    scores = torch.where(
        exact, rotated_q @ expand(exact_k).transpose(1, 2), rotated_q @ expand(record_k).transpose(1, 2)
    )
    hidden = j > i
    if sliding_window:
        hidden = hidden | (j <= i - sliding_window)
    scores = (scores * sm_scale).masked_fill(hidden, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores).view(-1, 1, 1).expand(-1, queries, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., :tokens]
    out = (weights * exact) @ expand(exact_v) + (weights * ~exact) @ expand(record_v)
    return rotate(out.float()).transpose(0, 1)
