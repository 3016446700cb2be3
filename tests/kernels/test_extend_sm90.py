# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of what new tokens read as records: run as C++ or on a GPU against the oracle; compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import cuda_as_cpp
import pytest
import torch
from builders import DEVICE, PAGE, encoded, int32, make_cache, random_rows
from cubin import compiled, registers_and_stack
from kvarn_kernels import reference
from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import extend_sm90

KVARN = KVarNConfig.from_preset("kvarn")
# fp16 operands: queries, keys, values and weights, 2^-12 on average each
BOUND = 1.5e-3
# preset, dtype, head_dim, query heads of a KV head
FORMS = [
    ("kvarn", torch.bfloat16, 128, 4),
    ("kvarn", torch.float16, 128, 8),
    ("kvarn", torch.bfloat16, 64, 3),
    ("kvarn_k4v4_g128", torch.float16, 64, 7),
    ("kvarn_k4v3_g128", torch.bfloat16, 128, 5),
    ("kvarn_k3v2_g128", torch.float16, 64, 2),
    ("kvarn_k3v2_g128", torch.bfloat16, 128, 1),
    ("kvarn_k2v2_g128", torch.float16, 128, 6),
    ("kvarn_k2v2_g128", torch.bfloat16, 64, 1),
    ("kvarn", torch.bfloat16, 256, 2),
    ("kvarn_k4v3_g128", torch.float16, 256, 8),
]


def form_name(form: tuple) -> str:
    return "-".join(map(str, form))


def as_cpp(folder, *form) -> Callable[..., None]:
    """Return what launches the kernel of a form as C++."""
    before = "reset_products(); copies.clear(); delays.seed(seed); "
    before += "std::memset(dynamic_shared, 0xFF, sizeof(dynamic_shared));"
    defines = extend_sm90.constants(*form)
    return cuda_as_cpp.build(folder, extend_sm90.SOURCE, extend_sm90.KERNEL, defines, extend_sm90.THREADS, before)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Keep what was built for the tests of this file."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("extend"), kernels={})


@pytest.fixture(autouse=True)
def run_as_cpp(built, monkeypatch):
    """Let the kernel run as C++ where there is no GPU; return what sets the seed of the schedule."""
    chosen = SimpleNamespace(seed=0)
    if torch.cuda.is_available():
        return chosen

    def kernel(*form):
        if form not in built.kernels:
            built.kernels[form] = as_cpp(built.folder, *form[:-1])
        return lambda *args, **named: built.kernels[form](*args, seed=chosen.seed, **named)

    monkeypatch.setattr(extend_sm90, "_compiled", kernel)
    monkeypatch.setattr(extend_sm90, "current_stream", lambda device: 0)
    return chosen


def attend(
    config: KVarNConfig,
    dtype: torch.dtype,
    head_dim: int,
    heads: tuple[int, int],
    spans: Sequence[tuple[int, int, int]],
    splits: int,
    *,
    scales: tuple[float, float, float] = (1.0, 1.0, 1.0),
    change: Callable[..., None] = lambda *_: None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend requests (cached, new, exact start) whose pages are in random order among poison.

    Args:
        scales: of queries, keys and values; change: called with (k, v, q) of the step before keys are encoded, k and v
            [pages, G, Hk, D] of all requests.

    Returns:
        out, lse of the tokens, all splits merged, and what the oracle says of both.
    """
    counts = [-(-(cached + new) // PAGE) for cached, new, _ in spans]
    reads = [min(max(n // PAGE - config.window_pages, exact // PAGE), n // PAGE) for n, _, exact in spans]
    cache = make_cache(config, heads[1], head_dim, dtype, 2 + sum(counts), 1)
    order = (torch.randperm(sum(counts)) + 1).tolist()
    table = torch.full((len(spans), max(counts) + 2), -1, dtype=torch.int32)
    size = (sum(reads), PAGE, heads[1], head_dim)
    k, v = (random_rows(size, dtype, scale) for scale in scales[1:])
    q = random_rows((sum(new for _, new, _ in spans), heads[0], head_dim), torch.float32, scales[0] * head_dim**-0.25)
    change(k, v, q)
    first = 0
    for b, (count, read) in enumerate(zip(counts, reads, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(pages)
        for n in range(read):
            cache.records[pages[n]] = encoded(k[first + n], v[first + n], config)
        first += read
    indptr = [sum(new for _, new, _ in spans[:b]) for b in range(len(spans) + 1)]
    batch = ExtendBatch(
        ring_pages=int32(0)[None],
        prefix_lens=int32(*[cached for cached, _, _ in spans]),
        seq_lens=int32(*[cached + new for cached, new, _ in spans]),
        qo_indptr=int32(*indptr),
        page_table=table.to(DEVICE),
        exact_starts=int32(*[exact for _, _, exact in spans]),
        prefix_lens_host=[cached for cached, _, _ in spans],
        seq_lens_host=[cached + new for cached, new, _ in spans],
    )
    partial_out = torch.full((len(q), splits + 1, heads[0], head_dim), float("nan"), device=DEVICE)
    partial_lse = torch.full((len(q), splits + 1, heads[0]), float("nan"), device=DEVICE)
    sm_scale = head_dim**-0.5
    extend_sm90.attend_records(q, partial_out, partial_lse, cache, batch, config, sm_scale)
    assert partial_out[:, splits].isnan().all() and partial_lse[:, splits].isnan().all(), "the rest belongs to others"
    out, lse = merged(partial_out[:, :splits], partial_lse[:, :splits])
    expected = [torch.empty_like(out), torch.empty_like(lse)]
    for b, read in enumerate(reads):
        records = cache.records[table[b, :read].long()].transpose(0, 1)
        rows = slice(indptr[b], indptr[b + 1])
        for x, y in zip(expected, exactly(q[rows], records, config, sm_scale), strict=True):
            x[rows] = y
    return out, lse, *expected


def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return splits [T, S, Hq, D] and their lse of base 2 in one."""
    total = (lse.double() * torch.tensor(2.0).log()).logsumexp(1)
    share = (lse.double() * torch.tensor(2.0).log() - total[:, None]).exp().nan_to_num(0.0)
    return (out.double() * share[..., None]).sum(1), total


def exactly(q: torch.Tensor, records: torch.Tensor, config: KVarNConfig, sm_scale: float):
    """Return attention of q [T, Hq, D] over records [Hk, pages, bytes], and its log sum of exp; float64."""
    k, v = (x.double().flatten(1, 2) for x in reference.decode_tile(records, config, q.shape[-1]))
    grouped = q.double().unflatten(1, (len(k), -1))
    scores = torch.einsum("thgd,hnd->thgn", grouped, k) * sm_scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("thgn,hnd->thgd", weights, v).flatten(1, 2), lse.flatten(1, 2)


def check(*args, bound: float = BOUND, **kwargs) -> None:
    out, lse, expected, expected_lse = attend(*args, **kwargs)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    seen = expected_lse > -torch.inf
    assert (lse - expected_lse)[seen].abs().max() < 2e-2
    assert not out[~seen].any()
    error = (out - expected).norm() / expected.norm()
    assert error < bound, error


@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_records_are_attended_as_by_the_oracle_in_every_form(form):
    preset, dtype, head_dim, group = form
    # more than a block of columns, of two KV heads, in two splits
    new = extend_sm90.COLUMNS[head_dim] // group + 3
    check(KVarNConfig.from_preset(preset), dtype, head_dim, (2 * group, 2), [(4 * PAGE + 5, new, 0)], 2)
