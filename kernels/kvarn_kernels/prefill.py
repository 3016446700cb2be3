# SPDX-License-Identifier: Apache-2.0
"""Extend (prefill) attention on FlashInfer: the position rule as paged prefill calls over pseudo-requests.

The past of every query page (`prefill_plan`) is written to a workspace in the model's frame, so that q, k, v and the
output are the model's own tensors; the chunk's own keys are read where they are. FlashInfer attends both, and the
results are merged by their log sum of exp.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from kvarn_kernels import prefill_plan, tile
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dequantise import dequantise

# pages of the workspace, keys and values; at 8 KV heads of 128 these are 412 pages, so 256K tokens of context are 5
# segments, and with FlashInfer's buffers for them the workspace takes 255 MiB
PAGES_BYTES = 206 << 20
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
        own: FlashInfer's wrapper for the chunk's own keys; past: one for each segment of a step, made when first used.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_qo_heads: int
    library: Any
    scratch: torch.Tensor
    own: Any
    past: list[Any] = field(default_factory=list)

    def past_wrapper(self, n: int) -> Any:
        """Return the wrapper of segment n."""
        if n == len(self.past):
            self.past.append(self.library.BatchPrefillWithPagedKVCacheWrapper(self.scratch, "HND"))
        return self.past[n]


@dataclass(frozen=True)
class PlannedSegment:
    """Describe a segment on the device.

    Attributes:
        requests, pages, num_windows, begin, end, seen: as in `prefill_plan.Segment`, tensors on the device.
        wrapper: FlashInfer's, planned.
    """

    requests: torch.Tensor
    pages: torch.Tensor
    num_windows: int
    begin: int
    end: int
    seen: torch.Tensor | None
    wrapper: Any


@dataclass(frozen=True)
class PrefillPlan:
    """Hold what every layer of an extend step runs: the workspace, whose `own` wrapper is planned, and the segments."""

    workspace: PrefillWorkspace
    segments: list[PlannedSegment]


def num_pages(kv_heads: int, head_dim: int, itemsize: int, max_pages: int) -> int:
    """Return the pages of the workspace, at most `max_pages`, and at least 1."""
    return max(1, min(max_pages, PAGES_BYTES // (2 * tile.TILE_SIZE * kv_heads * head_dim * itemsize)))


def workspace_bytes(kv_heads: int, head_dim: int, itemsize: int, max_pages: int, request_pages: int) -> int:
    """Return the bytes that a workspace takes while no step reads more than `request_pages` past pages."""
    pages = num_pages(kv_heads, head_dim, itemsize, max_pages)
    wrappers = 1 + -(-min(max_pages, request_pages) // pages)
    return pages * 2 * tile.TILE_SIZE * kv_heads * head_dim * itemsize + wrappers * WRAPPER_BYTES


def _to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a host tensor in stream order, without waiting."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x


def _plan_call(
    wrapper: Any, call: prefill_plan.PagedCall, workspace: PrefillWorkspace, page_size: int, causal: bool
) -> None:
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
        page_size,
        causal=causal,
        # the scale of a layer comes with its query
        sm_scale=1.0,
        q_data_type=workspace.keys.dtype,
        max_token_per_sequence=page,
        # a query page is small enough as a unit of work, and a split context needs a buffer of up to 128 MiB
        disable_split_kv=True,
    )


def _build_kernels(workspace: PrefillWorkspace) -> None:
    """Let FlashInfer build what it has not built on this host before (a minute), rather than in the first request."""
    one = torch.ones(1, dtype=torch.int32)
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    call = prefill_plan.PagedCall(qo_indptr=indptr, kv_indptr=indptr, kv_indices=one - 1, last_page_len=one)
    _plan_call(workspace.own, call, workspace, page_size=1, causal=True)
    device = workspace.keys.device
    out = torch.zeros(1, workspace.num_qo_heads, workspace.keys.shape[3], dtype=workspace.keys.dtype, device=device)
    lse = torch.zeros(1, workspace.num_qo_heads, device=device)
    workspace.library.merge_state_in_place(out, lse, out.clone(), lse.clone())


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
        max_pages: the most past pages that a step can have, all requests together.
        library: stands in for the module flashinfer in tests.
    """
    if library is None:
        import flashinfer as library
    shape = (num_pages(kv_heads, head_dim, dtype.itemsize, max_pages), kv_heads, tile.TILE_SIZE, head_dim)
    scratch = torch.empty(16, dtype=torch.uint8, device=device)
    workspace = PrefillWorkspace(
        keys=torch.empty(shape, dtype=dtype, device=device),
        values=torch.empty(shape, dtype=dtype, device=device),
        num_qo_heads=num_qo_heads,
        library=library,
        scratch=scratch,
        own=library.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD"),
    )
    _build_kernels(workspace)
    return workspace


def plan_prefill(
    workspace: PrefillWorkspace, prefix_lens: list[int], seq_lens: list[int], config: KVarNConfig
) -> PrefillPlan:
    """Plan an extend step, once for all layers.

    Args:
        prefix_lens, seq_lens: tokens before and including the new ones, of each request.

    The host need not know the exact starts: a window page costs the same from the ring and from its record, and
    `dequantise` chooses on the device.
    """
    device = workspace.keys.device
    queries = prefill_plan.query_pages(prefix_lens, seq_lens, config)
    _plan_call(workspace.own, prefill_plan.own_call(queries), workspace, page_size=1, causal=True)
    planned = []
    for n, segment in enumerate(prefill_plan.segments(queries, len(workspace.keys), config.tile_size)):
        wrapper = workspace.past_wrapper(n)
        _plan_call(wrapper, segment.call, workspace, config.tile_size, causal=False)
        planned.append(
            PlannedSegment(
                requests=_to_device(segment.requests, device),
                pages=_to_device(segment.pages, device),
                num_windows=segment.num_windows,
                begin=segment.begin,
                end=segment.end,
                seen=None if segment.seen is None else _to_device(segment.seen, device),
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
    if k.stride() != v.stride():
        # FlashInfer addresses both with one stride
        k, v = k.contiguous(), v.contiguous()
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    workspace.own.run(
        q, (k.unsqueeze(1), v.unsqueeze(1)), q_scale=sm_scale, out=out, lse=lse, return_lse=True
    )
    for segment in plan.segments:
        dequantise(
            workspace.keys,
            workspace.values,
            segment.requests,
            segment.pages,
            segment.num_windows,
            cache,
            batch,
            config,
        )
        rows = slice(segment.begin, segment.end)
        past, past_lse = torch.empty_like(out[rows]), torch.empty_like(lse[rows])
        segment.wrapper.run(
            q[rows],
            (workspace.keys, workspace.values),
            q_scale=sm_scale,
            out=past,
            lse=past_lse,
            return_lse=True,
        )
        workspace.library.merge_state_in_place(out[rows], lse[rows], past, past_lse, segment.seen)
