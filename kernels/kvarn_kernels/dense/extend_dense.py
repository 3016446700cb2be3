# SPDX-License-Identifier: Apache-2.0
"""Extend attention of long steps in 16 bits: the position rule as paged calls over pseudo-requests.

What the query pages read (`segments`), the chunk's own pages too, is written to a workspace in the model's frame,
so that q and the output are the model's own tensors, and most steps are one call of a library a layer. Where it does
not fit, further calls read the rest, and the results are merged by their log sum of exp.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import paged_calls, segments
from kvarn_kernels.dense.dequantise import PageList, dequantise
from kvarn_kernels.dense.dequantise_cuda import dequantise as dequantise_by_cuda
from kvarn_kernels.dense.merge_parts import merge_parts, weigh_against_sinks
from kvarn_kernels.dense.paged_calls import Library, Run, to_device
from kvarn_kernels.device.gpu import Gpu, gpu_of
from kvarn_kernels.device.launch import EARLY_START_SINCE
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

# bytes of the workspace, keys and values. At 8 KV heads of 128 it holds 396 pages; a chunk of 8K tokens on 256K then
# takes 6 segments, and the workspace with FlashInfer's buffers for them 255 MiB. A GPU with much memory, as the H200,
# has 896 pages, 0.3 % of it: 98K tokens are one segment and not two, which took its host 230 us a layer more
PAGES_BYTES, LARGE_PAGES_BYTES, MUCH_MEMORY = 198 << 20, 448 << 20, 120 << 30
LIBRARIES: dict[str, type[paged_calls.FlashInfer] | type[paged_calls.FlashAttention3]] = {
    paged_calls.FLASHINFER: paged_calls.FlashInfer,
    paged_calls.FA3: paged_calls.FlashAttention3,
}


@dataclass
class DenseWorkspace:
    """Hold what the layers share; made once by `make_workspace`.

    Attributes:
        keys, values: [M, Hk, G, D] model dtype, the past pages of one segment.
        num_qo_heads: query heads of the model.
        library: who attends.
        compiled: CUDA C++ writes the pages, not Triton; starts_early: beside the encoder, which is CUDA C++ then, too.
    """

    keys: torch.Tensor
    values: torch.Tensor
    num_qo_heads: int
    library: Library
    compiled: bool
    starts_early: bool


@dataclass(frozen=True)
class PlannedSegment:
    """Describe a segment on the device.

    Attributes:
        pages: what is written to the workspace.
        begin, end, splits: as in `segments.Segment`.
        seen: likewise; None for a causal segment, whose results are not merged but written.
        run: attends, as planned.
    """

    pages: PageList
    begin: int
    end: int
    splits: int
    seen: torch.Tensor | None
    run: Run


@dataclass(frozen=True)
class DensePlan:
    """Hold what every layer of a step runs: the workspace and its fillings, causal ones first."""

    workspace: DenseWorkspace
    segments: list[PlannedSegment]


def page_bytes(shape: AttentionShape) -> int:
    """Return the bytes of a page in 16 bit, keys and values."""
    return TILE_SIZE * shape.full_token_bytes


def num_pages(shape: AttentionShape, max_pages: int, gpu: Gpu, sliding_windows: Iterable[int] = ()) -> int:
    """Return the pages of the workspace: at most `max_pages`, and at least what a segment must have room for."""
    fewest = max([2, *map(segments.fewest_pages, sliding_windows)])
    most_bytes = LARGE_PAGES_BYTES if gpu.memory >= MUCH_MEMORY else PAGES_BYTES
    return max(fewest, min(max_pages, most_bytes // page_bytes(shape)))


def workspace_bytes(
    shape: AttentionShape,
    max_pages: int,
    request_pages: int,
    library: str,
    gpu: Gpu,
    sliding_windows: Iterable[int] = (),
    chunk_pages: int = 0,
) -> int:
    """Return the bytes that a workspace takes while no step reads more than `request_pages` pages of a request.

    Args:
        library: one of LIBRARIES.
        sliding_windows: of the model's layers, in tokens, but for 0, which stands for all.
        chunk_pages: that the new tokens of a step touch.
    """
    windows = tuple(sliding_windows)
    pages = num_pages(shape, max_pages, gpu, windows)
    # where the exact pages are cut, a window is in two segments, and each of the two parts of the list has a rest
    calls = 1 + -(-min(max_pages, request_pages) // (pages - 1))
    for tokens in windows:
        # a segment repeats the pages that the one before it ends with
        calls += -(-chunk_pages // (pages - segments.fewest_pages(tokens) + 1))
    return pages * page_bytes(shape) + calls * LIBRARIES[library].call_bytes


def _build_kernels(workspace: DenseWorkspace) -> None:
    """Build what was not built on this host before (FlashInfer: a minute) now rather than in the first request."""
    one = torch.ones(1, dtype=torch.int32)
    indptr = torch.tensor([0, 1], dtype=torch.int32)
    call = segments.PagedCall(qo_indptr=indptr, kv_indptr=indptr, kv_indices=one - 1, last_page_len=one)
    workspace.library.plan(0, call, workspace.keys, workspace.num_qo_heads, causal=True)
    out = workspace.keys.new_zeros(1, workspace.num_qo_heads, workspace.keys.shape[3])
    lse = torch.zeros(out.shape[:2], device=out.device)
    seen = torch.ones(1, 1, dtype=torch.bool, device=out.device)
    merge_parts(out, lse, 0, out[None].clone(), lse[None].clone(), seen)


def make_workspace(
    shape: AttentionShape,
    max_pages: int,
    device: torch.device,
    library: str | Library,
    *,
    compiled: bool = False,
    sliding_windows: Iterable[int] = (),
) -> DenseWorkspace:
    """Return a workspace.

    Args:
        shape: of the model, in float16 or bfloat16.
        max_pages: the most pages that a step can read, all requests together.
        library: one of LIBRARIES, or what stands in for it in tests.
        compiled: as in `DenseWorkspace`; sliding_windows: as for `workspace_bytes`.

    Raises:
        RuntimeError, OSError: FlashInfer's kernels cannot be built.
        ImportError: the library is not there, or not for this device.
    """
    own = LIBRARIES[library](device) if isinstance(library, str) else library
    pages = num_pages(shape, max_pages, gpu_of(device), sliding_windows)
    size = (pages, shape.num_kv_heads, TILE_SIZE, shape.head_dim)
    workspace = DenseWorkspace(
        keys=torch.empty(size, dtype=shape.dtype, device=device),
        values=torch.empty(size, dtype=shape.dtype, device=device),
        num_qo_heads=shape.num_qo_heads,
        library=own,
        compiled=compiled,
        starts_early=compiled and gpu_of(device).capability >= EARLY_START_SINCE,
    )
    _build_kernels(workspace)
    return workspace


def plan_dense(
    batch: ExtendBatch,
    workspace: DenseWorkspace,
    config: KVarNConfig,
    gpu: Gpu,
    sliding_window: int = 0,
    first_call: int = 0,
) -> DensePlan:
    """Plan a step, once for all layers whose queries read so many tokens (0: all).

    The host need not know the exact starts: an exact page costs the same from the ring and from its record, and
    `dequantise` chooses on the device.

    Args:
        first_call: of the library's planned calls; those before it belong to other plans of the step.
    """
    device = workspace.keys.device
    queries = segments.query_pages(batch.prefix_lens_host, batch.seq_lens_host, config, sliding_window)
    splits = 1
    if not workspace.library.cuts_contexts:
        splits = segments.num_splits(queries, workspace.num_qo_heads, gpu.multiprocessors)
    planned = []
    for n, segment in enumerate(segments.segments(queries, len(workspace.keys), splits), first_call):
        run = workspace.library.plan(
            n,
            segment.call,
            workspace.keys,
            workspace.num_qo_heads,
            causal=segment.causal,
            sliding_window=sliding_window,
        )
        requests, numbers = to_device(device, segment.requests, segment.pages)
        pages = PageList(requests, numbers, segment.num_exact)
        seen = None if segment.causal else to_device(device, segment.seen.to(torch.int32))[0].bool()
        planned.append(PlannedSegment(pages, segment.begin, segment.end, segment.splits, seen, run))
    return DensePlan(workspace, planned)


def run_call(run: Run, *arguments: Any) -> None:
    """Run a planned call; a function of its own, so that benchmarks can time it."""
    run(*arguments)


def extend_dense(
    new: QKV,
    out: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    plan: DensePlan,
    config: KVarNConfig,
    sm_scale: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend the new tokens of each request by the position rule.

    Reads the records of full pages and the ring as it was before this chunk. What ran last on the stream is the encoder
    of the pages that the chunk fills, if it fills any. Departs from `read.extend` in rounding only: q, k and v of the
    chunk are not rotated, past keys and values are rounded to the model's dtype in the model's frame, and so are the
    results that are merged.

    Args:
        new: q [at least T, Hq, D]; k, v: [at least T, Hk, D]; model dtype, not rotated.
        out: [at least T, Hq, D] model dtype, contiguous; the first T rows are written.
        cache: read; batch: the step; plan: of the step; sm_scale: factor of the scores.
        sinks: attention sinks, [Hq] any float dtype, None without. They are the last to be merged.
    """
    workspace = plan.workspace
    pages = (workspace.keys, workspace.values)
    q, out = new.q[: batch.num_tokens], out[: batch.num_tokens]
    write = dequantise_by_cuda if workspace.compiled else dequantise
    # beside the encoder, which comes before the first segment only
    first_write = write
    if workspace.starts_early and batch.max_full_pages:
        first_write = partial(dequantise_by_cuda, early_start=True)
    lse = None
    if any(segment.seen is not None for segment in plan.segments) or sinks is not None:
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for n, segment in enumerate(plan.segments):
        (write if n else first_write)(pages, new, segment.pages, cache, batch, config)
        rows = slice(segment.begin, segment.end)
        query, part, part_lse = q[rows], out[rows], None if lse is None else lse[rows]
        if segment.seen is not None:
            assert lse is not None, "what is merged comes after a causal segment"
            if segment.splits > 1:
                query = query.repeat(segment.splits, 1, 1)
            part, part_lse = out.new_empty(query.shape), lse.new_empty(query.shape[:2])
        run_call(segment.run, query, pages, sm_scale, part, part_lse)
        if segment.seen is not None:
            assert lse is not None and part_lse is not None
            shape = (segment.splits, -1)
            merge_parts(out, lse, segment.begin, part.unflatten(0, shape), part_lse.unflatten(0, shape), segment.seen)
    if sinks is not None:
        assert lse is not None
        weigh_against_sinks(out, lse, sinks)
