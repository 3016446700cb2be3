# SPDX-License-Identifier: Apache-2.0
"""The caches that bench_quality compares. Each attends a whole sequence as if it had been fed token by
token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from kvarn_kernels import reference
from kvarn_kernels.attention import Attention
from kvarn_kernels.batch import QKV, ExtendBatch, Limits
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

from benchmarks.quality import published

PAGE = TILE_SIZE
# attends q [T, Hq, D] to k, v [T, Hk, D] (after RoPE, model dtype) with a scale of the scores, causally, to the tokens
# of a sliding window, 0 for all: float32 [T, Hq, D]
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float, int], torch.Tensor]


@dataclass(frozen=True)
class Cache:
    """One row of the comparison.

    Attributes:
        name: as in the table.
        bytes_per_token: per token and KV head at a head_dim; what a long context costs, rings and exact first
            pages not counted.
        attend: the attention of a model that has this cache.
        config: of a preset.
        balanced: whether the model's weights are balanced first, as a server with a preset does.
    """

    name: str
    bytes_per_token: Callable[[int], float]
    attend: Attend
    config: KVarNConfig | None = None
    balanced: bool = False


def attend_pages(
    q: torch.Tensor,
    exact: tuple[torch.Tensor, torch.Tensor],
    cached: tuple[torch.Tensor, torch.Tensor],
    is_exact: Callable[[int, torch.Tensor], torch.Tensor],
    sm_scale: float,
    sliding_window: int = 0,
) -> torch.Tensor:
    """Attend page by page, reading each key page exactly or from the cache.

    Args:
        q: [T, Hq, D]. exact, cached: (k, v), each [T, Hk, D], in the frame of q.
        is_exact: for a query page and the key pages int64 [n] up to it, which of them are read exactly, bool
            [n].
        sliding_window: tokens up to its own that a query sees, 0 for all.
    """
    tokens, qo_heads, _ = q.shape
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    (exact_k, exact_v), (cached_k, cached_v) = (
        tuple(x.float().transpose(0, 1) for x in pair) for pair in (exact, cached)
    )
    kv_heads = exact_k.shape[0]
    positions = torch.arange(tokens, device=q.device)
    for start in range(0, tokens, PAGE):
        end = min(start + PAGE, tokens)
        pages = positions[:end] // PAGE
        choose = is_exact(start // PAGE, pages)[:, None]
        k = torch.where(choose, exact_k[:, :end], cached_k[:, :end])
        v = torch.where(choose, exact_v[:, :end], cached_v[:, :end])
        # [Hk, group, n, D]
        own = q[start:end].float().transpose(0, 1).unflatten(0, (kv_heads, qo_heads // kv_heads))
        scores = (own @ k.unsqueeze(1).transpose(-1, -2)) * sm_scale
        distance = positions[start:end, None] - positions[:end]
        scores.masked_fill_((distance < 0) | (distance >= (sliding_window or end)), float("-inf"))
        out[start:end] = (scores.softmax(-1) @ v.unsqueeze(1)).flatten(0, 1).transpose(0, 1)
    return out


def _all_pages(page: int, keys: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(keys, dtype=torch.bool)


def _no_pages(page: int, keys: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(keys, dtype=torch.bool)


def unquantised() -> Cache:
    """Return the cache that the others are compared with: k and v in the model's 16-bit dtype."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int = 0
    ) -> torch.Tensor:
        return attend_pages(q, (k, v), (k, v), _all_pages, sm_scale, sliding_window)

    return Cache("16-bit", lambda head_dim: 4 * head_dim, attend)


def fp8() -> Cache:
    """Return SGLang's fp8 cache: e4m3, scale 1.0, every token of the cache, also those of the query's own
    page."""

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int = 0
    ) -> torch.Tensor:
        cached = tuple(x.to(torch.float8_e4m3fn).to(x.dtype) for x in (k, v))
        return attend_pages(q, (k, v), cached, _no_pages, sm_scale, sliding_window)

    return Cache("fp8_e4m3", lambda head_dim: 2 * head_dim, attend)


