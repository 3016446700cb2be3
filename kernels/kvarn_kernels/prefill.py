# SPDX-License-Identifier: Apache-2.0
"""Extend (prefill) attention on FlashInfer: the position rule as paged prefill calls over pseudo-requests.

What the query pages read (`prefill_plan`), the chunk's own pages too, is written to a workspace in the model's frame,
so that q and the output are the model's own tensors, and most steps are one call of FlashInfer a layer. Where it does
not fit, further calls read the rest, and the results are merged by their log sum of exp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvarn_kernels import gpu, prefill_plan, tile
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dequantise import dequantise
from kvarn_kernels.prefill_merge import merge_parts

# pages of the workspace, keys and values; at 8 KV heads of 128 these are 396 pages, so a chunk of 8K on 256K tokens is
# 6 segments, and with FlashInfer's buffers for them the workspace takes 255 MiB
PAGES_BYTES = 198 << 20
# what a wrapper of FlashInfer 0.6.14 allocates on the device: schedules, and a length per pseudo-request
WRAPPER_BYTES = (8 << 20) + 4 * 32768


@dataclass
class PrefillWorkspace:
    """Hold what the prefill of all layers shares; made once by `make_workspace`.

    Attributes:
        keys, values: [M, Hk, G, D] model dtype, the past pages of one segment.
        num_qo_heads: query heads of the model.
        library: the module flashinfer.
        scratch: uint8 [16]; FlashInfer wants a buffer for split contexts, which are not used here.
        wrappers: FlashInfer's, one for each segment of a step, made when first used.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_qo_heads: int
    library: Any
    scratch: torch.Tensor
    wrappers: list[Any] = field(default_factory=list)

    def wrapper(self, n: int) -> Any:
        """Return the wrapper of segment n."""
        if n == len(self.wrappers):
            self.wrappers.append(self.library.BatchPrefillWithPagedKVCacheWrapper(self.scratch, "HND"))
        return self.wrappers[n]


@dataclass(frozen=True)
class PlannedSegment:
    """Describe a segment on the device.

    Attributes:
        requests, pages, num_exact, begin, end, splits: as in `prefill_plan.Segment`, tensors on the device.
        seen: likewise; None for a causal segment, whose results are not merged but written.
        wrapper: FlashInfer's, planned.
    """

    requests: torch.Tensor
    pages: torch.Tensor
    num_exact: int
    begin: int
    end: int
    splits: int
    seen: torch.Tensor | None
    wrapper: Any


@dataclass(frozen=True)
class PrefillPlan:
    """Hold what every layer of an extend step runs: the workspace and its fillings, causal ones first."""

    workspace: PrefillWorkspace
    segments: list[PlannedSegment]


