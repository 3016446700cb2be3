# SPDX-License-Identifier: Apache-2.0
"""Extend (prefill) attention over records, rings and the chunk itself: for steps of few tokens.

A program attends BLOCK_Q tokens of one request and KV head, aligned to pages, so that its rows share what
they read: the records of the older pages, then the exact first tokens of those pages, then the exact keys, each
in blocks at fixed positions and in the order of positions. A masked block leaves the state of a row unchanged
bit for bit. So, in a step whose pages are not split (`num_splits`; a fixed order forbids it), the
output of a position has the same bits whatever the chunk, the page ids and the other requests.

Long steps run on FlashInfer or FlashAttention 3 (dense/extend_dense.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast, dot
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.attend import LOG2_E, SHIFT, attend_exact, normalise_query, sink_weight, weigh
from kvarn_kernels.read.decode_plan import exact_page_of, first_page_of
from kvarn_kernels.read.merge import merge_splits
from kvarn_kernels.record import tile
from kvarn_kernels.record.hadamard import hadamard_signs, unrotate
from kvarn_kernels.record.ring import ring_ptrs
from kvarn_kernels.record.unpack import load_keys, load_values
from kvarn_kernels.shape import AttentionShape

# first tokens of records that are attended together
FIRST_BLOCK = 32
# shared memory that a program of head_dim 256 takes with 64 rows, bytes; with 32 rows it takes half of that
EXTEND_SHARED_256 = 139_264
# pages of a split, at least, and splits of a request, at most
MIN_SPLIT_PAGES, MAX_SPLITS = 8, 32


@triton.jit(do_not_specialize=["stride_page_table", "num_tiles", "splits"])
def _extend_kernel(
    q_ptr,  # [T, Hq, D] float32, rotated
    chunk_k_ptr,  # [T, Hk, D] model dtype, rotated
    chunk_v_ptr,
    records_ptr,  # [P, Hk, RECORD] uint8
    exact_ptr,  # the same memory in the model's dtype
    firsts_ptr,  # the same memory in the dtype of the first tokens
    signs_ptr,  # [D, D] bfloat16, +-1
    page_table_ptr,  # [B, P_max] int32
    ring_pages_ptr,  # [B, RING_PAGES] int32
    prefix_lens_ptr,  # [B] int32
    seq_lens_ptr,  # [B] int32
    qo_indptr_ptr,  # [B + 1] int32
    exact_starts_ptr,  # [B] int32
    out_ptr,  # [T, Hq, D] model dtype, written unless SPLIT
    partial_out_ptr,  # [T, splits, Hq, D] float32, written if SPLIT
    partial_lse_ptr,  # [T, splits, Hq] float32, base 2
    sinks_ptr,  # [Hq] any float dtype, read if SINKS and not SPLIT
    stride_page_table,
    sm_scale_log2,
    num_tiles,
    splits,
    HK: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    GROUP_ROWS: tl.constexpr,  # GROUP rounded up to a power of two
    BLOCK_Q: tl.constexpr,  # tokens of a query tile, a divisor of G
    BLOCK_KV: tl.constexpr,  # keys of a block, a divisor of G
    FIRST_BLOCK: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SLIDING: tl.constexpr,  # tokens of the sliding window, 0 for none
    RING_PAGES: tl.constexpr,
    SPLIT: tl.constexpr,
    SINKS: tl.constexpr,
    STAGES: tl.constexpr,
):
    head, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    prefix_len, seq_len = tl.load(prefix_lens_ptr + b), tl.load(seq_lens_ptr + b)
    # the tiles with the most keys first
    start = (prefix_len // BLOCK_Q + num_tiles - 1 - tl.program_id(0) // splits) * BLOCK_Q
    if start >= seq_len:
        return
    RECORD: tl.constexpr = tile.record_bytes(D, K_BITS, V_BITS)
    M: tl.constexpr = BLOCK_Q * GROUP_ROWS
    # first page that is read exactly; every page before it, from the first one in a sliding window on, is read from its
    # record. The tile begins where it begins in every step, so it reads the same pages whatever is new in it
    exact_start = tl.load(exact_starts_ptr + b)
    exact_page = exact_page_of(start, exact_start, WINDOW, G, SLIDING)
    first_page, end_page = first_page_of(start, SLIDING, G), exact_page
    # the share of this split; what is read exactly goes to the last one
    split = tl.program_id(0) % splits
    if SPLIT:
        pages = exact_page - first_page
        end_page = first_page + pages * (split + 1) // splits
        first_page += pages * split // splits
    first_token = tl.load(qo_indptr_ptr + b).to(tl.int64) - prefix_len
    r, d = tl.arange(0, M), tl.arange(0, D)
    position, group_head = start + r // GROUP_ROWS, r % GROUP_ROWS
    valid = (position >= prefix_len) & (position < seq_len) & (group_head < GROUP)
    oldest = position - (SLIDING - 1)
    qo = (((first_token + position) * HK + head) * GROUP + group_head) * D
    q = tl.load(q_ptr + qo[:, None] + d[None, :], mask=valid[:, None], other=0.0)  # [M, D]
    q, row_scale = normalise_query(q, sm_scale_log2)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D], tl.float32)
    pages_ptr = page_table_ptr + b * stride_page_table
    STEPS: tl.constexpr = G // BLOCK_KV
    y = tl.arange(0, BLOCK_KV)
    half_q = q.to(tl.float16)
    for step in tl.range(first_page * STEPS, end_page * STEPS, num_stages=STAGES):
        page_id = tl.load(pages_ptr + step // STEPS).to(tl.int64)
        record = records_ptr + (page_id * HK + head) * RECORD
        halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
        first = step % STEPS * BLOCK_KV
        k = load_keys(record, first, BLOCK_KV, D, K_BITS, V_BITS)
        s = dot(half_q, tl.trans(k), tl.zeros([M, BLOCK_KV], tl.float32))
        token_scale = tl.load(halves + tile.k_token_scale_index(D) + first + y).to(tl.float32)
        # token 0 is attended exactly, with the other first tokens
        s = tl.where((first + y > 0)[None, :], s * token_scale[None, :] * row_scale[:, None], float("-inf"))
        if SLIDING > 0:
            s = tl.where((step * BLOCK_KV + y)[None, :] >= oldest[:, None], s, float("-inf"))
        p, alpha, m, l = weigh(s, m, l)
        v = load_values(record, first, BLOCK_KV, D, K_BITS, V_BITS)
        channel_scale = tl.load(halves + tile.v_channel_scale_index(D) + d).to(tl.float32)
        partial = dot(p.to(tl.float16), v, tl.zeros([M, D], tl.float32))
        acc = acc * alpha[:, None] + partial * channel_scale[None, :]

    f = tl.arange(0, FIRST_BLOCK)
    FIRST: tl.constexpr = tile.scales_offset(D, K_BITS, V_BITS) // 2 + tile.k_first_index(D)
    for begin in tl.range(first_page, end_page, FIRST_BLOCK, num_stages=1):
        exists = begin + f < end_page
        page_ids = tl.load(pages_ptr + begin + f, mask=exists, other=0).to(tl.int64)
        k_ptrs = firsts_ptr + (page_ids * HK + head) * (RECORD // 2) + FIRST
        seen = exists[None, :]
        if SLIDING > 0:
            seen = seen & (((begin + f) * G)[None, :] >= oldest[:, None])
        m, l, blocks = attend_exact(q, row_scale, k_ptrs, k_ptrs + D, exists, seen, m, l, (acc,), D, 1)
        acc = blocks[0]

    ring_ptr = ring_pages_ptr + b * RING_PAGES
    end = tl.minimum(start + BLOCK_Q, seq_len)
    exact_begin = exact_page * G
    if SPLIT:
        exact_begin = tl.where(split == splits - 1, exact_begin, end)
    for begin in tl.range(exact_begin, end, BLOCK_KV, num_stages=STAGES):
        j = begin + y
        in_ring = j < prefix_len
        ring_k_ptrs = ring_ptrs(exact_ptr, ring_ptr, j, head, HK, D, K_BITS, V_BITS, RING_PAGES)
        chunk_offsets = ((first_token + j) * HK + head) * D
        k_ptrs = tl.where(in_ring, ring_k_ptrs, chunk_k_ptr + chunk_offsets)
        v_ptrs = tl.where(in_ring, ring_k_ptrs + D, chunk_v_ptr + chunk_offsets)
        seen = j[None, :] <= position[:, None]
        if SLIDING > 0:
            seen = seen & (j[None, :] >= oldest[:, None])
        m, l, blocks = attend_exact(q, row_scale, k_ptrs, v_ptrs, j < end, seen, m, l, (acc,), D, 1)
        acc = blocks[0]

    empty = l == 0.0
    if SINKS and not SPLIT:
        # weights of keys are 2^SHIFT times as large
        sink = tl.load(sinks_ptr + head * GROUP + group_head, mask=valid, other=0.0)
        l += sink_weight(sink, tl.where(empty, 0.0, m) - SHIFT)
    acc = acc / tl.where(empty, 1.0, l)[:, None]
    if SPLIT:
        at = (((first_token + position) * splits + split) * HK + head) * GROUP + group_head
        tl.store(partial_out_ptr + (at * D)[:, None] + d[None, :], acc, mask=valid[:, None])
        lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)) - SHIFT)
        tl.store(partial_lse_ptr + at, lse, mask=valid)
    else:
        c = tl.arange(0, 64)
        for begin in tl.static_range(0, D, 64):
            out = unrotate(acc, signs_ptr, begin, D, 64)
            out_ptrs = out_ptr + qo[:, None] + (begin + c)[None, :]
            tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty), mask=valid[:, None])


_extend_launcher = TritonLauncher(_extend_kernel)


@dataclass(frozen=True)
class ExtendBlocks:
    """Name the block sizes of the kernel.

    Attributes:
        queries: tokens of a query tile; keys: of a block; warps and stages as Triton means them.
    """

    queries: int
    keys: int
    warps: int
    stages: int


@dataclass(frozen=True)
class ExtendPlan:
    """Hold what all layers of a step share.

    Attributes:
        blocks: from `block_sizes`; num_tiles: query tiles of the request that has most of them.
        splits: into how many parts the older pages of a request are cut.
        split_indptr: int32 [T + 1], the first split of each token; None without splits.
        sliding_window: tokens that a query of the planned layers reads, 0 for all.
    """

    blocks: ExtendBlocks
    num_tiles: int
    splits: int
    split_indptr: torch.Tensor | None
    sliding_window: int = 0


def block_sizes(group: int, head_dim: int, gpu: Gpu) -> ExtendBlocks:
    """Return the block sizes; they depend on the model and the GPU only."""
    rows, keys, warps, stages = {64: (128, 128, 8, 2), 128: (128, 64, 8, 2), 256: (64, 64, 8, 2)}[head_dim]
    if head_dim == 256 and gpu.shared_memory < EXTEND_SHARED_256:
        rows, keys, warps, stages = 32, 64, 4, 1
    return ExtendBlocks(max(1, rows // triton.next_power_of_2(group)), keys, warps, stages)


def query_tiles(batch: ExtendBatch, block_q: int) -> list[int]:
    """Return the query tiles of each request."""
    lens = zip(batch.prefix_lens_host, batch.seq_lens_host, strict=True)
    return [triton.cdiv(seq, block_q) - prefix // block_q for prefix, seq in lens]


def num_splits(batch: ExtendBatch, programs: int, config: KVarNConfig, gpu: Gpu, sliding_window: int = 0) -> int:
    """Return the splits of every request of a step: as many as fill the device, and 1 for a fixed order of sums.

    Args:
        programs: that the step takes in one piece, one per query tile and KV head.
        sliding_window: tokens that a query reads, 0 for all.
    """
    if config.fixed_order:
        return 1
    tokens = max(batch.seq_lens_host)
    pages = (min(tokens, sliding_window) if sliding_window else tokens) // tile.TILE_SIZE
    return max(1, min(gpu.multiprocessors // programs, pages // MIN_SPLIT_PAGES, MAX_SPLITS))


def plan_extend(
    batch: ExtendBatch,
    shape: AttentionShape,
    config: KVarNConfig,
    gpu: Gpu,
    sliding_window: int = 0,
) -> ExtendPlan:
    """Plan a step of one or more new tokens, once for all layers whose queries read so many tokens (0: all)."""
    blocks = block_sizes(shape.group, shape.head_dim, gpu)
    tiles = query_tiles(batch, blocks.queries)
    splits = num_splits(batch, shape.num_kv_heads * sum(tiles), config, gpu, sliding_window)
    indptr = None
    if splits > 1:
        stop, device = (batch.num_tokens + 1) * splits, batch.page_table.device
        indptr = torch.arange(0, stop, splits, dtype=torch.int32, device=device)
    return ExtendPlan(blocks, max(tiles), splits, indptr, sliding_window)


def extend(
    rotated: QKV,
    out: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    plan: ExtendPlan,
    config: KVarNConfig,
    sm_scale: float,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attend the new tokens of each request by the position rule.

    Reads the records of full pages (those that the chunk fills are encoded already), the ring as it was
    before this chunk, and the chunk.

    Args:
        rotated: q float32 [T, Hq, D]; k, v [T, Hk, D] model dtype; rotated, contiguous.
        out: [T, Hq, D] model dtype, contiguous, written, not rotated.
        cache: read; batch: the step; plan: of the step; sm_scale: factor of the scores.
        sinks: attention sinks, [Hq] any float dtype, None without.
    """
    blocks, splits, heads = plan.blocks, plan.splits, rotated.q.shape[1]
    group = heads // cache.num_kv_heads
    partial_out = partial_lse = None
    if splits > 1:
        size = (batch.num_tokens, splits, heads)
        partial_out = torch.empty(*size, cache.head_dim, dtype=torch.float32, device=out.device)
        partial_lse = torch.empty(size, dtype=torch.float32, device=out.device)
    _extend_launcher(
        (plan.num_tiles * splits, cache.num_kv_heads, batch.ring_pages.shape[0]),
        q_ptr=rotated.q,
        chunk_k_ptr=rotated.k,
        chunk_v_ptr=rotated.v,
        records_ptr=cache.records,
        exact_ptr=cache.exact,
        firsts_ptr=cache.first_tokens,
        signs_ptr=hadamard_signs(cache.head_dim, torch.bfloat16, out.device),
        page_table_ptr=batch.page_table,
        ring_pages_ptr=batch.ring_pages,
        prefix_lens_ptr=batch.prefix_lens,
        seq_lens_ptr=batch.seq_lens,
        qo_indptr_ptr=batch.qo_indptr,
        exact_starts_ptr=batch.exact_starts,
        out_ptr=out,
        partial_out_ptr=partial_out,
        partial_lse_ptr=partial_lse,
        sinks_ptr=sinks,
        stride_page_table=batch.page_table.stride(0),
        sm_scale_log2=sm_scale * LOG2_E,
        num_tiles=plan.num_tiles,
        splits=splits,
        HK=cache.num_kv_heads,
        GROUP=group,
        GROUP_ROWS=triton.next_power_of_2(group),
        BLOCK_Q=blocks.queries,
        BLOCK_KV=blocks.keys,
        FIRST_BLOCK=FIRST_BLOCK,
        D=cache.head_dim,
        G=tile.TILE_SIZE,
        K_BITS=config.k_bits,
        V_BITS=config.v_bits,
        WINDOW=config.window_pages,
        SLIDING=plan.sliding_window,
        RING_PAGES=batch.ring_pages.shape[1],
        SPLIT=splits > 1,
        SINKS=sinks is not None,
        STAGES=blocks.stages,
        num_warps=blocks.warps,
    )
    if partial_out is not None and partial_lse is not None and plan.split_indptr is not None:
        results, lse = partial_out.flatten(0, 1), partial_lse.flatten(0, 1)
        merge_splits(out[: batch.num_tokens], results, lse, plan.split_indptr, config, sinks)
