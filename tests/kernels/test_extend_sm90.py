# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of short extend steps: run as C++ or on a GPU against the oracle; compiled by NVRTC."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace

import cuda_as_cpp
import pytest
import short_steps_on_cpu
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
    write_ring,
)
from cubin import compiled, product_groups, registers_and_stack
from kvarn_kernels import reference, torch_form
from kvarn_kernels.attention import TRITON, Kernels
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.extend_choice import SHORT
from kvarn_kernels.read import attend_rows, extend_sm90, finish_short
from kvarn_kernels.shape import AttentionShape
from test_decode import TOLERANCE, make_requests

KVARN = KVarNConfig.from_preset("kvarn")
# fp16 operands: queries, keys, values and weights. Keys count most: each is rounded twice, to 2^-12 of itself on
# average, and moves its score by such shares of it (float64 with operands so rounded is off by as much as the kernel:
# 3.1e-3 where the largest score is 16.7, 2.2e-3 where it is 7.7)
BOUND, BOUND_OF_SCORES = 1e-3, 2.0**-12
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


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Keep what was built for the tests of this file."""
    return SimpleNamespace(folder=tmp_path_factory.mktemp("extend"), kernels={})


@pytest.fixture(autouse=True)
def run_as_cpp(built, monkeypatch):
    """Let the kernels run as C++ where there is no GPU; return what sets the seed of the schedule.

    Returns also `late`, the parameter of the attention whose memory another kernel still writes when it starts.
    """
    chosen = SimpleNamespace(seed=0, late=None)
    if torch.cuda.is_available():
        return chosen

    def kernel(*form):
        if form not in built.kernels:
            built.kernels[form] = short_steps_on_cpu.as_cpp(built.folder, *form[:-1])
        launch = built.kernels[form]

        def attend(*args, **named) -> None:
            if chosen.late is None:
                launch(*args, seed=chosen.seed, **named)
                return
            written = named[chosen.late]
            memory, after = written.view(torch.uint8), written.clone().view(torch.uint8)
            written.fill_(float("nan"))
            with cuda_as_cpp.start_beside(launch, memory, after):
                launch(*args, seed=chosen.seed, **named)

        return attend

    def finish_kernel(*form):
        if form not in built.kernels:
            built.kernels[form] = short_steps_on_cpu.finish_as_cpp(built.folder, *form[:-1])
        return built.kernels[form]

    for module, made in ((extend_sm90, kernel), (finish_short, finish_kernel)):
        monkeypatch.setattr(module, "_compiled", made)
        monkeypatch.setattr(module, "current_stream", lambda device: 0)
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
            [pages, G, Hk, D] of all requests, rotated.

    Returns:
        out, lse of the tokens, all splits merged, and what the oracle says of both; the largest score.
    """
    counts = [-(-(cached + new) // PAGE) for cached, new, _ in spans]
    cache = make_cache(config, heads[1], head_dim, dtype, 2 + sum(counts), 1 + len(spans))
    order = (torch.randperm(sum(counts)) + 1).tolist()
    table = torch.full((len(spans), max(counts) + 2), -1, dtype=torch.int32)
    size = (sum(counts), PAGE, heads[1], head_dim)
    k, v = (random_rows(size, dtype, scale) for scale in scales[1:])
    q = random_rows((sum(new for _, new, _ in spans), heads[0], head_dim), torch.float32, scales[0] * head_dim**-0.25)
    change(k, v, q)
    rings, chunks, first = cache.ring_pages(*range(1, 1 + len(spans))), [], 0
    for b, ((cached, new, exact), count) in enumerate(zip(spans, counts, strict=True)):
        pages = [order.pop() for _ in range(count)]
        table[b, :count] = torch.tensor(pages)
        for n in range(cached // PAGE):
            cache.records[pages[n]] = encoded(k[first + n], v[first + n], config)
        mine = [x[first : first + count].flatten(0, 1) for x in (k, v)]
        newest = torch.arange(max(exact, cached - config.ring_len), cached)
        write_ring(cache, 1 + b, newest, *(x[newest] for x in mine))
        chunks.append([x[cached : cached + new] for x in mine])
        first += count
    indptr = [sum(new for _, new, _ in spans[:b]) for b in range(len(spans) + 1)]
    batch = ExtendBatch(
        ring_pages=rings,
        prefix_lens=int32(*[cached for cached, _, _ in spans]),
        seq_lens=int32(*[cached + new for cached, new, _ in spans]),
        qo_indptr=int32(*indptr),
        page_table=table.to(DEVICE),
        exact_starts=int32(*[exact for _, _, exact in spans]),
        prefix_lens_host=[cached for cached, _, _ in spans],
        seq_lens_host=[cached + new for cached, new, _ in spans],
    )
    assert extend_sm90.serves_step(batch, config)
    rotated = QKV(q, *(torch.cat(side).contiguous() for side in zip(*chunks, strict=True)))
    plan = extend_sm90.ShortPlan(splits)
    sm_scale = head_dim**-0.5
    out, lse = merged(*extend_sm90.attend(rotated, cache, batch, plan, config, sm_scale))
    expected, largest, first = [torch.empty_like(out), torch.empty_like(lse)], 0.0, 0
    for b, ((cached, more, exact), count) in enumerate(zip(spans, counts, strict=True)):
        records = cache.records[table[b, : cached // PAGE].long()].transpose(0, 1)
        decoded = [x.double().flatten(1, 2) for x in reference.decode_tile(records, config, head_dim)]
        mine = [x[first : first + count].flatten(0, 1).transpose(0, 1).double() for x in (k, v)]
        for position in range(cached, cached + more):
            page = position // PAGE
            begin = PAGE * min(max(page - config.window_pages, exact // PAGE), page)
            sides = zip(decoded, mine, strict=True)
            seen = [torch.cat([old[:, :begin], new[:, begin : position + 1]], 1) for old, new in sides]
            row = indptr[b] + position - cached
            expected[0][row], expected[1][row], score = exactly(q[row], *seen, sm_scale)
            largest = max(largest, score)
        first += count
    return out, lse, *expected, largest


def merged(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return splits [T, S, Hq, D] and their lse of base 2 in one."""
    total = (lse.double() * torch.tensor(2.0).log()).logsumexp(1)
    share = (lse.double() * torch.tensor(2.0).log() - total[:, None]).exp().nan_to_num(0.0)
    return (out.double() * share[..., None]).sum(1), total


def exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float):
    """Return attention of q [Hq, D] over k and v [Hk, N, D], its log sum of exp, float64; the largest score."""
    scores = torch.einsum("hgd,hnd->hgn", q.double().unflatten(0, (len(k), -1)), k) * sm_scale
    lse = scores.logsumexp(-1)
    weights = (scores - lse[..., None]).exp()
    return torch.einsum("hgn,hnd->hgd", weights, v).flatten(0, 1), lse.flatten(), scores.abs().max().item()


def check(*args, bound: float = BOUND, **kwargs) -> None:
    out, lse, expected, expected_lse, largest = attend(*args, **kwargs)
    assert (lse - expected_lse).abs().max() < LSE_BOUND * largest + LSE_OF_WEIGHTS
    error = (out - expected).norm() / expected.norm()
    assert error < bound + BOUND_OF_SCORES * largest, (error, largest)


# page borders, hits, one row and more than a block of 128; rows that read a page exactly beside others that read its
# record
SPANS = [
    (3 * PAGE + 5, 50, 0),
    (0, 7, 0),
    (PAGE, 1, PAGE),
    (2 * PAGE - 1, 2, 0),
    (2 * PAGE, 43, 0),
    (3 * PAGE, 1, 3 * PAGE),
    (5 * PAGE + 100, 30, 2 * PAGE),
    (4 * PAGE - 6, 12, 0),
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


@on_cpu
@pytest.mark.parametrize("late", ["rotated_q", "chunk_k", "chunk_v"])
def test_new_tokens_are_not_read_before_they_are_rotated(run_as_cpp, late):
    run_as_cpp.late = late
    check(KVARN, torch.bfloat16, 64, (3, 1), [(3 * PAGE + 5, 40, 0)], 2)


def larger(k, v, q) -> None:
    """Let scores and values grow from page to page, values to what a power of two has to be raised for."""
    k *= 2.0 ** torch.arange(len(k), device=k.device)[:, None, None, None]
    v *= 8.0 ** torch.arange(len(v), device=v.device)[:, None, None, None]


def larger_values(k, v, q) -> None:
    """Let values grow so, and scores not: every page counts."""
    v *= 8.0 ** torch.arange(len(v), device=v.device)[:, None, None, None]


def with_large_first_tokens(k, v, q) -> None:
    """Let the first token of a page be a hundred times as large as the others."""
    k[:, 0] *= 100
    v[1, 0] *= 1000


@pytest.mark.parametrize(
    ("scales", "change"),
    [
        ((1.0, 1.0, 1.0), larger),
        ((0.1, 1.0, 1.0), larger_values),
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


def short_step(heads, head_dim, dtype, spans, sinks=None) -> None:
    """Run extend steps that this kernel attends, and compare their outputs with the oracle."""
    requests = make_requests([end for _, end, _ in spans], heads, head_dim, dtype)
    cache = make_cache(KVARN, heads[1], head_dim, dtype, 1 + sum(len(r.pages) for r in requests), len(spans) + 1)
    kernels = Kernels("cuda", "triton", "triton", short="cuda") if torch.cuda.is_available() else TRITON
    attention = attention_for(cache, heads[0], KVARN, kernels, max_batch=len(spans))
    attention._extend_form = lambda *step: SHORT
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
def test_a_short_step_is_the_oracle_s(has_sinks):
    # new tokens in one page, over the end of one, from the first on, and after a hit
    spans = [(3 * PAGE + 9, 3 * PAGE + 20, 0), (2 * PAGE - 5, 2 * PAGE + 6, 0), (60, 70, 0)]
    spans.append((3 * PAGE, 3 * PAGE + 4, 3 * PAGE))
    sinks = torch.tensor([0.5, -1.0, 3.0], device=DEVICE) if has_sinks else None
    short_step((3, 1), 64, torch.bfloat16, spans, sinks)


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
def test_a_long_short_step_is_the_oracle_s_on_a_gpu(dtype):
    spans = [(40 * PAGE - 3, 40 * PAGE + 120, 0), (17 * PAGE, 17 * PAGE + 100, 17 * PAGE)]
    spans.append((9 * PAGE + 1, 10 * PAGE + 128, 5 * PAGE))
    # the encoder runs beside it
    for _ in range(20):
        short_step((32, 8), 128, dtype, spans)


@pytest.mark.parametrize("form", others_long(BUILT), ids=form_name)
def test_extend_sm90_compiles_into_registers(form, tmp_path):
    preset, dtype, head_dim, group = form
    defines = extend_sm90.constants(KVarNConfig.from_preset(preset), head_dim, 8, group, dtype == torch.bfloat16, 10)
    code = compiled(nvrtc.source(extend_sm90.SOURCE, defines), extend_sm90.KERNEL, extend_sm90.ARCHITECTURE)
    registers, stack = registers_and_stack(code, tmp_path)
    assert registers * extend_sm90.WARPS.threads <= 65536 and stack <= STACK, (registers, stack)
    # scores and sums of a tile
    assert product_groups(code, tmp_path) == (2 * (head_dim // 16), 2)


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in FORMS}))
@pytest.mark.parametrize("head_dim", attend_rows.HEAD_DIMS)
def test_extend_sm90_fits_the_shared_memory_of_an_h100(preset, head_dim):
    defines = extend_sm90.constants(KVarNConfig.from_preset(preset), head_dim, 8, 8, True, 10)
    taken = defines["SHARED_BYTES"] + attend_rows.table_bytes(extend_sm90.ROWS, head_dim) + attend_rows.RESERVED_BYTES
    assert taken <= H100.shared_of_multiprocessor


def test_splits_fill_the_gpu_in_whole_waves():
    shape = AttentionShape(32, 8, 128, torch.bfloat16)

    def of(new: list[int], cached: int) -> int:
        lens = [cached] * len(new)
        ends = [cached + n for n in new]
        batch = ExtendBatch(*[torch.empty(0)] * 6, lens, ends)
        return extend_sm90.num_splits(batch, shape, KVARN, H100)

    # 132 multiprocessors; 8, 16, 32, 64 and 512 blocks of pages in one piece
    assert [of([new], 32_768) for new in (1, 32, 64, 128, 256)] == [16, 16, 8, 4, 2]
    assert of([100] * 16, 20_480) == 1
    # an exact page or three records each: the page of the token and the one before it are exact
    assert of([1], 1) == 1 and of([1], 128) == of([1], 129) == 2 and of([1], 6 * 128) == 3
    # 96 blocks, beside which the 16 of the encoder fit, where 128 would end before it; without it 128
    assert of([128], 8_064) == 3 and of([127], 8_064) == 4