def num_pages(kv_heads: int, head_dim: int, itemsize: int, max_pages: int) -> int:
    """Return the pages of the workspace: at most `max_pages`, and at least a window and one more."""
    return max(2, min(max_pages, PAGES_BYTES // (2 * tile.TILE_SIZE * kv_heads * head_dim * itemsize)))


def workspace_bytes(kv_heads: int, head_dim: int, itemsize: int, max_pages: int, request_pages: int) -> int:
    """Return the bytes that a workspace takes while no step reads more than `request_pages` pages."""
    pages = num_pages(kv_heads, head_dim, itemsize, max_pages)
    # where the exact pages are cut, a window is in two segments, and each of the two parts of the list has a rest
    wrappers = 1 + -(-min(max_pages, request_pages) // (pages - 1))
    return pages * 2 * tile.TILE_SIZE * kv_heads * head_dim * itemsize + wrappers * WRAPPER_BYTES


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor in stream order, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _plan_call(wrapper: Any, call: prefill_plan.PagedCall, workspace: PrefillWorkspace, causal: bool) -> None:
    """Plan one FlashInfer call. It reads the lengths on the host and only copies the indices, so nothing waits."""
    _, kv_heads, page, head_dim = workspace.keys.shape
    wrapper.plan(
        call.qo_indptr,
        call.kv_indptr,
        _to_device(call.kv_indices, workspace.keys.device),
        call.last_page_len,
        workspace.num_qo_heads,
        kv_heads,
        head_dim,
        page,
        causal=causal,
        # the scale of a layer comes with its query
        sm_scale=1.0,
        q_data_type=workspace.keys.dtype,
        max_token_per_sequence=page,
        # a query page is small enough as a unit of work, and a split context needs a buffer of up to 128 MiB
        disable_split_kv=True,
    )


def _build_kernels(workspace: PrefillWorkspace) -> None:
    """Build what was not built on this host before (FlashInfer: a minute) now rather than in the first request."""
    one = torch.ones(1, dtype=torch.int32)
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    call = prefill_plan.PagedCall(qo_indptr=indptr, kv_indptr=indptr, kv_indices=one - 1, last_page_len=one)
    _plan_call(workspace.wrapper(0), call, workspace, causal=True)
    out = workspace.keys.new_zeros(1, workspace.num_qo_heads, workspace.keys.shape[3])
    lse = torch.zeros(out.shape[:2], device=out.device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=out.device)
    merge_parts(out, lse, 0, out[None].clone(), lse[None].clone(), seen)


def make_workspace(
    num_qo_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    max_pages: int,
    device: torch.device,
    library: Any = None,
) -> PrefillWorkspace:
    """Return a workspace.

    Args:
        dtype: the model's, float16 or bfloat16.
        max_pages: the most pages that a step can read, all requests together.
        library: stands in for the module flashinfer in tests.
    """
    if library is None:
        import flashinfer as library
    shape = (num_pages(kv_heads, head_dim, dtype.itemsize, max_pages), kv_heads, tile.TILE_SIZE, head_dim)
    workspace = PrefillWorkspace(
        keys=torch.empty(shape, dtype=dtype, device=device),
        values=torch.empty(shape, dtype=dtype, device=device),
        num_qo_heads=num_qo_heads,
        library=library,
        scratch=torch.empty(16, dtype=torch.uint8, device=device),
    )
    _build_kernels(workspace)
    return workspace


def plan_prefill(
    workspace: PrefillWorkspace, prefix_lens: list[int], seq_lens: list[int], config: KVarNConfig
) -> PrefillPlan:
    """Plan an extend step, once for all layers.

    Args:
        prefix_lens, seq_lens: tokens before and including the new ones, of each request.

    The host need not know the exact starts: an exact page costs the same from the ring and from its record, and
    `dequantise` chooses on the device.
    """
    device = workspace.keys.device
    queries = prefill_plan.query_pages(prefix_lens, seq_lens, config)
    splits = prefill_plan.num_splits(queries, workspace.num_qo_heads, gpu.multiprocessors())
    planned = []
    for n, segment in enumerate(prefill_plan.segments(queries, len(workspace.keys), config.tile_size, splits)):
        wrapper = workspace.wrapper(n)
        _plan_call(wrapper, segment.call, workspace, segment.causal)
        planned.append(
            PlannedSegment(
                requests=_to_device(segment.requests, device),
                pages=_to_device(segment.pages, device),
                num_exact=segment.num_exact,
                begin=segment.begin,
                end=segment.end,
                splits=segment.splits,
                seen=None if segment.causal else _to_device(segment.seen, device),
                wrapper=wrapper,
            )
        )
    return PrefillPlan(workspace, planned)


def prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sm_scale: float,
) -> None:
    """Attend the new tokens of each request by the position rule.

    Reads the records of full pages (those that the chunk fills are encoded already) and the ring as it was before
    this chunk. Departs from the Triton form in rounding only: q, k and v of the chunk are not rotated, past keys and
    values are rounded to the model's dtype in the model's frame, and so are the results that are merged.

    Args:
        q: [at least T, Hq, D]; k, v: [at least T, Hk, D]; model dtype, not rotated, last dimension contiguous.
        out: [at least T, Hq, D] model dtype, contiguous; the first T rows are written.
        cache: read; batch: the step, with a plan; sm_scale: factor of the scores.
    """
    plan = batch.prefill
    assert plan is not None, "a step that runs on FlashInfer has a plan"
    workspace = plan.workspace
    q, out = q[: batch.num_tokens], out[: batch.num_tokens]
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for segment in plan.segments:
        dequantise(
            workspace.keys,
            workspace.values,
            k,
            v,
            segment.requests,
            segment.pages,
            segment.num_exact,
            cache,
            batch,
            config,
        )
        rows = slice(segment.begin, segment.end)
        query, part, part_lse = q[rows], out[rows], lse[rows]
        if segment.seen is not None:
            if segment.splits > 1:
                query = query.repeat(segment.splits, 1, 1)
            part, part_lse = out.new_empty(query.shape), lse.new_empty(query.shape[:2])
        segment.wrapper.run(
            query,
            (workspace.keys, workspace.values),
            q_scale=sm_scale,
            out=part,
            lse=part_lse,
            return_lse=True,
        )
        if segment.seen is not None:
            shape = (segment.splits, -1)
            merge_parts(out, lse, segment.begin, part.unflatten(0, shape), part_lse.unflatten(0, shape), segment.seen)
