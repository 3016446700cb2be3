# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's paged prefill in torch: the contract of 0.6.14 as our code uses it, on any device.

Read off flashinfer/prefill.py and csrc/batch_prefill_sm90.cu: lengths are read on the host, causal and window_left
(keys before the query's own, -1 for all) are aligned to the right, lse has base 2, keys and values share their strides.
A request without keys is refused here, because FlashInfer's fa3 backend answers it wrongly.
"""

from __future__ import annotations

import torch


class BatchPrefillWithPagedKVCacheWrapper:
    """Plan once, run many times."""

    def __init__(
        self, float_workspace_buffer: torch.Tensor, kv_layout: str = "NHD", backend: str = "auto"
    ) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout in ("NHD", "HND")
        self.kv_layout = kv_layout

    def plan(
        self,
        qo_indptr: torch.Tensor,
        paged_kv_indptr: torch.Tensor,
        paged_kv_indices: torch.Tensor,
        paged_kv_last_page_len: torch.Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        *,
        causal: bool,
        window_left: int,
        sm_scale: float,
        q_data_type: torch.dtype,
        max_token_per_sequence: int,
        disable_split_kv: bool,
    ) -> None:
        """Check and keep the arguments; tensors are copied, as FlashInfer does."""
        host = (qo_indptr, paged_kv_indptr, paged_kv_last_page_len)
        assert all(x.device.type == "cpu" for x in host), "a device tensor would be read back"
        assert all(x.dtype == torch.int32 and x.is_contiguous() for x in (*host, paged_kv_indices))
        queries, pages = qo_indptr.diff(), paged_kv_indptr.diff()
        assert len(qo_indptr) == len(paged_kv_indptr) == len(paged_kv_last_page_len) + 1
        assert qo_indptr[0] == paged_kv_indptr[0] == 0 and (queries > 0).all() and (pages > 0).all()
        assert paged_kv_indptr[-1] == len(paged_kv_indices)
        assert ((paged_kv_last_page_len > 0) & (paged_kv_last_page_len <= page_size)).all()
        assert queries.max() <= max_token_per_sequence and num_qo_heads % num_kv_heads == 0
        assert q_data_type in (torch.float16, torch.bfloat16) and disable_split_kv
        lens = (pages - 1) * page_size + paged_kv_last_page_len
        assert not causal or (lens >= queries).all()
        self.qo_indptr, self.kv_indptr = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.indices, self.lens = paged_kv_indices.clone().long(), lens.tolist()
        self.heads, self.head_dim, self.page_size = (num_qo_heads, num_kv_heads), head_dim_qk, page_size
        assert causal or window_left == -1
        self.causal, self.window_left, self.sm_scale, self.dtype = causal, window_left, sm_scale, q_data_type

    def _gather(self, cache: torch.Tensor, n: int) -> torch.Tensor:
        """Return the keys or values of pseudo-request n: float64 [len, Hk, D]."""
        cache = cache if self.kv_layout == "NHD" else cache.transpose(1, 2)
        assert cache.shape[1:] == (self.page_size, self.heads[1], self.head_dim)
        pages = self.indices[self.kv_indptr[n] : self.kv_indptr[n + 1]]
        return cache[pages].flatten(0, 1)[: self.lens[n]].double()

    def run(
        self,
        q: torch.Tensor,
        paged_kv_cache: tuple[torch.Tensor, torch.Tensor],
        *,
        q_scale: float,
        out: torch.Tensor,
        lse: torch.Tensor,
        return_lse: bool,
    ) -> None:
        """Write softmax(q k^T * sm_scale * q_scale) v to out and the base-2 log sum of exp to lse."""
        k_cache, v_cache = paged_kv_cache
        assert q.shape == out.shape == (self.qo_indptr[-1], self.heads[0], self.head_dim)
        assert lse.shape == q.shape[:2] and lse.dtype == torch.float32 and return_lse
        assert {x.dtype for x in (q, k_cache, v_cache, out)} == {self.dtype}
        assert k_cache.stride() == v_cache.stride() and k_cache.stride(-1) == q.stride(-1) == 1
        group = self.heads[0] // self.heads[1]
        for n, length in enumerate(self.lens):
            rows = slice(self.qo_indptr[n], self.qo_indptr[n + 1])
            k, v = (self._gather(x, n).repeat_interleave(group, 1) for x in (k_cache, v_cache))
            scores = torch.einsum("qhd,khd->hqk", q[rows].double(), k) * (self.sm_scale * q_scale)
            if self.causal:
                queries = rows.stop - rows.start
                hidden = torch.ones(queries, length, dtype=torch.bool, device=q.device)
                scores = scores.masked_fill(hidden.triu(length - queries + 1), float("-inf"))
                if self.window_left >= 0:
                    older = hidden.tril(length - queries - self.window_left - 1)
                    scores = scores.masked_fill(older, float("-inf"))
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).to(self.dtype)
            lse[rows] = (scores.logsumexp(-1) / torch.log(torch.tensor(2.0))).T.float()
