# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of what new tokens read as records: run as C++ or on a GPU against the oracle; compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import cuda_as_cpp
import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    attention_for,
    encoded,
    int32,
    make_cache,
    prefill,
    random_rows,
    relative_rms,
    run_extend,
    with_sinks,
)
from cubin import compiled, product_groups, registers_and_stack
from kvarn_kernels import reference, torch_form
from kvarn_kernels.attention import Kernels
from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.extend_choice import COLUMNS
from kvarn_kernels.read import extend_sm90
from kvarn_kernels.shape import AttentionShape
from test_decode import TOLERANCE, make_requests

KVARN = KVarNConfig.from_preset("kvarn")
# fp16 operands: queries, keys, values and weights, 2^-12 on average each. That of queries and keys counts as often as
# the largest score says: float64 with operands so rounded is off by up to 1.3e-3 where it is 31, by 6e-4 where it is 11
BOUND, BOUND_OF_SCORES = 1.5e-3, 2.0**-14
# Of the log sum of exp, in shares of the largest score: the rounding of a query and a key changes their product by at
# most 2^-10 of itself (seen: 0.028 where the largest score is 49.5). The rounding of weights adds LSE_OF_WEIGHTS.
LSE_BOUND, LSE_OF_WEIGHTS = 2.0**-10, 2e-3
# bytes of local memory: a few values of the prologue
STACK = 96
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
]
# run as C++ (5 s of g++ each, besides the form of the other tests), and built by ptxas (9 s), at every commit
ON_CPU, BUILT = [FORMS[n] for n in (3, 6)], FORMS[:1]


def form_name(form: tuple) -> str:
    return "-".join(map(str, form))


def others_long(chosen: list[tuple]) -> list:
    """Return all forms, with those that are not chosen marked as long."""
    return [form if form in chosen else pytest.param(form, marks=pytest.mark.long) for form in FORMS]


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Attend requests (cached, new, exact start) whose pages are in random order among poison.

    Args:
        scales: of queries, keys and values; change: called with (k, v, q) of the step before keys are encoded, k and v
            [pages, G, Hk, D] of all requests.

    Returns:
        out, lse of the tokens, all splits merged, and what the oracle says of both; the largest score.
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
    expected, largest = [torch.empty_like(out), torch.empty_like(lse)], 0.0
    for b, read in enumerate(reads):
        records = cache.records[table[b, :read].long()].transpose(0, 1)
        rows = slice(indptr[b], indptr[b + 1])
        *exact, score = exactly(q[rows], records, config, sm_scale)
        for x, y in zip(expected, exact, strict=True):
            x[rows] = y
        largest = max(largest, score)
    return out, lse, *expected, largest


