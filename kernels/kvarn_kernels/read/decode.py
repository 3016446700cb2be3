# SPDX-License-Identifier: Apache-2.0
"""Decode attention: split-KV over records, first tokens and ring; partial results to the workspace.

This is the portable form; decode_sm90.py runs on Hopper and newer. A program serves up to `columns(group)` query heads
of a KV head; where drafts are verified, those of each draft, one draft after the other, so that a record is unpacked
once for all of them. A draft masks what it does not see: a page that ends among the drafts is a record for the later
ones and exact for the others.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.batch import DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.attend import (
    LOG2_E,
    SHIFT,
    attend_exact,
    attend_record,
    load_query_blocks,
    normalise_query,
    zero_blocks,
)
from kvarn_kernels.read.decode_plan import DecodeWorkspace, exact_page_of, ring_start, split_units, work_of
from kvarn_kernels.record import tile
from kvarn_kernels.record.ring import ring_ptrs

FIRST_BLOCK = 16
# exact keys that are attended together; half as many where 64 of head_dim 256 take more shared memory (149,504 bytes)
# than a block may use
EXACT_BLOCK = 64
EXACT_SHARED_256 = 149_504
# programs (2 warps) that a multiprocessor runs at once
RESIDENT = 8


def exact_block(head_dim: int, gpu: Gpu) -> int:
    """Return how many exact keys are attended together; it depends on the model and the GPU only."""
    return EXACT_BLOCK // 2 if head_dim == 256 and gpu.shared_memory < EXACT_SHARED_256 else EXACT_BLOCK


def resident_programs(gpu: Gpu) -> int:
    """Return the programs of the kernel that a GPU runs at once."""
    return gpu.multiprocessors * RESIDENT


def columns(group: int) -> int:
    """Return the query heads of a KV head, for each draft, that a program serves; matrix products have 16 rows."""
    return max(16, triton.next_power_of_2(group))


@triton.jit(do_not_specialize=["batch_size"])
def _decode_kernel(
    rotated_q_ptr,  # [B * DRAFTS, Hq, D] float32
    records_ptr,  # [P, Hk, RECORD] uint8
    first_ptr,  # the same memory in the dtype of the first tokens
    exact_ptr,  # the same memory in the model's dtype
    ring_pages_ptr,  # [B * DRAFTS, RING_PAGES] int32, those of a request alike
    page_table_ptr,  # [B * DRAFTS, P_max] int32, likewise
    seq_lens_ptr,  # [B * DRAFTS] int32
    exact_starts_ptr,  # [B * DRAFTS] int32
    requests_ptr,  # [S] int32, request of each split
    indptr_ptr,  # [B + 1] int32, first split of each request
    out_ptr,  # [S, DRAFTS * Hq, D] float32, written
    lse_ptr,  # [S, DRAFTS * Hq] float32, written
    stride_page_table,
    sm_scale_log2,
    batch_size,
    HK: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    DRAFTS: tl.constexpr,  # rows of a request, which share its splits
    M: tl.constexpr,  # columns of a program
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SLIDING: tl.constexpr,  # tokens of the sliding window, 0 for none
    RING_PAGES: tl.constexpr,
    SPLIT_UNITS: tl.constexpr,  # 0: units of the request shared evenly by its splits
    FIRST_BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    BLOCKS: tl.constexpr = (DRAFTS * GROUP + M - 1) // M
    split, head = tl.program_id(0).to(tl.int64), tl.program_id(1) // BLOCKS
    if split >= tl.load(indptr_ptr + batch_size):
        return
    b = tl.load(requests_ptr + split).to(tl.int64)
    K_BLOCKS: tl.constexpr = tile.k_channel_blocks(D, K_BITS)
    V_BLOCKS: tl.constexpr = tile.v_channel_blocks(V_BITS)
    VW: tl.constexpr = D // V_BLOCKS
    RECORD: tl.constexpr = tile.record_bytes(D, K_BITS, V_BITS)
    # of the first draft
    position, exact_start = tl.load(seq_lens_ptr + b * DRAFTS) - 1, tl.load(exact_starts_ptr + b * DRAFTS)
    first_page, exact_page, units = work_of(position + 1, exact_start, WINDOW, G, DRAFTS, SLIDING)
    first_column = tl.program_id(1) % BLOCKS * M
    column = first_column + tl.arange(0, M)
    row_mask = column < DRAFTS * GROUP
    draft = tl.minimum(column // GROUP, DRAFTS - 1)
    last_draft = tl.minimum((first_column + M - 1) // GROUP, DRAFTS - 1)
    first_exact = exact_page_of(position, exact_start, WINDOW, G, SLIDING)
    # of each column: the first page that it reads exactly, the first key in its sliding window
    exact_from = exact_page_of(position + draft, exact_start, WINDOW, G, SLIDING)
    oldest = position + draft - (SLIDING - 1)
    first = tl.load(indptr_ptr + b)
    if SPLIT_UNITS > 0:
        per_split = SPLIT_UNITS
    else:
        per_split = tl.cdiv(units, tl.load(indptr_ptr + b + 1) - first)
    unit = (split - first).to(tl.int32) * per_split
    record_units = exact_page - first_page
    begin = first_page + tl.minimum(unit, record_units)
    end = tl.minimum(
        first_page + unit + per_split, exact_page_of(position + last_draft, exact_start, WINDOW, G, SLIDING)
    )
    ring_begin = ring_start(unit, record_units, first_exact, G)
    ring_end = tl.minimum(ring_start(unit + per_split, record_units, first_exact, G), position + last_draft + 1)
    qo = ((b * DRAFTS + draft) * HK + head) * GROUP + column - draft * GROUP
    d = tl.arange(0, D)
    q_ptrs = rotated_q_ptr + qo * D
    q = tl.load(q_ptrs[:, None] + d[None, :], mask=row_mask[:, None], other=0.0)
    q, row_scale = normalise_query(q, sm_scale_log2)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = zero_blocks(V_BLOCKS, M, VW)
    ring_ptr = ring_pages_ptr + b * DRAFTS * RING_PAGES
    n = tl.arange(0, EXACT_BLOCK)
    for start in tl.range(ring_begin, ring_end, EXACT_BLOCK):
        j = start + n
        k_ptrs = ring_ptrs(exact_ptr, ring_ptr, j, head, HK, D, K_BITS, V_BITS, RING_PAGES)
        exists = j < ring_end
        seen = exists[None, :]
        if DRAFTS > 1:
            seen = (j[None, :] <= (position + draft)[:, None]) & (j[None, :] >= (exact_from * G)[:, None])
        if SLIDING > 0:
            seen = seen & (j[None, :] >= oldest[:, None])
        m, l, acc = attend_exact(q, row_scale, k_ptrs, k_ptrs + D, exists, seen, m, l, acc, D, V_BLOCKS)
    pages_ptr = page_table_ptr + b * DRAFTS * stride_page_table
    f = tl.arange(0, FIRST_BLOCK)
    FIRST: tl.constexpr = tile.scales_offset(D, K_BITS, V_BITS) // 2 + tile.k_first_index(D)
    for start in tl.range(begin, end, FIRST_BLOCK):
        exists = start + f < end
        ids = tl.load(pages_ptr + start + f, mask=exists, other=0).to(tl.int64)
        k_ptrs = first_ptr + (ids * HK + head) * (RECORD // 2) + FIRST
        v_ptrs = k_ptrs + D
        seen = exists[None, :]
        if DRAFTS > 1:
            seen = (start + f)[None, :] < exact_from[:, None]
        if SLIDING > 0:
            seen = seen & (((start + f) * G)[None, :] >= oldest[:, None])
        m, l, acc = attend_exact(q, row_scale, k_ptrs, v_ptrs, exists, seen, m, l, acc, D, V_BLOCKS)
    blocks = load_query_blocks(q_ptrs, row_mask, row_scale, sm_scale_log2, D, K_BLOCKS)
    for p in tl.range(begin, end, num_stages=STAGES):
        page_id = tl.load(pages_ptr + p).to(tl.int64)
        record = records_ptr + (page_id * HK + head) * RECORD
        seen_by = row_mask
        if DRAFTS > 1:
            seen_by = row_mask & (p < exact_from)
        in_page = oldest - p * G
        m, l, acc = attend_record(
            blocks, row_scale, record, seen_by, m, l, acc, D, K_BITS, V_BITS, in_page, SLIDING > 0
        )
    empty = l == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, l)
    out = ((split * DRAFTS + draft) * HK + head) * GROUP + column - draft * GROUP
    out_row = out_ptr + out * D
    vw = tl.arange(0, VW)
    for j in tl.static_range(V_BLOCKS):
        tl.store(out_row[:, None] + (j * VW + vw)[None, :], acc[j] * inverse[:, None], mask=row_mask[:, None])
    lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)) - SHIFT)
    tl.store(lse_ptr + out, lse, mask=row_mask)


def decode(
    cache: LayerCache,
    batch: DecodeBatch,
    workspace: DecodeWorkspace,
    config: KVarNConfig,
    sm_scale: float,
    exact_block: int = EXACT_BLOCK,
) -> None:
    """Attend the query tokens of each request; each split's normalised output and lse go to the workspace.

    Reads the rotated query and the plan of the step in the workspace, the records of the older pages and the ring of
    the request.

    Args:
        exact_block: from the function of that name.
    """
    group = workspace.rotated_q.shape[1] // cache.num_kv_heads
    drafts, rows = workspace.drafts, columns(group)
    batch_size = batch.num_tokens // drafts
    _decode_kernel[(workspace.max_splits[batch_size - 1], cache.num_kv_heads * triton.cdiv(drafts * group, rows))](
        rotated_q_ptr=workspace.rotated_q,
        records_ptr=cache.records,
        first_ptr=cache.first_tokens,
        exact_ptr=cache.exact,
        ring_pages_ptr=batch.ring_pages,
        page_table_ptr=batch.page_table,
        seq_lens_ptr=batch.seq_lens,
        exact_starts_ptr=batch.exact_starts,
        requests_ptr=workspace.split_requests,
        indptr_ptr=workspace.split_indptr,
        out_ptr=workspace.partial_out,
        lse_ptr=workspace.partial_lse,
        stride_page_table=batch.page_table.stride(0),
        sm_scale_log2=sm_scale * LOG2_E,
        batch_size=batch_size,
        HK=cache.num_kv_heads,
        GROUP=group,
        DRAFTS=drafts,
        M=rows,
        D=cache.head_dim,
        G=tile.TILE_SIZE,
        K_BITS=config.k_bits,
        V_BITS=config.v_bits,
        WINDOW=config.window_pages,
        SLIDING=workspace.sliding_window,
        RING_PAGES=batch.ring_pages.shape[1],
        SPLIT_UNITS=split_units(config),
        FIRST_BLOCK=FIRST_BLOCK,
        EXACT_BLOCK=exact_block,
        STAGES=2,
        num_warps=2,
    )
