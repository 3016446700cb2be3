# SPDX-License-Identifier: Apache-2.0
"""FlashAttention 3's paged attention in torch: the contract of sglang-kernel 0.4.5 as our code uses it, on any device.

Read off sgl_kernel/flash_attn.py and FlashAttention's hopper/flash_api.cpp: page tables and lengths are int32 on the
device, causal and the window (keys before and after the query's own, -1 for all) are aligned to the right, log sums of
exp are [Hq, N] of base e.
"""

from __future__ import annotations

import torch


def flash_attn_with_kvcache(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    *,
    cache_seqlens: torch.Tensor,
    page_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    max_seqlen_q: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int] = (-1, -1),
    out: torch.Tensor,
    return_softmax_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write softmax(q k^T * softmax_scale) v to out; return it and the natural log sums of exp."""
    tables = (cache_seqlens, page_table, cu_seqlens_q)
    assert all(x.dtype == torch.int32 and x.is_contiguous() and x.device == q.device for x in tables)
    assert {x.dtype for x in (q, k_cache, v_cache, out)} in ({torch.float16}, {torch.bfloat16}) and return_softmax_lse
    assert all(x.stride(-1) == 1 and x.stride(1) % 8 == x.stride(2) % 8 == 0 for x in (k_cache, v_cache))
    assert window_size == (-1, -1) or (causal and window_size[1] == 0)
    assert q.shape == out.shape and q.stride(-1) == 1 and out.is_contiguous()
    _, page, kv_heads, head_dim = k_cache.shape
    sizes, group = cu_seqlens_q.diff(), q.shape[1] // kv_heads
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and sizes.min() > 0 and sizes.max() <= max_seqlen_q
    assert len(sizes) == len(cache_seqlens) == len(page_table) and head_dim == q.shape[2]
    assert (cache_seqlens > 0).all() and (cache_seqlens <= page_table.shape[1] * page).all()
    lse = torch.empty(q.shape[1], len(q), device=q.device)
    for n, size in enumerate(sizes.tolist()):
        rows, length = slice(int(cu_seqlens_q[n]), int(cu_seqlens_q[n]) + size), int(cache_seqlens[n])
        pages = page_table[n, : -(-length // page)].long()
        k, v = (x[pages].flatten(0, 1)[:length].double().repeat_interleave(group, 1) for x in (k_cache, v_cache))
        scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * softmax_scale
        if causal:
            assert length >= size
            seen = torch.ones(size, length, dtype=torch.bool, device=q.device).tril(length - size)
            if window_size[0] >= 0:
                seen = seen.triu(length - size - window_size[0])
            scores = scores.masked_fill(~seen, float("-inf"))
        lse[:, rows] = scores.logsumexp(-1).float()
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(out.dtype)
    return out, lse
