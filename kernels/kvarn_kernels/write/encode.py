# SPDX-License-Identifier: Apache-2.0
"""Encode full pages into records, with the bytes that `reference.encode_tile` gives.

Nearly always: of 60 random pages in bfloat16 the record of two had 2 and 20 other bytes, where a code lies at the edge
of two. Sums are taken in float64, but in another order than the oracle's.

This is the portable form; on NVIDIA GPUs encode_cuda.py runs, with the same bytes (8,192 tokens of 8 KV heads of 128:
184 us on an H100, encode_us in benchmarks/results/prefill.csv, against 855 us on an H200).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record import tile
from kvarn_kernels.record.format import FIRST_REACH, LARGEST_INPUT, ROUNDS
from kvarn_kernels.record.ring import ring_ptrs

_LARGEST_INPUT = tl.constexpr(LARGEST_INPUT)
_FIRST_REACH = tl.constexpr(tuple(FIRST_REACH[bits] for bits in (2, 3, 4)))
_ROUNDS = tl.constexpr(tuple(ROUNDS[bits] for bits in (2, 3, 4)))
# programs of the ring encoder, of which one fits a multiprocessor. In most steps no page is full and all return at
# once, so few are better; where every page is full, many are. H100, 64 requests, 64, 128 and 256 programs: idle 5.6,
# 5.4 and 6.2 us, all full 732, 557 and 558 us
RING_PROGRAMS = 128


@triton.jit
def _sanitise(x):
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(tl.maximum(x, -_LARGEST_INPUT), _LARGEST_INPUT), 0.0)


@triton.jit
def _std(x, AXIS: tl.constexpr, COUNT: tl.constexpr):
    # sums in float64: their order does not reach the rounded float32, so every device gives the same bytes
    wide = x.to(tl.float64)
    total = tl.sum(wide, AXIS, keep_dims=True)
    squares = tl.sum(wide * wide, AXIS, keep_dims=True)
    variance = tl.maximum((squares - total * total / COUNT) / COUNT, 0.0).to(tl.float32)
    std = tl.sqrt_rn(variance)
    return tl.where(std > 0, std, 1.0)


@triton.jit
def _inverse(x):
    return tl.div_rn(tl.full(x.shape, 1.0, tl.float32), x)


@triton.jit
def _exponent(x):
    return ((x.to(tl.int32, bitcast=True) >> 23) & 0xFF) - 127


@triton.jit
def _power_of_two(exponent):
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _to_half(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def _codes(balanced, low, step, LEVELS: tl.constexpr):
    inverse = tl.where(step > 0, _inverse(tl.where(step > 0, step, 1.0)), 0.0)
    return tl.minimum(tl.maximum(tl.floor((balanced - low) * inverse + 0.5), 0.0), LEVELS)


@triton.jit
def _refit(balanced, valid, low, step, COUNT: tl.constexpr, LEVELS: tl.constexpr):
    """Return (codes, low, step) as the oracle's `_refit` does; elements that are not valid have code 0."""
    codes = tl.where(valid, _codes(balanced, low, step, LEVELS), 0.0)
    inverse = tl.where(step > 0, _inverse(tl.where(step > 0, step, 1.0)), 0.0)
    x = tl.where(valid, (balanced - low) * inverse, 0.0).to(tl.float64)
    c = codes.to(tl.float64)
    x_sum, c_sum = tl.sum(x, 1, keep_dims=True), tl.sum(c, 1, keep_dims=True)
    products, squares = tl.sum(x * c, 1, keep_dims=True), tl.sum(c * c, 1, keep_dims=True)
    spread = squares * COUNT - c_sum * c_sum
    slope = (products * COUNT - x_sum * c_sum) / tl.where(spread > 0, spread, 1.0)
    slope = tl.where(spread > 0, slope, 1.0)
    offset = (x_sum - slope * c_sum) / COUNT
    return codes, low + step * offset.to(tl.float32), step * slope.to(tl.float32)


@triton.jit
def _ratio(t, approx, other, AXIS: tl.constexpr):
    wide = t.to(tl.float64)
    power = tl.sum(wide * wide, AXIS, keep_dims=True)
    overlap = tl.sum(approx.to(tl.float64) * other.to(tl.float64), AXIS, keep_dims=True)
    ratio = tl.where(overlap > 0, power / tl.where(overlap > 0, overlap, 1.0), 1.0).to(tl.float32)
    return tl.minimum(tl.maximum(ratio, 0.25), 4.0)


@triton.jit
def _round_cross(cross):
    return tl.minimum(tl.maximum(cross, 2.0**-13), 2.0**13).to(tl.float16).to(tl.float32)