def kvarn(name: str, window_pages: int | None = None) -> Cache:
    """Return a preset, run as it is served: `Attention`, the kernels on a GPU and torch on a CPU.

    Args:
        window_pages: another exact window than the preset's, to see what it is worth; a request's ring has a page
            more than that.
    """
    config = KVarNConfig.from_preset(name)
    if window_pages is not None:
        config = replace(config, name=f"{config.name} window {window_pages}", window_pages=window_pages)

    # one for each shape and length, not for each layer
    @lru_cache(maxsize=4)
    def attention_of(shape: AttentionShape, device: torch.device, pages: int, sliding_window: int) -> Attention:
        return Attention(shape, config, device, Limits(1, pages, 1, pages), sliding_windows=[sliding_window])

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int = 0
    ) -> torch.Tensor:
        tokens, kv_heads, head_dim = k.shape
        pages = -(-tokens // PAGE)
        shape = AttentionShape(q.shape[1], kv_heads, head_dim, q.dtype)
        attention = attention_of(shape, q.device, pages, sliding_window)
        ring = range(pages + 1, pages + 1 + config.ring_pages(head_dim, k.element_size()))
        size = (ring.stop, kv_heads, config.record_bytes(head_dim))
        records = torch.zeros(size, dtype=torch.uint8, device=k.device)

        def numbers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=k.device)

        batch = ExtendBatch(
            ring_pages=numbers(*ring)[None],
            prefix_lens=numbers(0),
            seq_lens=numbers(tokens),
            qo_indptr=numbers(0, tokens),
            page_table=numbers(*range(1, pages + 1))[None],
            exact_starts=numbers(0),
            prefix_lens_host=[0],
            seq_lens_host=[tokens],
        )
        out = torch.empty_like(q)
        cache = LayerCache(records, head_dim, q.dtype)
        attention.attend(QKV(q, k, v), out, cache, attention.plan(batch), sm_scale, None, sliding_window)
        return out.float()

    return Cache(config.name, config.bytes_per_token, attend, config, balanced=True)


def unbalanced(cache: Cache) -> Cache:
    """Return a preset on weights as a checkpoint has them, which a server has with KVARN_BALANCE=0."""
    return replace(cache, name=f"{cache.name} unbalanced", balanced=False)


def whole_tiles(x: torch.Tensor) -> torch.Tensor:
    """Return the whole pages of x [T, Hk, D] as tiles [P, Hk, G, D], float32."""
    full = len(x) // PAGE * PAGE
    return x[:full].float().unflatten(0, (-1, PAGE)).transpose(1, 2)


def _replace_pages(x: torch.Tensor, tiles: torch.Tensor) -> torch.Tensor:
    """Return x [T, Hk, D] as float32 with its whole pages replaced by tiles [P, Hk, G, D]."""
    pages = tiles.transpose(1, 2).flatten(0, 1)
    return torch.cat([pages, x[len(pages) :].float()])


def published_kvarn(k_bits: int, v_bits: int, prompt: int) -> Cache:
    """Return the published method as its authors serve it.

    8 clamped iterations and min / max codes; the first page and the query's own page exact; the prompt
    attended exactly.

    Args:
        prompt: tokens of the prompt, a multiple of the page; the tokens after it count as generated.
    """
    prompt_pages = prompt // PAGE

    def is_exact(page: int, keys: torch.Tensor) -> torch.Tensor:
        return (keys == 0) | (keys == page) | (page < prompt_pages)

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int = 0
    ) -> torch.Tensor:
        q, k, v = (reference.rotate(x).half() for x in (q, k, v))
        k_tiles = published.round_trip(whole_tiles(k).transpose(-1, -2), k_bits).transpose(-1, -2)
        v_tiles = published.round_trip(whole_tiles(v), v_bits)
        cached = (_replace_pages(k, k_tiles), _replace_pages(v, v_tiles))
        return reference.rotate(attend_pages(q, (k, v), cached, is_exact, sm_scale, sliding_window))

    def bytes_per_token(head_dim: int) -> float:
        return head_dim * (k_bits + v_bits) / 8 + 6 * head_dim / PAGE + 6

    return Cache(f"published_k{k_bits}v{v_bits}", bytes_per_token, attend)


