# SPDX-License-Identifier: Apache-2.0
"""Decode attention: split-KV over records, first tokens and ring; partial results to the workspace."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels import decode_sm90, tile
from kvarn_kernels.attend import (
    LOG2_E,
    SHIFT,
    attend_exact,
    attend_record,
    load_query_blocks,
    normalise_query,
    zero_blocks,
)
from kvarn_kernels.cache import DecodeBatch, DecodeWorkspace, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.reference import first_row_dtype

# pages of a split in the canonical presets: the plan then depends on positions only
CANONICAL_SPLIT_PAGES = 16
# programs that fill an H100 / H200 (132 multiprocessors x 8 resident programs of 2 warps)
TARGET_PROGRAMS = 1056
# a split shorter than this costs more in the merge than it hides
MIN_SPLIT_PAGES = 4
FIRST_BLOCK = 16
EXACT_BLOCK = 64


def num_splits(batch_size: int, num_kv_heads: int, max_pages: int, config: KVarNConfig) -> int:
    """Return the splits of each request in a step of batch_size, the ring's included.

    Depends on sizes known when a CUDA graph is captured, never on sequence lengths.
    """
    if config.is_canonical:
        return triton.cdiv(max_pages, CANONICAL_SPLIT_PAGES) + 1
    wanted = triton.cdiv(TARGET_PROGRAMS, batch_size * num_kv_heads)
    return max(1, min(wanted, triton.cdiv(max_pages, MIN_SPLIT_PAGES))) + 1


def make_workspace(
    max_batch: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_pages: int,
    config: KVarNConfig,
    device: torch.device,
) -> DecodeWorkspace:
    """Allocate the workspace for every batch size up to max_batch and requests of up to max_pages pages."""
    rows = max(b * num_splits(b, num_kv_heads, max_pages, config) for b in range(1, max_batch + 1)) * num_qo_heads
    return DecodeWorkspace(
        rotated_q=torch.empty(max_batch, num_qo_heads, head_dim, dtype=torch.float32, device=device),
        partial_out=torch.empty(rows, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(rows, dtype=torch.float32, device=device),
        num_splits=tuple(num_splits(b, num_kv_heads, max_pages, config) for b in range(1, max_batch + 1)),
    )


@triton.jit(do_not_specialize=["S"])
def _decode_kernel(
    rotated_q_ptr,  # [B, Hq, D] float32
    records_ptr,  # [P, Hk, RECORD] uint8
    first_ptr,  # the same memory in the dtype of the first rows
    ring_k_ptr,  # [R, RING_LEN, Hk, D]
    ring_v_ptr,
    page_table_ptr,  # [B, P_max] int32
    rows_ptr,  # [B] int64
    seq_lens_ptr,  # [B] int32
    exact_starts_ptr,  # [B] int32
    out_ptr,  # [B, Hq, S, D] float32, written
    lse_ptr,  # [B, Hq, S] float32, written
    stride_page_table,
    sm_scale_log2,
    S,
    HK: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    M: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLIT_PAGES: tl.constexpr,  # 0: pages of the request shared evenly by the splits
    FIRST_BLOCK: tl.constexpr,
    EXACT_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    split, head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    K_BLOCKS: tl.constexpr = tile.k_channel_blocks(D, K_BITS)
    V_BLOCKS: tl.constexpr = tile.v_channel_blocks(V_BITS)
    VW: tl.constexpr = D // V_BLOCKS
    RECORD: tl.constexpr = tile.record_bytes(D, K_BITS, V_BITS)
    RING_LEN: tl.constexpr = (WINDOW + 1) * G
    position = tl.load(seq_lens_ptr + b) - 1
    page = position // G
    # first page that is read exactly; every page before it is read from its record
    exact_page = tl.minimum(tl.maximum(page - WINDOW, tl.load(exact_starts_ptr + b) // G), page)
    rm = tl.arange(0, M)
    row_mask = rm < GROUP
    qo = (b * HK + head) * GROUP + rm
    d = tl.arange(0, D)
    q_ptrs = rotated_q_ptr + qo * D
    q = tl.load(q_ptrs[:, None] + d[None, :], mask=row_mask[:, None], other=0.0)
    q, row_scale = normalise_query(q, sm_scale_log2)
    m = tl.full([M], float("-inf"), tl.float32)
    l = tl.zeros([M], tl.float32)
    acc = zero_blocks(V_BLOCKS, M, VW)
    if split == S - 1:
        row = tl.load(rows_ptr + b)
        n = tl.arange(0, EXACT_BLOCK)
        for start in tl.range(exact_page * G, position + 1, EXACT_BLOCK):
            j = start + n
            offsets = ((row * RING_LEN + j % RING_LEN) * HK + head) * D
            k_ptrs, v_ptrs = ring_k_ptr + offsets, ring_v_ptr + offsets
            seen = j <= position
            m, l, acc = attend_exact(q, row_scale, k_ptrs, v_ptrs, seen, seen[None, :], m, l, acc, D, V_BLOCKS)
    else:
        if SPLIT_PAGES > 0:
            per_split = SPLIT_PAGES
        else:
            per_split = tl.cdiv(exact_page, S - 1)
        begin = split * per_split
        end = tl.minimum(begin + per_split, exact_page)
        pages_ptr = page_table_ptr + b * stride_page_table
        f = tl.arange(0, FIRST_BLOCK)
        FIRST: tl.constexpr = tile.scales_offset(D, K_BITS, V_BITS) // 2 + tile.k_first_index(D)
        for start in tl.range(begin, end, FIRST_BLOCK):
            ids = tl.load(pages_ptr + start + f, mask=start + f < end, other=0).to(tl.int64)
            k_ptrs = first_ptr + (ids * HK + head) * (RECORD // 2) + FIRST
            exists = start + f < end
            v_ptrs = k_ptrs + D
            m, l, acc = attend_exact(q, row_scale, k_ptrs, v_ptrs, exists, exists[None, :], m, l, acc, D, V_BLOCKS)
        blocks = load_query_blocks(q_ptrs, row_mask, row_scale, sm_scale_log2, D, K_BLOCKS)
        for p in tl.range(begin, end, num_stages=STAGES):
            page_id = tl.load(pages_ptr + p).to(tl.int64)
            record = records_ptr + (page_id * HK + head) * RECORD
            m, l, acc = attend_record(blocks, row_scale, record, row_mask, m, l, acc, D, K_BITS, V_BITS)
    empty = l == 0.0
    inverse = 1.0 / tl.where(empty, 1.0, l)
    out_row = out_ptr + (qo * S + split) * D
    vw = tl.arange(0, VW)
    for j in tl.static_range(V_BLOCKS):
        tl.store(out_row[:, None] + (j * VW + vw)[None, :], acc[j] * inverse[:, None], mask=row_mask[:, None])
    lse = tl.where(empty, float("-inf"), m + tl.log2(tl.where(empty, 1.0, l)) - SHIFT)
    tl.store(lse_ptr + qo * S + split, lse, mask=row_mask)


def decode(
    cache: LayerCache,
    batch: DecodeBatch,
    config: KVarNConfig,
    num_qo_heads: int,
    num_kv_heads: int,
    sm_scale: float,
) -> None:
    """Attend one query token per request; each split's normalised output and lse go to the workspace.

    Reads batch.workspace.rotated_q, the records of the older pages and the ring of the request's row. The record part
    of a request is shared by splits 0 .. S - 2, the last split is its ring. Split sizes depend on the request's own
    length (and, unless canonical, on the batch size through S), so that a CUDA graph serves any lengths. Hopper and
    newer GPUs run decode_sm90.cu, others the Triton kernel above.
    """
    workspace = batch.workspace
    assert workspace is not None, "the Triton form needs a DecodeWorkspace"
    batch_size, head_dim = batch.rows.shape[0], cache.ring_k.shape[3]
    split_pages = CANONICAL_SPLIT_PAGES if config.is_canonical else 0
    if decode_sm90.is_supported(cache.records.device) and cache.ring_k.dtype != torch.float32:
        scale = sm_scale * LOG2_E
        decode_sm90.decode(cache, batch, config, num_qo_heads, num_kv_heads, scale, split_pages)
        return
    splits = workspace.num_splits[batch_size - 1]
    _decode_kernel[(splits, num_kv_heads, batch_size)](
        workspace.rotated_q,
        cache.records,
        cache.records.view(first_row_dtype(cache.ring_k.dtype)),
        cache.ring_k,
        cache.ring_v,
        batch.page_table,
        batch.rows,
        batch.seq_lens,
        batch.exact_starts,
        workspace.partial_out,
        workspace.partial_lse,
        batch.page_table.stride(0),
        sm_scale * LOG2_E,
        splits,
        HK=num_kv_heads,
        GROUP=num_qo_heads // num_kv_heads,
        M=max(16, triton.next_power_of_2(num_qo_heads // num_kv_heads)),
        D=head_dim,
        G=config.tile_size,
        K_BITS=config.k_bits,
        V_BITS=config.v_bits,
        WINDOW=config.window_pages,
        SPLIT_PAGES=split_pages,
        FIRST_BLOCK=FIRST_BLOCK,
        EXACT_BLOCK=EXACT_BLOCK,
        STAGES=2,
        num_warps=2,
    )