@triton.jit
def quantise_side(t, valid, ROW_COUNT: tl.constexpr, COL_COUNT: tl.constexpr, BITS: tl.constexpr):
    """Quantise T [R, C] float32 as `reference.quantise_side` does.

    Args:
        t: sanitised, 0 where not valid.
        valid: bool [R, C], false for the first token (a row of a value tile, a column of a key tile).
        ROW_COUNT, COL_COUNT: valid elements of a row and of a column.

    Returns:
        codes int32 [R, C] (0 where not valid), scale fp16 [R, 1], zero fp16 [R, 1], cross fp16 [1, C].
    """
    LEVELS: tl.constexpr = (1 << BITS) - 1
    row_inverse = _inverse(_std(t, 1, ROW_COUNT))
    cross = _round_cross(_std(t * row_inverse, 0, COL_COUNT))
    balanced = t * _inverse(cross)
    low = tl.min(tl.where(valid, balanced, float("inf")), 1, keep_dims=True)
    high = tl.max(tl.where(valid, balanced, float("-inf")), 1, keep_dims=True)
    # the row of the first token of a value tile has no valid element
    low = tl.where(low <= high, low, 0.0)
    high = tl.where(low <= high, high, 0.0)
    FIRST_REACH: tl.constexpr = _FIRST_REACH[BITS - 2]
    ROUNDS: tl.constexpr = _ROUNDS[BITS - 2]
    reach = (high - low) * (0.5 * FIRST_REACH)
    low = (low + high) * 0.5 - reach
    step = reach * (2.0 / LEVELS)
    for _ in range(ROUNDS):
        codes, low, step = _refit(balanced, valid, low, step, ROW_COUNT, LEVELS)
        approx = tl.where(valid, (codes * step + low) * cross, 0.0)
        cross = _round_cross(cross * tl.sqrt_rn(_ratio(t, approx, approx, 0)))
        balanced = t * _inverse(cross)
    codes = _codes(balanced, low, step, LEVELS)
    rows = codes * step + low
    # t is 0 where not valid, so these overlaps need no mask
    cross = _round_cross(cross * _ratio(t, rows * cross, t, 0))
    gain = _ratio(t, rows * cross, t, 1)
    scale, zero = step * gain, low * gain
    valid_column = tl.max(valid.to(tl.int32), 0, keep_dims=True) > 0
    cross = tl.where(valid_column, cross, 0.0)
    reach = tl.maximum(tl.abs(zero), tl.abs(scale * LEVELS + zero))
    exponent = _exponent(tl.max(reach, 0, keep_dims=True))  # [1, 1]
    exponent = tl.minimum(tl.maximum(exponent, -14), 14 - _exponent(tl.max(cross, 1, keep_dims=True)))
    down, up = _power_of_two(-exponent), _power_of_two(exponent)
    codes = tl.where(valid, codes, 0.0).to(tl.int32)
    return codes, _to_half(scale * down), _to_half(zero * down), _to_half(cross * up)


