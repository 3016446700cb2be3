# SPDX-License-Identifier: Apache-2.0
"""Both kinds of step in batched torch, for a CPU: record bytes, position rule and memory of the kernels.

Requests are attended one by one and prompts in blocks at fixed positions, so that the output of a position has the
same bits whatever the chunk, the page ids and the other requests. It reads nothing but the request's own ring,
the page table entries of pages that hold tokens and the records of full pages.
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.reference import decode_tile, encode_tile, rotate

# pages that are encoded or decoded at once; bounds the float64 temporaries of the encoder to some 100 MB
PAGE_SLAB = 32
# positions that are attended together, a divisor of the page. A matrix product rounds a row by its place and by the
# number of rows, so a chunk is filled up with zeros to whole blocks. On one core 2,048 tokens of 9 heads of 64 took 270
# ms; blocks of 16, 32 and 128 took 326, 349 and 343 ms
QUERY_BLOCK = 64


def record_pages(position: int, exact_start: int, config: KVarNConfig) -> int:
    """Return how many leading pages the query at a position reads from records; the others are exact."""
    page = position // TILE_SIZE
    return min(page, max(page - config.window_pages, exact_start // TILE_SIZE))


def first_page(position: int, sliding_window: int) -> int:
    """Return the page of the first key that the query at a position reads; sliding_window: in tokens, 0 for none."""
    return max(position - sliding_window + 1, 0) // TILE_SIZE if sliding_window else 0


def _decode_pages(
    cache: LayerCache, pages: torch.Tensor, config: KVarNConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the decoded keys and values of n pages, each float32 [Hk, n * G, D]."""
    shape = (cache.num_kv_heads, len(pages), TILE_SIZE, cache.head_dim)
    k, v = (torch.empty(shape, dtype=torch.float32, device=cache.records.device) for _ in range(2))
    for start in range(0, len(pages), PAGE_SLAB):
        slab = slice(start, start + PAGE_SLAB)
        k[:, slab], v[:, slab] = decode_tile(
            cache.records[pages[slab].long()].transpose(0, 1), config, cache.head_dim
        )
    return k.flatten(1, 2), v.flatten(1, 2)


def _encode_pages(
    k: torch.Tensor, v: torch.Tensor, cache: LayerCache, pages: torch.Tensor, config: KVarNConfig
) -> None:
    """Encode n whole pages of rotated keys and values, each [n * G, Hk, D], into the records of page ids."""
    tiles = [x.unflatten(0, (len(pages), TILE_SIZE)).transpose(1, 2) for x in (k, v)]
    for start in range(0, len(pages), PAGE_SLAB):
        slab = slice(start, start + PAGE_SLAB)
        cache.records[pages[slab].long()] = encode_tile(tiles[0][slab], tiles[1][slab], config)


def _ring_view(cache: LayerCache) -> torch.Tensor:
    """Return the pages as exact tokens, a view [P, Hk, T, 2, D] of keys and values, T to a page."""
    tokens = cache.exact.shape[2] // (2 * cache.head_dim)
    return cache.exact[:, :, : tokens * 2 * cache.head_dim].unflatten(2, (tokens, 2, cache.head_dim))