def _read_back(
    config: KVarNConfig, read: Callable[[torch.Tensor, int], torch.Tensor], exact_tokens: int = 1
) -> Cache:
    """Return a cache that follows the position rule and reads what `read` makes of a side's tiles and bits.

    Args:
        exact_tokens: of a page, its first ones, which are exact and left out of the statistics.
    """

    def is_exact(page: int, keys: torch.Tensor) -> torch.Tensor:
        return keys >= page - config.window_pages

    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int = 0
    ) -> torch.Tensor:
        q, k, v = (reference.rotate(x).to(x.dtype) for x in (q, k, v))
        k_tiles, v_tiles = whole_tiles(k), whole_tiles(v)
        k_read, v_read = (x[..., exact_tokens:, :] for x in (k_tiles, v_tiles))
        k_read.copy_(read(k_read.transpose(-1, -2), config.k_bits).transpose(-1, -2))
        v_read.copy_(read(v_read, config.v_bits))
        cached = (_replace_pages(k, k_tiles), _replace_pages(v, v_tiles))
        return reference.rotate(attend_pages(q, (k, v), cached, is_exact, sm_scale, sliding_window))

    return Cache(config.name, config.bytes_per_token, attend)


def read_fitted(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Return what the encoder's codes and scales make of tiles [..., R, C], rows with a scale and a zero."""
    side = reference.quantise_side(tiles, bits)
    return (side.codes * side.scale[..., None] + side.zero[..., None]) * side.cross[..., None, :]


def read_min_max(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the same with codes that span minimum to maximum of a row and are not fitted."""
    return published.quantise(tiles, bits, 1.0, reference.cross_scale(tiles))


def read_unnormalised(tiles: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the same without a scale across rows, so without what gives the paper its name."""
    return published.quantise(tiles, bits, 1.0, torch.ones_like(reference.cross_scale(tiles)))


def lacking(name: str) -> list[Cache]:
    """Return a preset without parts of it: window; exact first tokens; fitted codes; fitted codes and normalisation."""
    config = KVarNConfig.from_preset(name)

    def named(what: str, **changes: int) -> KVarNConfig:
        return replace(config, name=f"{config.name} without {what}", **changes)

    return [
        _read_back(named("window", window_pages=0), read_fitted),
        _read_back(named("first tokens"), read_fitted, exact_tokens=0),
        _read_back(named("fitted codes"), read_min_max),
        _read_back(named("normalisation"), read_unnormalised),
    ]


def min_max(name: str) -> Cache:
    """Return a preset with plain min / max codes instead of the clipped, unbiased ones, all else equal."""
    config = KVarNConfig.from_preset(name)
    return _read_back(replace(config, name=f"min_max_{config.name.removeprefix('kvarn_')}"), read_min_max)


def simulated(k_bits: int, v_bits: int) -> Cache:
    """Return what a preset of other bit widths would be: the encoder's codes and scales, in no record."""
    return _read_back(KVarNConfig(f"simulated_k{k_bits}v{v_bits}", k_bits, v_bits), read_fitted)


def all_caches(prompt: int) -> dict[str, Cache]:
    """Return every row by name; an alias of a preset is accepted, but is not a row of its own.

    Args:
        prompt: see `published_kvarn`.
    """
    presets = dict.fromkeys(KVarNConfig.from_preset(name).name for name in preset_names())
    rows = [
        *(kvarn(name) for name in presets),
        fp8(),
        *(published_kvarn(*bits, prompt) for bits in ((4, 2), (4, 4), (2, 2))),
        min_max("kvarn_k2v2_g128"),
        simulated(3, 3),
    ]
    return {row.name: row for row in rows}