@triton.jit
def _pack_keys(codes, BITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Pack key codes int32 [G, D], which fit into a field, into words int32 [G / TB, D / CB]."""
    TB: tl.constexpr = tile.k_token_blocks(D, BITS)
    CB: tl.constexpr = tile.k_channel_blocks(D, BITS)
    fields = tl.reshape(codes, [G // TB, TB, D // CB, CB])
    i, j = tl.arange(0, TB), tl.arange(0, CB)
    shifts = tile.low_bits(BITS) * tile.k_field(i[:, None], (j // 2)[None, :], (j % 2)[None, :], D, BITS)  # [TB, CB]
    # fields do not overlap, so the sum is the bitwise or (and wraps like it in the sign bit)
    return tl.sum(tl.sum(fields << shifts[None, :, None, :], 3), 1)


@triton.jit
def _pack_values(codes, BITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Pack value codes int32 [G, D], which fit into a field, into words int32 [G / 4, D / CB]."""
    CB: tl.constexpr = tile.v_channel_blocks(BITS)
    fields = tl.reshape(codes, [G // 4, 4, CB, D // CB])
    t, j = tl.arange(0, 4), tl.arange(0, CB)
    shifts = tile.low_bits(BITS) * tile.v_field((t // 2)[:, None], j[None, :], (t % 2)[:, None], BITS)  # [4, CB]
    return tl.sum(tl.sum(fields << shifts[None, :, :, None], 2), 1)


@triton.jit
def _store_key_codes(words_ptr, codes, HEADER: tl.constexpr, BITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Store key codes int32 [G, D] and the header; words_ptr: int32 pointer to the key words."""
    TB: tl.constexpr = tile.k_token_blocks(D, BITS)
    W: tl.constexpr = D // tile.k_channel_blocks(D, BITS)
    r, c = tl.arange(0, G // TB), tl.arange(0, W)
    words = _pack_keys(codes & ((1 << tile.low_bits(BITS)) - 1), BITS, G, D)
    words = words | tl.where((r[:, None] == 0) & (c[None, :] == 0), HEADER, 0)
    tl.store(words_ptr + r[:, None] * W + c[None, :], words)
    if BITS == 3:
        # two words of 2-bit fields that hold 0 or 1 fit into each other
        pairs = tl.reshape(_pack_keys(codes >> 2, BITS, G, D), [G // TB // 2, 2, W])
        tops = tl.sum(pairs << tl.arange(0, 2)[None, :, None], 1)
        r = tl.arange(0, G // TB // 2)
        tl.store(words_ptr + tile.top_index(D) + r[:, None] * W + c[None, :], tops)


@triton.jit
def _store_value_codes(words_ptr, codes, BITS: tl.constexpr, G: tl.constexpr, D: tl.constexpr):
    """Store value codes int32 [G, D]; words_ptr: int32 pointer to the value words."""
    W: tl.constexpr = D // tile.v_channel_blocks(BITS)
    r, c = tl.arange(0, G // 4), tl.arange(0, W)
    words = _pack_values(codes & ((1 << tile.low_bits(BITS)) - 1), BITS, G, D)
    tl.store(words_ptr + tile.v_word_index(r[:, None], c[None, :], W), words)
    if BITS == 3:
        pairs = tl.reshape(_pack_values(codes >> 2, BITS, G, D), [G // 4, 2, W // 2])
        tops = tl.sum(pairs << tl.arange(0, 2)[None, :, None], 1)
        c = tl.arange(0, W // 2)
        tl.store(words_ptr + tile.top_index(D) + tile.v_word_index(r[:, None], c[None, :], W // 2), tops)


@triton.jit
def _load_rows(row_ptrs, chunk_ptr, chunk_offsets, in_ring, CHUNK: tl.constexpr):
    """Load exact rows from the ring, or (if CHUNK) from the chunk where they are not in the ring."""
    x = tl.load(row_ptrs, mask=in_ring, other=0.0)
    if CHUNK:
        x = tl.where(in_ring, x, tl.load(chunk_ptr + chunk_offsets, mask=~in_ring, other=0.0))
    return x


@triton.jit
def _store_first(x, first_ptr):
    # token 0, exact, as 16 bits: bf16 stays bf16, anything else becomes fp16
    if x.dtype == tl.bfloat16:
        tl.store(first_ptr, x.to(tl.int16, bitcast=True))
    else:
        tl.store(first_ptr, x.to(tl.float16).to(tl.int16, bitcast=True))


@triton.jit
def _encode_keys(
    record, row_ptrs, chunk_ptr, chunk_offsets, in_ring, CHUNK: tl.constexpr,
    D: tl.constexpr, G: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):  # fmt: skip
    g, d = tl.arange(0, G), tl.arange(0, D)
    x = _load_rows(
        row_ptrs[None, :] + d[:, None],
        chunk_ptr,
        chunk_offsets[None, :] + d[:, None],
        in_ring[None, :] & (d >= 0)[:, None],
        CHUNK,
    )  # [D, G]
    valid = (g > 0)[None, :] & (d >= 0)[:, None]
    codes, scale, zero, cross = quantise_side(tl.where(valid, _sanitise(x), 0.0), valid, G - 1, D, K_BITS)
    HEADER: tl.constexpr = tile.header(x.dtype == tl.bfloat16)
    _store_key_codes(record.to(tl.pointer_type(tl.int32)), tl.trans(codes), HEADER, K_BITS, G, D)
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    tl.store(halves + tile.k_channel_scale_index(D) + d[:, None], scale)
    tl.store(halves + tile.k_channel_zero_index(D) + d[:, None], zero)
    tl.store(halves + tile.k_token_scale_index(D) + g[None, :], cross)


@triton.jit
def _encode_values(
    record, row_ptrs, chunk_ptr, chunk_offsets, in_ring, CHUNK: tl.constexpr,
    D: tl.constexpr, G: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr
):  # fmt: skip
    g, d = tl.arange(0, G), tl.arange(0, D)
    x = _load_rows(
        row_ptrs[:, None] + d[None, :],
        chunk_ptr,
        chunk_offsets[:, None] + d[None, :],
        in_ring[:, None] & (d >= 0)[None, :],
        CHUNK,
    )  # [G, D]
    valid = (g > 0)[:, None] & (d >= 0)[None, :]
    codes, scale, zero, cross = quantise_side(tl.where(valid, _sanitise(x), 0.0), valid, D, G - 1, V_BITS)
    values = (record + tile.v_codes_offset(D, K_BITS)).to(tl.pointer_type(tl.int32))
    _store_value_codes(values, codes, V_BITS, G, D)
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    tl.store(halves + tile.v_token_scale_index(D) + g[:, None], scale)
    tl.store(halves + tile.v_token_zero_index(D) + g[:, None], zero)
    tl.store(halves + tile.v_channel_scale_index(D) + d[None, :], cross)


@triton.jit
def _encode_page(
    records_ptr, exact_ptr, pages_ptr, chunk_k_ptr, chunk_v_ptr, page_id, page, prefix_len, chunk_start, side,
    HK: tl.constexpr, D: tl.constexpr, G: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr,
    RING_PAGES: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """Encode keys (side 2 h) or values (side 2 h + 1) of KV head h of one page.

    Args:
        exact_ptr: pages in the model's dtype; pages_ptr: pages of the request's ring.
        page_id: int64, page to write; page: page number in the request.
        prefix_len: tokens that are in the ring; chunk_start: int64, index of token prefix_len in the chunk.
    """
    head = side // 2
    g, d = tl.arange(0, G), tl.arange(0, D)
    position = page * G + g
    in_ring = position < prefix_len
    ring = ring_ptrs(exact_ptr, pages_ptr, position, head, HK, D, K_BITS, V_BITS, RING_PAGES)
    chunk_offsets = ((chunk_start + position - prefix_len) * HK + head) * D
    # token 0 as a block of one, so that it is loaded like the others
    first = tl.arange(0, 1) + page * G
    first_in_ring = (first < prefix_len)[:, None] & (d >= 0)[None, :]
    first_ring = ring_ptrs(exact_ptr, pages_ptr, first, head, HK, D, K_BITS, V_BITS, RING_PAGES)[:, None] + d[None, :]
    first_chunk = ((chunk_start + first - prefix_len) * HK + head)[:, None] * D + d[None, :]
    record = records_ptr + (page_id * HK + head) * tile.record_bytes(D, K_BITS, V_BITS)
    firsts = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.int16))
    if side % 2 == 0:
        _encode_keys(
            record, ring, chunk_k_ptr, chunk_offsets, in_ring, CHUNK, D, G, K_BITS, V_BITS
        )
        x = _load_rows(first_ring, chunk_k_ptr, first_chunk, first_in_ring, CHUNK)
        _store_first(x, firsts + tile.k_first_index(D) + d[None, :])
    else:
        _encode_values(
            record, ring + D, chunk_v_ptr, chunk_offsets, in_ring, CHUNK, D, G, K_BITS, V_BITS
        )
        x = _load_rows(first_ring + D, chunk_v_ptr, first_chunk, first_in_ring, CHUNK)
        _store_first(x, firsts + tile.v_first_index(D) + d[None, :])


@triton.jit(do_not_specialize=["batch_size"])
def _encode_ring_kernel(
    records_ptr,  # [P, Hk, RECORD] uint8, written
    exact_ptr,  # the same memory in the model's dtype
    ring_pages_ptr,  # [B, RING_PAGES] int32
    seq_lens_ptr,  # [B] int32
    store_pages_ptr,  # [B] int32
    batch_size,
    SLICES: tl.constexpr,  # programs that share the requests of a side
    BLOCK: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RING_PAGES: tl.constexpr,
):
    for begin in range(tl.program_id(0), batch_size, SLICES * BLOCK):
        b = begin + SLICES * tl.arange(0, BLOCK)
        seq_lens = tl.load(seq_lens_ptr + b, mask=b < batch_size, other=1)
        # in 127 of 128 steps of a request there is nothing to do: one load tells for a whole slice
        if tl.max((seq_lens % G == 0).to(tl.int32), 0) > 0:
            for request in range(begin, tl.minimum(begin + SLICES * BLOCK, batch_size), SLICES):
                seq_len = tl.load(seq_lens_ptr + request)
                if seq_len % G == 0:
                    page_id = tl.load(store_pages_ptr + request).to(tl.int64)
                    pages_ptr = ring_pages_ptr + request * RING_PAGES
                    # there is no chunk
                    _encode_page(
                        records_ptr, exact_ptr, pages_ptr, exact_ptr, exact_ptr, page_id, seq_len // G - 1, seq_len,
                        page_id, tl.program_id(1), HK, D, G, K_BITS, V_BITS, RING_PAGES, False
                    )  # fmt: skip


@triton.jit
def _encode_chunk_kernel(
    records_ptr,  # [P, Hk, RECORD] uint8, written
    exact_ptr,  # the same memory in the model's dtype
    ring_pages_ptr,  # [B, RING_PAGES] int32
    chunk_k_ptr,  # [T, Hk, D] rotated new tokens
    chunk_v_ptr,
    prefix_lens_ptr,  # [B] int32
    seq_lens_ptr,  # [B] int32
    qo_indptr_ptr,  # [B + 1] int32
    page_table_ptr,  # [B, P_max] int32
    stride_page_table,
    HK: tl.constexpr,
    D: tl.constexpr,
    G: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RING_PAGES: tl.constexpr,
):
    b = tl.program_id(0)
    prefix_len = tl.load(prefix_lens_ptr + b)
    page = prefix_len // G + tl.program_id(1)
    if (page + 1) * G > tl.load(seq_lens_ptr + b):
        return
    page_id = tl.load(page_table_ptr + b.to(tl.int64) * stride_page_table + page).to(tl.int64)
    chunk_start = tl.load(qo_indptr_ptr + b).to(tl.int64)
    _encode_page(
        records_ptr, exact_ptr, ring_pages_ptr + b * RING_PAGES, chunk_k_ptr, chunk_v_ptr, page_id, page,
        prefix_len, chunk_start, tl.program_id(2), HK, D, G, K_BITS, V_BITS, RING_PAGES, True
    )  # fmt: skip


def ring_slices(num_kv_heads: int) -> int:
    """Return into how many slices the requests of a decode step are cut, one program each per side and KV head."""
    return max(1, RING_PROGRAMS // (2 * num_kv_heads))


def _constants(cache: LayerCache, config: KVarNConfig, ring_pages: int) -> dict[str, int | bool]:
    return {
        "HK": cache.num_kv_heads,
        "D": cache.head_dim,
        "G": tile.TILE_SIZE,
        "K_BITS": config.k_bits,
        "V_BITS": config.v_bits,
        "RING_PAGES": ring_pages,
        "num_warps": 8,
        # contraction of a * b + c would change the last bit against the oracle
        "enable_fp_fusion": False,
    }


def encode_from_ring(cache: LayerCache, batch: DecodeBatch, config: KVarNConfig) -> None:
    """Encode, for each request whose seq_len is a multiple of the page, its last page from the ring.

    Programs of other requests return at once, so that it can be part of a CUDA graph.

    Args:
        cache: ring read, records written; batch: the step, its tokens stored.
    """
    slices = ring_slices(cache.num_kv_heads)
    _encode_ring_kernel[(slices, 2 * cache.num_kv_heads)](
        records_ptr=cache.records,
        exact_ptr=cache.exact,
        ring_pages_ptr=batch.ring_pages,
        seq_lens_ptr=batch.seq_lens,
        store_pages_ptr=batch.store_pages,
        batch_size=batch.num_tokens,
        SLICES=slices,
        BLOCK=64,
        **_constants(cache, config, batch.ring_pages.shape[1]),
    )


def encode_from_chunk(
    rotated: QKV, cache: LayerCache, batch: ExtendBatch, config: KVarNConfig, *, early_start: bool = False
) -> None:
    """Encode every page that the new tokens of each request complete, from the chunk and, before it, the ring.

    Args:
        rotated: k and v [T, Hk, D] of the new tokens, contiguous, model dtype.
        cache: ring read as it was before the chunk, records written; batch: the step.
        early_start: what was queued last on the stream need not have ended, which only `encode_cuda` makes use of.
    """
    if batch.max_full_pages == 0:
        return
    _encode_chunk_kernel[(batch.ring_pages.shape[0], batch.max_full_pages, 2 * cache.num_kv_heads)](
        records_ptr=cache.records,
        exact_ptr=cache.exact,
        ring_pages_ptr=batch.ring_pages,
        chunk_k_ptr=rotated.k,
        chunk_v_ptr=rotated.v,
        prefix_lens_ptr=batch.prefix_lens,
        seq_lens_ptr=batch.seq_lens,
        qo_indptr_ptr=batch.qo_indptr,
        page_table_ptr=batch.page_table,
        stride_page_table=batch.page_table.stride(0),
        **_constants(cache, config, batch.ring_pages.shape[1]),
    )
