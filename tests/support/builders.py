# SPDX-License-Identifier: Apache-2.0
"""Requests, poisoned caches, batches and `Attention` objects for the kernel tests."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from kvarn_kernels import reference, torch_form
from kvarn_kernels.attention import TRITON, Attention, Kernels, Limits, choose_kernels
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read.decode_plan import DecodeWorkspace
from kvarn_kernels.shape import AttentionShape

PAGE = 128
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")

# largest relative RMS error of the torch form against the float64 oracle, by model dtype: the rounding of the
# output (2^-12 and 2^-9 of a value on average); float32: sums of float32 products
RELATIVE_RMS = {torch.float32: 5e-6, torch.float16: 4e-4, torch.bfloat16: 3e-3}

# what feeds a step: an `Attention`, or a function (new, out, cache, batch, config, sm_scale) such as
# `torch_form.attend_extend`
Attend = Attention | Callable[..., None]


@dataclass
class Request:
    """One sequence with everything it will ever feed, and where it lives.

    Attributes:
        q: [T, Hq, D]; k, v: [T, Hk, D]; model dtype, not rotated.
        row: request row; pages: page id of each page; exact_start: tokens taken from the prefix cache.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    row: int
    pages: list[int]
    exact_start: int = 0


def relative_rms(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Return rms(got - expected) / rms(expected); NaN if anything is NaN."""
    got, expected = got.double().cpu(), expected.double().cpu()
    return ((got - expected).square().mean().sqrt() / expected.square().mean().sqrt()).item()


@dataclass(frozen=True)
class RowCache(LayerCache):
    """A LayerCache that knows which pages the rings of request rows are in.

    Attributes:
        rings: int32 [R, N], pages of the ring of each row, behind the pages of records and in no order; row 0 is
            padding, whose ring is page 0 N times.
    """

    rings: torch.Tensor

    def ring_pages(self, *rows: int) -> torch.Tensor:
        """Return what a batch of these rows has as its ring_pages, int32 [B, N]."""
        return self.rings[list(rows)].contiguous()

    @property
    def page_tokens(self) -> int:
        """Exact tokens that a page of a ring holds."""
        return self.records.shape[2] // (2 * self.head_dim * self.dtype.itemsize)

    @property
    def ring_size(self) -> int:
        """Exact tokens that a ring holds."""
        return self.rings.shape[1] * self.page_tokens


def make_cache(
    config: KVarNConfig,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    pages: int,
    rows: int,
    *,
    more_ring_pages: int = 0,
    device: torch.device = DEVICE,
) -> RowCache:
    """Return a cache whose bytes are all 0xFF: NaN scales, NaN tokens of every dtype, also just before page 0.

    Args:
        pages: of records, page 0 among them; rows: request rows, row 0 among them.
        more_ring_pages: pages of a ring beyond those that it needs.
    """
    count = config.ring_pages(head_dim, dtype.itemsize) + more_ring_pages
    order = torch.randperm((rows - 1) * count, generator=torch.Generator().manual_seed(0))
    rings = torch.zeros(rows, count, dtype=torch.int32)
    rings[1:] = (pages + order).unflatten(0, (rows - 1, count))
    size = (1 + pages + len(order), kv_heads, config.record_bytes(head_dim))
    records = torch.full(size, 0xFF, dtype=torch.uint8, device=device)
    return RowCache(records[1:], head_dim, dtype, rings.to(device))


def _ring_places(cache: RowCache, row: int, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return where in `cache.exact` keys and values of positions are: pages, heads, elements, to index with.

    Written from the docstring of `record.ring` alone.
    """
    positions = torch.as_tensor(positions, device=cache.records.device)
    pages = cache.rings[row].long()[positions // cache.page_tokens % cache.rings.shape[1]]
    heads, channels = (torch.arange(n, device=pages.device) for n in (cache.num_kv_heads, 2 * cache.head_dim))
    elements = (positions % cache.page_tokens * 2 * cache.head_dim)[:, None, None] + channels
    return pages[:, None, None], heads[:, None], elements


def read_ring(cache: RowCache, row: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rotated keys and values [n, Hk, D] that the ring of a row has for positions."""
    k, v = cache.exact[_ring_places(cache, row, positions)].split(cache.head_dim, -1)
    return k.contiguous(), v.contiguous()


def write_ring(cache: RowCache, row: int, positions: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write rotated keys and values [n, Hk, D] of positions to the ring of a row."""
    cache.exact[_ring_places(cache, row, positions)] = torch.cat([k, v], -1).to(cache.dtype)


def fill_rings(cache: RowCache, config: KVarNConfig, scale: float = 1.0) -> None:
    """Fill the rings of all rows but row 0 with random tokens."""
    size, device = (len(cache.rings), config.ring_len, cache.num_kv_heads, cache.head_dim), cache.records.device
    k, v = (random_rows(size, cache.dtype, scale, device) for _ in "kv")
    positions = torch.arange(cache.ring_size, device=device)
    for row in range(1, len(cache.rings)):
        write_ring(cache, row, positions, *(x[row, positions % config.ring_len] for x in (k, v)))


def make_request(
    tokens: int,
    heads: tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
    *,
    row: int = 1,
    first_page: int = 1,
    seed: int = 0,
) -> Request:
    """Return a random request on pages in a scrambled order from first_page on; keys have outlier channels.

    Values are multiples of 1/64, so that every order of summation rotates them to the same float32.
    Otherwise a last bit of a rotated key could change a code, and outputs would differ by much more than
    they round.
    """
    generator = torch.Generator().manual_seed(1000 * seed + tokens)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, head_dim, generator=generator).mul(64).round().div(64)

    k = draw(heads[1])
    k[..., ::17] += 4.0
    count = -(-tokens // PAGE)
    order = (first_page + torch.randperm(count, generator=generator)).tolist()
    return Request(
        *(x.to(dtype).to(DEVICE) for x in (draw(heads[0]), k, draw(heads[1]))), row=row, pages=order
    )


def _page_table(requests: Sequence[Request], seq_lens: Sequence[int]) -> torch.Tensor:
    table = torch.full((len(requests), max(len(r.pages) for r in requests) + 1), -1, dtype=torch.int32)
    for b, (request, seq_len) in enumerate(zip(requests, seq_lens, strict=True)):
        used = request.pages[: -(-seq_len // PAGE)]
        table[b, : len(used)] = torch.tensor(used, dtype=torch.int32)
    return table.to(DEVICE)


def int32(*values: int, device: torch.device = DEVICE) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device)


def random_rows(shape, dtype: torch.dtype, scale: float = 1.0, device: torch.device = DEVICE) -> torch.Tensor:
    """Return rows whose channels differ in size by a factor of about ten."""
    return (torch.randn(shape) * torch.randn(shape[-1]).exp() * scale).to(dtype).to(device)


def encoded(k: torch.Tensor, v: torch.Tensor, config: KVarNConfig) -> torch.Tensor:
    """Return the oracle's records [Hk, bytes] of k, v [G, Hk, D]."""
    return reference.encode_tile(k.transpose(0, 1), v.transpose(0, 1), config)


def cache_for(request: Request, config: KVarNConfig, rows: int = 5, pages: int = 24) -> RowCache:
    return make_cache(config, request.k.shape[1], request.k.shape[2], request.k.dtype, pages, rows)


def shape_of(cache: LayerCache, num_qo_heads: int) -> AttentionShape:
    """Return the shape of a model with this cache."""
    return AttentionShape(num_qo_heads, cache.num_kv_heads, cache.head_dim, cache.dtype)


def attention_for(
    cache: LayerCache,
    num_qo_heads: int,
    config: KVarNConfig,
    kernels: Kernels | None = None,
    *,
    max_batch: int = 8,
    max_pages: int = 24,
    drafts: int = 1,
    gpu: Gpu | None = None,
    sliding_windows: Sequence[int] = (),
) -> Attention:
    """Return an `Attention` for a cache, with a decode workspace of poison.

    Args:
        kernels: by default what a GPU runs in service, but for FlashInfer; a CPU interprets Triton's.
        max_batch, max_pages: rows of a step, pages of a request; drafts: rows of a request in a verify step.
        gpu: the GPU to plan for, the device itself by default.
        sliding_windows: that layers may have.
    """
    shape, device = shape_of(cache, num_qo_heads), cache.records.device
    if kernels is None:
        in_service = device.type == "cuda"
        kernels = dataclasses.replace(choose_kernels(shape, config, device), dense="") if in_service else TRITON
    limits = Limits(max_batch, max_pages, extend_requests=max_batch, chunk_pages=max_pages, draft_tokens=drafts)
    attention = Attention(shape, config, device, limits, kernels, gpu, sliding_windows)
    if attention._decode_workspace is not None:
        for workspace in (attention._decode_workspace, *attention._sliding_workspaces.values()):
            poison(workspace)
    return attention


def in_layer(attend: Attend, **properties: torch.Tensor | int | None) -> Attend:
    """Return what feeds a step of a layer with attention sinks [Hq], `sinks`, or a `sliding_window` of tokens."""
    if not isinstance(attend, Attention):
        return partial(attend, **properties)

    def run(new, out, cache, batch, config, sm_scale):
        attend.attend(new, out, cache, attend.plan(batch), sm_scale, **properties)

    return run


def with_sinks(attend: Attend, sinks: torch.Tensor) -> Attend:
    """Return what feeds a step of a layer with attention sinks [Hq]."""
    return in_layer(attend, sinks=sinks)


def poison(workspace: DecodeWorkspace) -> None:
    """Fill a workspace with NaN and with a plan that no step has."""
    for x in (workspace.rotated_q, workspace.partial_out, workspace.partial_lse):
        x.fill_(float("nan"))
    for x in (workspace.split_requests, workspace.split_indptr):
        x.fill_(-1)


def clone(cache: RowCache) -> RowCache:
    """Return a copy of a cache."""
    return dataclasses.replace(cache, records=cache.records.clone())


def between_stores(attend: Attend, new: QKV, out, cache, batch, config, sm_scale) -> None:
    """Run an extend attention on the records of this step and the rings before it, between the store steps of the
    torch form, which on a CPU are faster than interpreted ones."""
    stored = clone(cache)
    tokens = QKV(*(x[: batch.num_tokens] for x in new))
    torch_form.attend_extend(tokens, torch.empty_like(tokens.q), stored, batch, config, sm_scale)
    encoded_only, rings = clone(stored), cache.rings.flatten().long()
    encoded_only.records[rings] = cache.records[rings]
    attend(new, out, encoded_only, batch, config, sm_scale)
    assert torch.equal(encoded_only.records[rings], cache.records[rings]), "attending wrote to a ring"
    cache.records.copy_(stored.records)


def _feed(attend: Attend, new: QKV, cache: RowCache, batch: DecodeBatch | ExtendBatch, config: KVarNConfig):
    """Run a step; return its output, NaN where nothing was written."""
    out, sm_scale = torch.full_like(new.q, float("nan")), cache.head_dim**-0.5
    if isinstance(attend, Attention):
        assert attend.config == config, "an Attention is made for one preset"
        attend.attend(new, out, cache, attend.plan(batch), sm_scale)
    else:
        attend(new, out, cache, batch, config, sm_scale)
    return out


def run_extend(
    attend: Attend,
    requests: Sequence[Request],
    spans: Sequence[tuple[int, int]],
    cache: RowCache,
    config: KVarNConfig,
    *,
    padding: int = 0,
) -> list[torch.Tensor]:
    """Feed positions start .. end - 1 of each request in one extend step; return the output of each.

    Rows of padding follow the tokens; nothing may touch them.
    """
    q, k, v = (
        torch.cat([getattr(r, name)[start:end] for r, (start, end) in zip(requests, spans, strict=True)])
        for name in "qkv"
    )
    sizes = [end - start for start, end in spans]
    indptr = [sum(sizes[:b]) for b in range(len(sizes) + 1)]
    starts, ends = zip(*spans, strict=True)
    batch = ExtendBatch(
        ring_pages=cache.ring_pages(*(r.row for r in requests)),
        prefix_lens=int32(*starts),
        seq_lens=int32(*ends),
        qo_indptr=int32(*indptr),
        page_table=_page_table(requests, ends),
        exact_starts=int32(*[r.exact_start for r in requests]),
        prefix_lens_host=list(starts),
        seq_lens_host=list(ends),
    )
    new = QKV(*(torch.cat([x, torch.full_like(x[:1], float("nan")).expand(padding, -1, -1)]) for x in (q, k, v)))
    out = _feed(attend, new, cache, batch, config)
    assert out[sum(sizes) :].isnan().all(), "a padding row was written"
    return list(out[: sum(sizes)].split(sizes))


def run_decode(
    attend: Attend,
    requests: Sequence[Request],
    positions: Sequence[int],
    cache: RowCache,
    config: KVarNConfig,
    *,
    padding: int = 0,
    drafts: int = 1,
) -> list[torch.Tensor]:
    """Feed one token of each request, then padded rows (row 0, page 0, seq_len 1); return [Hq, D] of each.

    In a verify step each request is there once for each of its drafts.
    """
    real = len(requests)
    tensors = []
    for name in "qkv":
        x = torch.stack([getattr(r, name)[p] for r, p in zip(requests, positions, strict=True)])
        tensors.append(torch.cat([x, torch.full_like(x[:1], 7.0).expand(padding, -1, -1)]))
    table = _page_table(requests, [p + 1 for p in positions])
    pages = [r.pages[p // PAGE] for r, p in zip(requests, positions, strict=True)]
    padded_table = torch.cat([table, torch.zeros_like(table[:1]).expand(padding, -1)])
    batch = DecodeBatch(
        ring_pages=cache.ring_pages(*(r.row for r in requests), *[0] * padding),
        seq_lens=int32(*[p + 1 for p in positions] + [1] * padding),
        page_table=padded_table,
        store_pages=int32(*pages + [0] * padding),
        exact_starts=int32(*[r.exact_start for r in requests] + [0] * padding),
        drafts=drafts,
    )
    return list(_feed(attend, QKV(*tensors), cache, batch, config)[:real])


def prefill(
    attend: Attend,
    request: Request,
    chunks: Sequence[int],
    cache: RowCache,
    config: KVarNConfig,
) -> torch.Tensor:
    """Feed a request from exact_start on in chunks of the given sizes; return the outputs [sum, Hq, D]."""
    start, outs = request.exact_start, []
    for size in chunks:
        outs += run_extend(attend, [request], [(start, start + size)], cache, config)
        start += size
    return torch.cat(outs)


def oracle(
    request: Request, config: KVarNConfig, start: int = 0, end: int | None = None, sliding_window: int = 0
) -> torch.Tensor:
    """Return reference.attention of positions start .. end - 1, float32 [end - start, Hq, D]."""
    end = len(request.q) if end is None else end
    return reference.attention(
        request.q[start:end],
        request.k[:end],
        request.v[:end],
        config,
        exact_start=request.exact_start,
        sliding_window=sliding_window,
    )