def _places(view: torch.Tensor, pages: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (page, place in it) of positions, int64 [n]; pages: of the request's ring, [N]."""
    return pages[positions // view.shape[2] % len(pages)].long(), positions % view.shape[2]


def _ring_tokens(cache: LayerCache, pages: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of the positions start .. end - 1 of the request whose ring is in these pages.

    Each is [end - start, Hk, D].
    """
    view = _ring_view(cache)
    page, place = _places(view, pages, torch.arange(start, end, device=pages.device))
    k, v = view[page, :, place].unbind(2)
    return k, v


def _store_tokens(
    k: torch.Tensor, v: torch.Tensor, cache: LayerCache, pages: torch.Tensor, start: int
) -> None:
    """Write tokens [n, Hk, D] of the positions from start on, those that the next step may read, to a ring."""
    view, end = _ring_view(cache), start + len(k)
    kept = min(len(k), view.shape[2] * len(pages))
    page, place = _places(view, pages, torch.arange(end - kept, end, device=pages.device))
    view[page, :, place] = torch.stack([k, v], 2)[len(k) - kept :]


def _attend(
    q: torch.Tensor,
    records: tuple[torch.Tensor, torch.Tensor],
    exact: tuple[torch.Tensor, torch.Tensor],
    sm_scale: float,
    sinks: torch.Tensor | None = None,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Attend queries of one page to N decoded keys and E exact ones, of consecutive tokens up to the last query's own.

    Args:
        q: float32 [n, Hq, D], rotated, consecutive positions.
        records: decoded keys and values, each float32 [Hk, N, D].
        exact: exact keys and values, each float32 [Hk, E, D], E >= n; query r sees the first E - n + 1 + r.
        sinks: attention sinks [Hq], and sliding_window: see `reference.attention`.

    Returns:
        float32 [n, Hq, D], rotated.
    """
    queries, qo_heads, head_dim = q.shape
    (record_k, record_v), (exact_k, exact_v) = records, exact
    kv_heads, keys, _ = exact_k.shape
    # [Hk, group * n, D]
    rows = (q * sm_scale).transpose(0, 1).reshape(kv_heads, -1, head_dim)
    split = record_k.shape[1]
    parts = [rows @ record_k.transpose(1, 2)] if split else []
    scores = torch.cat([*parts, rows @ exact_k.transpose(1, 2)], -1)
    if queries > 1 or sliding_window:
        own = torch.arange(split + keys - queries, split + keys, device=q.device)[:, None]
        # without a window all queries see all decoded keys
        first = 0 if sliding_window else split
        key = torch.arange(first, split + keys, device=q.device)
        hidden = key > own
        if sliding_window:
            hidden |= key <= own - sliding_window
        scores[..., first:].unflatten(1, (-1, queries)).masked_fill_(hidden, float("-inf"))
    if sinks is not None:
        # [Hk, group * n, 1]; behind the keys, so that their weights are the first ones
        column = sinks.float().view(kv_heads, -1, 1).expand(-1, -1, queries).reshape(kv_heads, -1, 1)
        scores = torch.cat([scores, column], -1)
    weights = scores.softmax(-1)[..., : split + keys]
    out = weights[..., split:] @ exact_v
    if split:
        out = weights[..., :split] @ record_v + out
    return out.reshape(qo_heads, queries, head_dim).transpose(0, 1)


def attend_decode(
    new: QKV,
    out: torch.Tensor,
    cache: LayerCache,
    batch: DecodeBatch,
    config: KVarNConfig,
    sm_scale: float,
    sinks: torch.Tensor | None = None,
    sliding_window: int = 0,
) -> None:
    """Store one new token per row, encode the pages they fill, and attend; see `Attention.attend`."""
    q, k, v = new
    rotated_q = rotate(q)
    rotated_k, rotated_v = (rotate(x).to(cache.dtype) for x in (k, v))
    rotated_out = torch.empty_like(rotated_q)
    seq_lens = batch.seq_lens.tolist()
    # rows of one request share a ring, so all store before any reads
    for b, seq_len in enumerate(seq_lens):
        _store_tokens(rotated_k[b : b + 1], rotated_v[b : b + 1], cache, batch.ring_pages[b], seq_len - 1)
    for b, seq_len in enumerate(seq_lens):
        if seq_len % TILE_SIZE == 0:
            k_page, v_page = _ring_tokens(cache, batch.ring_pages[b], seq_len - TILE_SIZE, seq_len)
            _encode_pages(k_page, v_page, cache, batch.store_pages[b : b + 1], config)
    lens = [record_pages(n - 1, s, config) for n, s in zip(seq_lens, batch.exact_starts.tolist(), strict=True)]
    for first in range(0, len(seq_lens), batch.drafts):
        # the first row of a request reads the oldest page, the last one all others
        last, oldest = first + batch.drafts - 1, first_page(seq_lens[first] - 1, sliding_window)
        decoded = _decode_pages(cache, batch.page_table[last, oldest : lens[last]], config)
        for b in range(first, last + 1):
            exact = max(oldest, lens[b])
            exact_k, exact_v = (
                x.transpose(0, 1).float()
                for x in _ring_tokens(cache, batch.ring_pages[b], exact * TILE_SIZE, seq_lens[b])
            )
            split = (exact - oldest) * TILE_SIZE
            records = (decoded[0][:, :split], decoded[1][:, :split])
            exact_part = (exact_k, exact_v)
            rotated_out[b] = _attend(rotated_q[b : b + 1], records, exact_part, sm_scale, sinks, sliding_window)[0]
    out.copy_(rotate(rotated_out))


def _extend_request(
    rotated: QKV,
    b: int,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sm_scale: float,
    sinks: torch.Tensor | None,
    sliding_window: int,
) -> torch.Tensor:
    """Encode, attend and store request b of a batch.

    Args:
        rotated: its new tokens, q in float32.

    Returns:
        float32 [n, Hq, D], rotated.
    """
    q, k, v = rotated
    ring, exact_start, pages = batch.ring_pages[b], int(batch.exact_starts[b]), batch.page_table[b]
    prefix_len = batch.prefix_lens_host[b]
    seq_len = prefix_len + len(q)
    first_exact = record_pages(prefix_len, exact_start, config) * TILE_SIZE
    # positions first_exact .. seq_len - 1; the own page of the first new token is always among them
    exact = [
        torch.cat([old, new])
        for old, new in zip(_ring_tokens(cache, ring, first_exact, prefix_len), (k, v), strict=True)
    ]
    first, last = prefix_len // TILE_SIZE, seq_len // TILE_SIZE
    if last > first:
        fresh = slice(first * TILE_SIZE - first_exact, last * TILE_SIZE - first_exact)
        _encode_pages(exact[0][fresh], exact[1][fresh], cache, pages[first:last], config)
    # pages that have left the window of the first block are not read
    oldest = first_page(prefix_len - prefix_len % QUERY_BLOCK, sliding_window)
    records = _decode_pages(cache, pages[oldest : record_pages(seq_len - 1, exact_start, config)], config)
    begin, lead = prefix_len - prefix_len % QUERY_BLOCK, prefix_len % QUERY_BLOCK
    rest = -seq_len % QUERY_BLOCK
    queries = pad(q, (0, 0, 0, 0, lead, rest))
    exact_k, exact_v = (pad(x, (0, 0, 0, 0, 0, rest)).transpose(0, 1).float() for x in exact)
    out = torch.empty_like(queries)
    for start in range(begin, seq_len, QUERY_BLOCK):
        first_read = first_page(start, sliding_window)
        n = max(first_read, record_pages(start, exact_start, config)) * TILE_SIZE
        block = slice(start - begin, start - begin + QUERY_BLOCK)
        seen = slice(n - first_exact, start + QUERY_BLOCK - first_exact)
        decoded = slice((first_read - oldest) * TILE_SIZE, n - oldest * TILE_SIZE)
        older, own = (records[0][:, decoded], records[1][:, decoded]), (exact_k[:, seen], exact_v[:, seen])
        out[block] = _attend(queries[block], older, own, sm_scale, sinks, sliding_window)
    _store_tokens(k, v, cache, ring, prefix_len)
    return out[lead : lead + len(q)]


def attend_extend(
    new: QKV,
    out: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sm_scale: float,
    sinks: torch.Tensor | None = None,
    sliding_window: int = 0,
) -> None:
    """Store new tokens, encode the pages they fill, and attend; see `Attention.attend`."""
    q, k, v = new
    start = 0
    for b, new_tokens in enumerate(batch.new_tokens):
        own = slice(start, start + new_tokens)
        rotated = QKV(rotate(q[own]), rotate(k[own]).to(cache.dtype), rotate(v[own]).to(cache.dtype))
        attended = _extend_request(rotated, b, cache, batch, config, sm_scale, sinks, sliding_window)
        out[own] = rotate(attended).to(out.dtype)
        start = own.stop
