# SPDX-License-Identifier: Apache-2.0
"""What ends a short extend step, as C++ or on a GPU: splits are merged as in float64, rings get the newest tokens."""

import cuda_as_cpp
import pytest
import short_steps_on_cpu
import torch
from builders import DEVICE, int32, make_cache, read_ring
from cubin import compiled, registers_and_stack
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.read import extend_sm90, finish_short
from kvarn_kernels.record.hadamard import hadamard_signs

KVARN = KVarNConfig.from_preset("kvarn")
# rounding to the model's dtype
BOUND = {torch.float16: 5e-4, torch.bfloat16: 4e-3}
SINKS = [None, torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def launches(tmp_path, monkeypatch) -> dict:
    """Let the kernel run as C++ where there is no GPU; return what was built, by its form."""
    built: dict = {}

    def kernel(*form):
        if form not in built:
            # the last one is the device
            built[form] = short_steps_on_cpu.finish_as_cpp(tmp_path, *form[:-1])
        return built[form]

    if DEVICE.type != "cuda":
        monkeypatch.setattr(finish_short, "_compiled", kernel)
        monkeypatch.setattr(finish_short, "current_stream", lambda device: 0)
    return built


def step_of(heads: tuple[int, int], head_dim: int, dtype: torch.dtype, spans: list[tuple[int, int]], splits: int):
    """Return a cache, a step of requests (cached, new), its new tokens and the results of its splits."""
    cache = make_cache(KVARN, heads[1], head_dim, dtype, pages=2, rows=1 + len(spans))
    cache.exact.fill_(float("nan"))
    new = [n for _, n in spans]
    batch = ExtendBatch(
        ring_pages=cache.ring_pages(*range(1, 1 + len(spans))),
        prefix_lens=int32(*[cached for cached, _ in spans]),
        seq_lens=int32(*[cached + n for cached, n in spans]),
        qo_indptr=int32(*[sum(new[:b]) for b in range(len(new) + 1)]),
        page_table=torch.zeros(len(spans), 8, dtype=torch.int32, device=DEVICE),
        exact_starts=int32(*[0 for _ in spans]),
        prefix_lens_host=[cached for cached, _ in spans],
        seq_lens_host=[cached + n for cached, n in spans],
    )
    k, v = (torch.randn(sum(new), heads[1], head_dim).to(dtype).to(DEVICE) for _ in range(2))
    results = torch.randn(sum(new), splits, heads[0], head_dim).to(DEVICE)
    lse = (5 * torch.randn(sum(new), splits, heads[0])).to(DEVICE)
    return cache, batch, QKV(torch.empty(0), k, v), results, lse


def merged(results: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Return what the splits are together, rotated back, in float64."""
    head_dim, total = results.shape[-1], 2.0 ** lse.double()
    total = total.sum(1) if sinks is None else total.sum(1) + sinks.double().exp()
    sums = (results.double() * 2.0 ** lse.double()[..., None]).sum(1) / total.clamp(min=1e-300)[..., None]
    return sums @ (hadamard_signs(head_dim, torch.bfloat16, DEVICE).double() * head_dim**-0.5)


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "splits", "sinks"),
    [
        ((6, 2), 128, torch.bfloat16, 3, None),
        ((3, 1), 64, torch.float16, 1, torch.float32),
        ((8, 1), 64, torch.bfloat16, extend_sm90.MAX_SPLITS, torch.bfloat16),
        ((4, 2), 128, torch.float16, 5, torch.float16),
    ],
)
def test_splits_are_merged_and_rings_get_the_newest_tokens(launches, heads, head_dim, dtype, splits, sinks):
    length = KVARN.ring_pages(head_dim, dtype.itemsize) * KVARN.exact_tokens(head_dim, dtype.itemsize)
    # a turn in a ring, one token, more tokens than a ring has
    spans = [(37, 9), (128, 1), (5, length + 7)]
    cache, batch, rotated, results, lse = step_of(heads, head_dim, dtype, spans, splits)
    # splits that saw nothing; a head of a token that no split saw anything for
    lse[::3, 1:, 0], lse[1, :, 1] = -torch.inf, -torch.inf
    results[::3, 1:, 0], results[1, :, 1] = 0.0, 0.0
    weights = None if sinks is None else torch.linspace(-2.0, 3.0, heads[0]).to(sinks).to(DEVICE)
    before = cache.exact.clone()
    out = torch.full((batch.num_tokens + 3, heads[0], head_dim), float("nan"), dtype=dtype, device=DEVICE)
    finish_short.finish(out, results, lse, rotated, cache, batch, KVARN, weights)
    assert out[batch.num_tokens :].isnan().all()
    expected = merged(results, lse, weights)
    error = (out[: batch.num_tokens].double() - expected).norm() / expected.norm()
    assert error < BOUND[dtype], error
    assert not out[1, 1].any()
    first, kept = 0, 0
    for row, (cached, n) in enumerate(spans, 1):
        newest = min(n, length)
        k, v = read_ring(cache, row, torch.arange(cached + n - newest, cached + n))
        own = [x[first + n - newest : first + n] for x in (rotated.k, rotated.v)]
        assert torch.equal(k, own[0]) and torch.equal(v, own[1])
        first, kept = first + n, kept + newest
    changed = (cache.exact.view(torch.int16) != before.view(torch.int16)).sum()
    assert changed == 2 * kept * heads[1] * head_dim


@pytest.mark.skipif(DEVICE.type == "cuda", reason="as C++ alone it is known when results come")
def test_it_waits_for_the_attention_that_it_starts_beside(launches):
    cache, batch, rotated, results, lse = step_of((3, 1), 64, torch.bfloat16, [(37, 2)], 2)
    out = torch.empty(2, 3, 64, dtype=torch.bfloat16)
    finish_short.finish(out, results, lse, rotated, cache, batch, KVARN)
    again, late = torch.empty_like(out), results.clone()
    results.fill_(float("nan"))
    (launch,) = launches.values()
    with cuda_as_cpp.start_beside(launch, results.view(torch.uint8), late.view(torch.uint8)):
        finish_short.finish(again, results, lse, rotated, cache, batch, KVARN)
    assert torch.equal(again, out)


@pytest.mark.parametrize(("head_dim", "sinks"), [(64, torch.bfloat16), (128, None)])
def test_finish_short_compiles_without_local_memory(head_dim, sinks, tmp_path):
    defines = finish_short.constants(KVARN, head_dim, 32, 8, True, 10, sinks)
    code = compiled(nvrtc.source(finish_short.SOURCE, defines), finish_short.KERNEL, "90")
    # four blocks of a multiprocessor or more
    registers, stack = registers_and_stack(code, tmp_path)
    assert registers <= 64 and stack == 0, (registers, stack)


def test_it_takes_as_many_splits_as_there_are():
    assert extend_sm90.MAX_SPLITS <= finish_short.MAX_SPLITS
    assert set(SINKS) == set(finish_short.SINKS)