def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return splits [T, S, Hq, D] and their lse of base 2 in one."""
    total = (lse.double() * torch.tensor(2.0).log()).logsumexp(1)
    share = (lse.double() * torch.tensor(2.0).log() - total[:, None]).exp().nan_to_num(0.0)
    return (out.double() * share[..., None]).sum(1), total


def exactly(q: torch.Tensor, records: torch.Tensor, config: KVarNConfig, sm_scale: float):
    """Return attention of q [T, Hq, D] over records [Hk, pages, bytes], its log sum of exp, float64; largest score."""
    k, v = (x.double().flatten(1, 2) for x in reference.decode_tile(records, config, q.shape[-1]))
    grouped = q.double().unflatten(1, (len(k), -1))
    scores = torch.einsum("thgd,hnd->thgn", grouped, k) * sm_scale
    lse, largest = scores.logsumexp(-1), scores.abs().max().item() if scores.numel() else 0.0
    weights = (scores - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("thgn,hnd->thgd", weights, v).flatten(1, 2), lse.flatten(1, 2), largest


def check(*args, bound: float = BOUND, **kwargs) -> None:
    out, lse, expected, expected_lse, largest = attend(*args, **kwargs)
    assert torch.equal(lse == -torch.inf, expected_lse == -torch.inf)
    seen = expected_lse > -torch.inf
    assert (lse - expected_lse)[seen].abs().max() < LSE_BOUND * largest + LSE_OF_WEIGHTS
    assert not out[~seen].any()
    error = (out - expected).norm() / expected.norm()
    assert error < bound + BOUND_OF_SCORES * largest, (error, largest)


# page borders, hits, one row and more than a block of 128; group 3 and head_dim 64
SPANS = [
    (3 * PAGE + 5, 50, 0),
    (0, 7, 0),
    (PAGE, 1, PAGE),
    (2 * PAGE - 1, 2, 0),
    (2 * PAGE, 43, 0),
    (3 * PAGE, 1, 3 * PAGE),
    (5 * PAGE + 100, 30, 2 * PAGE),
]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the same step runs by -m gpu")


def check_form(form: tuple, pages: int, splits: int) -> None:
    """Check a step of two KV heads whose rows are more than a block."""
    preset, dtype, head_dim, group = form
    new = extend_sm90.ROWS // group + 3
    check(KVarNConfig.from_preset(preset), dtype, head_dim, (2 * group, 2), [(pages * PAGE + 5, new, 0)], splits)


@on_cpu
@pytest.mark.parametrize("form", others_long(ON_CPU), ids=form_name)
def test_records_are_attended_as_by_the_oracle_in_every_form(form):
    check_form(form, 3, 2)


@on_cpu
@pytest.mark.parametrize("splits", [1, 3])
def test_requests_of_any_length_are_attended_together(splits):
    check(KVARN, torch.bfloat16, 64, (3, 1), SPANS, splits)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, seed):
    run_as_cpp.seed = seed
    # every buffer is filled several times
    check(KVARN, torch.bfloat16, 64, (3, 1), [(11 * PAGE, 3, 0)], 1)


def larger(k, v, q) -> None:
    """Let scores and values grow from page to page, values to what a power of two has to be raised for."""
    k *= 2.0 ** torch.arange(len(k), device=k.device)[:, None, None, None]
    v *= 8.0 ** torch.arange(len(v), device=v.device)[:, None, None, None]


def with_large_first_tokens(k, v, q) -> None:
    """Let the first token of a page be a hundred times as large as the others."""
    k[:, 0] *= 100
    v[1, 0] *= 1000


@pytest.mark.parametrize(
    ("scales", "change"),
    [
        ((1.0, 1.0, 1.0), larger),
        ((1.0, 0.1, 1.0), with_large_first_tokens),
        ((1e-5, 1e5, 1e5), lambda *_: None),
        ((2.0**30, 2.0**-34, 2.0**20), lambda *_: None),
        ((1.0, 1.0, 2.0**-20), lambda *_: None),
    ],
)
def test_scores_and_values_of_any_magnitude_are_attended(scales, change):
    # the largest scores decide, and they are as exact as their queries
    check(KVARN, torch.bfloat16, 64, (3, 1), [(6 * PAGE, 3, 0)], 1, scales=scales, change=change, bound=1e-2)


def test_poison_of_one_request_stays_in_it():
    def poison(k, v, q) -> None:
        q[0, 0, 0], q[1, 1], q[2, 2, 5] = float("nan"), float("inf"), -float("inf")
        k[0, 0, 0, 3], v[1, 0, 0, 4] = float("nan"), float("inf")

    out, lse, expected, expected_lse, _ = attend(
        KVARN, torch.bfloat16, 64, (3, 1), [(3 * PAGE, 3, 0), (4 * PAGE, 2, 0)], 1, change=poison
    )
    assert (out[3:] - expected[3:]).norm() < BOUND * expected[3:].norm()
    assert (lse[3:] - expected_lse[3:]).abs().max() < 2e-2


def test_a_query_that_is_not_finite_leaves_the_others_of_its_request_alone():
    def poison(k, v, q) -> None:
        q[1, 0, 0], q[2, 1] = float("nan"), float("inf")

    out, _, expected, *_ = attend(KVARN, torch.bfloat16, 64, (3, 1), [(3 * PAGE, 4, 0)], 1, change=poison)
    for token in (0, 3):
        assert (out[token] - expected[token]).norm() < BOUND * expected[token].norm()


def step_by_columns(heads, head_dim, dtype, spans, sinks=None) -> None:
    """Run extend steps of which this kernel attends a part, and compare their outputs with the oracle."""
    requests = make_requests([end for _, end, _ in spans], heads, head_dim, dtype)
    cache = make_cache(KVARN, heads[1], head_dim, dtype, 1 + sum(len(r.pages) for r in requests), len(spans) + 1)
    kernels = Kernels("triton", "triton", "triton", columns="cuda")
    attention = attention_for(cache, heads[0], KVARN, kernels, max_batch=len(spans))
    attention._extend_form = lambda *step: COLUMNS
    for request, (start, _, exact_start) in zip(requests, spans, strict=True):
        prefill(torch_form.attend_extend, request, [start], cache, KVARN)
        request.exact_start = exact_start
    attend = attention if sinks is None else with_sinks(attention, sinks)
    outs = run_extend(attend, requests, [(start, end) for start, end, _ in spans], cache, KVARN, padding=3)
    for request, (start, end, _), out in zip(requests, spans, outs, strict=True):
        expected = reference.attention(
            request.q[start:end], request.k[:end], request.v[:end], KVARN, exact_start=request.exact_start, sinks=sinks
        )
        assert relative_rms(out, expected) < TOLERANCE[dtype], (start, end)


@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_step_joins_this_part_with_the_rest(has_sinks):
    # new tokens in one page, over the end of one, after a hit, and where there is nothing for this kernel
    spans = [(3 * PAGE + 9, 3 * PAGE + 20, 0), (2 * PAGE - 5, 2 * PAGE + 6, 0), (60, 70, 0)]
    spans.append((3 * PAGE, 3 * PAGE + 4, 3 * PAGE))
    sinks = torch.tensor([0.5, -1.0, 3.0], device=DEVICE) if has_sinks else None
    step_by_columns((3, 1), 64, torch.bfloat16, spans, sinks)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_records_are_attended_as_by_the_oracle_on_a_gpu(form):
    check_form(form, 5, 2)
    check_form(form, 60, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_requests_of_any_length_are_attended_together_on_a_gpu(splits):
    check(KVARN, torch.bfloat16, 64, (3, 1), SPANS, splits)
    long = [(cached + 30 * PAGE, 4 * new, exact) for cached, new, exact in SPANS]
    check(KVARN, torch.bfloat16, 128, (32, 8), long, splits)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_long_step_joins_this_part_with_the_rest_on_a_gpu(dtype):
    spans = [(40 * PAGE - 3, 41 * PAGE + 30, 0), (17 * PAGE, 17 * PAGE + 100, 17 * PAGE)]
    spans.append((9 * PAGE + 1, 12 * PAGE, 5 * PAGE))
    step_by_columns((32, 8), 128, dtype, spans)


@pytest.mark.parametrize("form", others_long(BUILT), ids=form_name)
def test_extend_sm90_compiles_into_registers(form, tmp_path):
    preset, dtype, head_dim, group = form
    defines = extend_sm90.constants(KVarNConfig.from_preset(preset), head_dim, 8, group, dtype == torch.bfloat16)
    code = compiled(nvrtc.source(extend_sm90.SOURCE, defines), extend_sm90.KERNEL, extend_sm90.ARCHITECTURE)
    registers, stack = registers_and_stack(code, tmp_path)
    assert registers * extend_sm90.THREADS <= 65536 and stack <= STACK, (registers, stack)
    # scores and sums of a tile, each in two places
    assert product_groups(code, tmp_path) == (4 * (head_dim // 16), 4)


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in FORMS}))
@pytest.mark.parametrize("head_dim", extend_sm90.HEAD_DIMS)
def test_extend_sm90_fits_the_shared_memory_of_an_h100(preset, head_dim):
    defines = extend_sm90.constants(KVarNConfig.from_preset(preset), head_dim, 8, 8, True)
    taken = defines["SHARED_BYTES"] + extend_sm90.TABLE_BYTES + extend_sm90.RESERVED_BYTES
    assert taken <= H100.shared_of_multiprocessor


def test_splits_fill_the_gpu_in_whole_waves():
    shape = AttentionShape(32, 8, 128, torch.bfloat16)

    def of(new: list[int], cached: int) -> int:
        lens = [cached] * len(new)
        ends = [cached + n for n in new]
        batch = SimpleNamespace(new_tokens=new, prefix_lens_host=lens, seq_lens_host=ends)
        return extend_sm90.num_splits(batch, shape, KVARN, H100)

    # 132 multiprocessors; 8, 16, 32, 64 and 512 blocks of pages in one piece
    assert [of([new], 32_768) for new in (1, 32, 64, 128, 256)] == [16, 16, 8, 4, 2]
    assert of([100] * 16, 20_480) == 1
    # at most a page each
    assert of([1], 128) == of([1], 256) == 1 and of([1], 3 * 128) == 2
    # 96 blocks, beside which the 16 of the encoder fit, where 128 would end before it; without it 128
    assert of([128], 8_064) == 3 and of([127], 8_064) == 4
