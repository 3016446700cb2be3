# SPDX-License-Identifier: Apache-2.0
"""Dense extend steps against the float64 oracle; on a CPU stand-ins with the contracts of their libraries attend."""

import dataclasses
from functools import partial

import fa3_standin
import flashinfer_standin
import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    Request,
    attention_for,
    between_stores,
    cache_for,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_extend,
)
from kvarn_kernels import torch_form
from kvarn_kernels.attention import Step, choose_kernels
from kvarn_kernels.batch import QKV
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import paged_calls, segments
from kvarn_kernels.dense.extend_dense import (
    DenseWorkspace,
    extend_dense,
    make_workspace,
    num_pages,
    plan_dense,
    workspace_bytes,
)
from kvarn_kernels.device.gpu import H100, Gpu, gpu_of
from kvarn_kernels.shape import AttentionShape

KVARN = KVarNConfig.from_preset("kvarn")
CANONICAL = KVarNConfig.from_preset("kvarn_canonical")
# past keys and values and the merged parts are rounded to the model's dtype, each 2^-12.6 (fp16) or 2^-9.6 (bf16) on
# average; a GPU also rounds the weights
BOUND = {torch.float16: 1e-3, torch.bfloat16: 8e-3}


# who attends in the tests that do not name it
FLASHINFER, FA3 = paged_calls.FLASHINFER, paged_calls.FA3
both_libraries = pytest.mark.parametrize("library", [FLASHINFER, FA3])


def library_of(name: str) -> str | paged_calls.Library:
    """Return a library, on a CPU with its stand-in; skip the test where a GPU host has none."""
    if DEVICE.type != "cuda":
        if name == FA3:
            return paged_calls.FlashAttention3(DEVICE, fa3_standin.flash_attn_with_kvcache)
        return paged_calls.FlashInfer(DEVICE, flashinfer_standin)
    if name == FA3:
        if torch.cuda.get_device_capability()[0] != 9:
            pytest.skip("FlashAttention 3 is for Hopper")
        pytest.importorskip("sgl_kernel.flash_attn", exc_type=ImportError)
    elif name == FLASHINFER:
        pytest.importorskip("flashinfer")
    return name


def workspace_for(request: Request, pages: int = 64, library: str = FLASHINFER) -> DenseWorkspace:
    """Return a workspace of poison."""
    shape = AttentionShape(request.q.shape[1], *request.k.shape[1:], request.k.dtype)
    compiled = DEVICE.type == "cuda" and choose_kernels(shape, KVARN, DEVICE).dequantise == "cuda"
    workspace = make_workspace(shape, pages, DEVICE, library_of(library), compiled=compiled)
    workspace.keys.fill_(float("nan"))
    workspace.values.fill_(float("nan"))
    return workspace


def all_kernels(workspace: DenseWorkspace, new: QKV, out, cache, batch, config, sm_scale) -> None:
    """Run a step of any length densely, the stores in the kernels too."""
    attention = attention_for(cache, new.q.shape[1], config)
    plan = plan_dense(batch, workspace, config, gpu_of(DEVICE))
    attention.attend(new, out, cache, Step(batch, plan), sm_scale)


def dense(workspace: DenseWorkspace, gpu: Gpu | None = None, plans: list | None = None):
    """Return what runs a step of any length densely; on a CPU between the store steps of the torch form.

    Args:
        gpu: the GPU to plan for; plans: gets the plan of each step.
    """

    def attend(new, out, cache, batch, config, sm_scale):
        plan = plan_dense(batch, workspace, config, gpu or gpu_of(DEVICE))
        if plans is not None:
            plans.append(plan)
        extend_dense(new, out, cache, batch, plan, config, sm_scale)

    if DEVICE.type == "cuda" and gpu is None:
        return partial(all_kernels, workspace)
    return partial(between_stores, attend)


@both_libraries
@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1, 401])
def test_extend_dense_matches_the_oracle_at_every_length(tokens, library):
    request = make_request(tokens, (2, 1), 64, torch.float16)
    out = prefill(dense(workspace_for(request, library=library)), request, [tokens], cache_for(request, KVARN), KVARN)
    assert relative_rms(out, oracle(request, KVARN)) < BOUND[torch.float16]


@pytest.mark.parametrize(
    ("preset", "heads", "head_dim", "dtype"),
    [
        ("kvarn", (4, 1), 128, torch.bfloat16),
        ("kvarn", (2, 2), 256, torch.float16),
        ("kvarn_k4v4_g128", (6, 1), 64, torch.bfloat16),
        ("kvarn_k2v2_g128", (7, 1), 128, torch.float16),
    ],
)
@both_libraries
def test_extend_dense_matches_the_oracle_in_every_form(preset, heads, head_dim, dtype, library):
    config = KVarNConfig.from_preset(preset)
    request = make_request(3 * PAGE + 51, heads, head_dim, dtype)
    workspace = workspace_for(request, library=library)
    out = prefill(dense(workspace), request, [2 * PAGE + 9, PAGE + 42], cache_for(request, config), config)
    assert relative_rms(out, oracle(request, config)) < BOUND[dtype]


@pytest.mark.parametrize("chunks", [[300, 1, 1, 99], [PAGE] * 3, [127, 2, 200], [257, 64, 64, 64]], ids=str)
def test_extend_dense_matches_the_oracle_for_every_chunking(chunks):
    request = make_request(sum(chunks), (2, 1), 64, torch.float16)
    out = prefill(dense(workspace_for(request)), request, chunks, cache_for(request, KVARN), KVARN)
    assert relative_rms(out, oracle(request, KVARN)) < BOUND[torch.float16]


@both_libraries
@pytest.mark.parametrize("pages", [2, 3, 7])
def test_extend_dense_merges_the_segments_of_a_step_beyond_the_workspace(pages, library):
    request = make_request(6 * PAGE + 20, (2, 1), 64, torch.float16)
    workspace = workspace_for(request, pages, library)
    out = prefill(dense(workspace), request, [2 * PAGE + 70, 4 * PAGE - 50], cache_for(request, KVARN), KVARN)
    assert len(workspace.keys) == pages
    if library == FLASHINFER:
        assert len(workspace.library.wrappers) > 8 // pages
    assert relative_rms(out, oracle(request, KVARN)) < BOUND[torch.float16]


@pytest.mark.parametrize("pages", [3, 64])
def test_extend_dense_reads_the_records_of_a_few_queries_in_splits(pages, monkeypatch):
    monkeypatch.setattr(segments, "SPLIT_PAGES", 1)
    request = make_request(6 * PAGE + 20, (2, 1), 64, torch.float16)
    workspace, plans = workspace_for(request, pages), []
    attend = dense(workspace, dataclasses.replace(gpu_of(DEVICE), multiprocessors=12), plans)
    chunks = [3 * PAGE, 2 * PAGE - 30, 49, 1, PAGE]
    out = prefill(attend, request, chunks, cache_for(request, KVARN), KVARN)
    # query pages of each chunk: 3, 2, 2, 1, 2
    assert [max(segment.splits for segment in plan.segments) for plan in plans] == [2, 3, 3, 6, 3]
    assert relative_rms(out, oracle(request, KVARN)) < BOUND[torch.float16]


@pytest.mark.parametrize("exact_start", [PAGE, 3 * PAGE])
@pytest.mark.parametrize("chunks", [[2 * PAGE + 3], [70, PAGE + 61]], ids=str)
def test_extend_dense_reads_a_prefix_hit_from_the_records_of_another_request(exact_start, chunks):
    donor = make_request(3 * PAGE, (2, 1), 64, torch.float16)
    cache = cache_for(donor, KVARN)
    prefill(torch_form.attend_extend, donor, [len(donor.q)], cache, KVARN)
    hit = make_request(exact_start + 2 * PAGE + 3, (2, 1), 64, torch.float16, row=2, first_page=10, seed=1)
    hit.exact_start = exact_start
    hit.pages[: exact_start // PAGE] = donor.pages[: exact_start // PAGE]
    hit.k[:exact_start], hit.v[:exact_start] = donor.k[:exact_start], donor.v[:exact_start]
    # the ring of row 2 is poison: nothing of the prefix may be read exactly
    out = prefill(dense(workspace_for(hit)), hit, chunks, cache, KVARN)
    assert relative_rms(out, oracle(hit, KVARN, exact_start)) < BOUND[torch.float16]


def test_a_library_that_cuts_contexts_gets_them_whole(monkeypatch):
    monkeypatch.setattr(segments, "SPLIT_PAGES", 1)
    request = make_request(6 * PAGE + 20, (2, 1), 64, torch.float16)
    workspace, plans = workspace_for(request, 64, FA3), []
    attend = dense(workspace, dataclasses.replace(gpu_of(DEVICE), multiprocessors=12), plans)
    out = prefill(attend, request, [5 * PAGE, PAGE + 20], cache_for(request, KVARN), KVARN)
    assert [[segment.splits for segment in plan.segments] for plan in plans] == [[1], [1]]
    assert relative_rms(out, oracle(request, KVARN)) < BOUND[torch.float16]


@both_libraries
@pytest.mark.parametrize("pages", [3, 64])
def test_extend_dense_serves_a_mixed_batch_with_padding(pages, library):
    requests, spans, first_page = [], [], 1
    # a first chunk, a decode step, a continued chunk, a decode step on a full page, and the padding row
    for row, (start, end) in enumerate([(0, 300), (401, 402), (150, 430), (2 * PAGE, 2 * PAGE + 1)], 1):
        request = make_request(end, (2, 1), 64, torch.float16, row=row, first_page=first_page, seed=row)
        requests.append(request)
        spans.append((start, end))
        first_page += len(request.pages)
    requests.append(dataclasses.replace(make_request(1, (2, 1), 64, torch.float16, seed=9), row=0, pages=[0]))
    spans.append((0, 1))
    cache = cache_for(requests[0], KVARN)
    for request, (start, _) in zip(requests, spans, strict=True):
        if start:
            prefill(torch_form.attend_extend, request, [start], cache, KVARN)
    workspace = workspace_for(requests[0], pages, library)
    outs = run_extend(dense(workspace), requests, spans, cache, KVARN, padding=5)
    for request, (start, end), out in zip(requests, spans, outs, strict=True):
        assert relative_rms(out, oracle(request, KVARN, start, end)) < BOUND[torch.float16], request.row


def test_extend_dense_keeps_the_poison_of_one_request_from_the_others():
    request = make_request(300, (2, 1), 64, torch.float16, row=1, first_page=1)
    poisoned = make_request(260, (2, 1), 64, torch.float16, row=2, first_page=5, seed=3)
    poisoned.k[3], poisoned.v[5], poisoned.q[9] = float("nan"), float("inf"), float("nan")
    poisoned.k[0], poisoned.v[0] = float("nan"), float("nan")
    for pages in (2, 64):
        outs = run_extend(
            dense(workspace_for(request, pages)),
            [poisoned, request],
            [(0, 260), (0, 300)],
            cache_for(request, KVARN),
            KVARN,
        )
        assert relative_rms(outs[1], oracle(request, KVARN)) < BOUND[torch.float16]


def test_extend_dense_takes_keys_and_values_that_are_slices_of_one_projection():
    request = make_request(300, (2, 2), 64, torch.float16)
    qkv = torch.cat([request.q, request.k, request.v], 1)
    sliced = dataclasses.replace(request, q=qkv[:, :2], k=qkv[:, 2:4], v=qkv[:, 4:])
    outs = []
    # slices of a projection, and (as with a key norm) keys of their own beside them
    for keys in (sliced.k, request.k):

        def strided(new, *step, keys=keys):
            dense(workspace_for(request))(QKV(sliced.q, keys, sliced.v), *step)

        outs.append(prefill(strided, sliced, [300], cache_for(request, KVARN), KVARN))
    assert relative_rms(outs[0], oracle(request, KVARN)) < BOUND[torch.float16]
    assert torch.equal(*outs)


def test_extend_dense_of_a_canonical_preset_has_no_window():
    request = make_request(2 * PAGE + 31, (2, 1), 64, torch.float16)
    out = prefill(dense(workspace_for(request)), request, [200, 87], cache_for(request, CANONICAL), CANONICAL)
    assert relative_rms(out, oracle(request, CANONICAL)) < BOUND[torch.float16]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_extend_dense_step_stores_the_same_bytes_as_the_torch_form(head_dim):
    request = make_request(2 * PAGE + 40, (2, 1), head_dim, torch.float16)
    chunks = [100, PAGE, 68]
    expected_cache = cache_for(request, KVARN)
    expected = prefill(torch_form.attend_extend, request, chunks, expected_cache, KVARN)
    cache = cache_for(request, KVARN)
    out = prefill(partial(all_kernels, workspace_for(request)), request, chunks, cache, KVARN)
    assert relative_rms(out, expected) < BOUND[torch.float16]
    assert torch.equal(cache.records, expected_cache.records)


def test_workspace_is_bounded_and_charged():
    shape = AttentionShape(32, 8, 128, torch.bfloat16)
    assert [num_pages(shape, most, H100) for most in (10**6, 10, 1)] == [396, 10, 2]
    assert num_pages(shape, 10**6, dataclasses.replace(H100, memory=140 << 30)) == 896
    # what a page of queries reads in a window of 1,024 tokens: its own page and the 8 before it
    assert [num_pages(shape, most, H100, (512, 1024)) for most in (10**6, 10, 1)] == [396, 10, 9]
    # a chunk of 8K on 256K tokens of context
    assert workspace_bytes(shape, 10**6, 2048 + 64 + 4, FLASHINFER, H100) <= 256 << 20
    few = AttentionShape(4, 2, 64, torch.float16)
    workspace = make_workspace(few, 10, DEVICE, paged_calls.FlashInfer(DEVICE, flashinfer_standin))
    assert workspace.keys.shape == (10, 2, PAGE, 64)
    pages = workspace.keys.nbytes + workspace.values.nbytes
    assert workspace_bytes(few, 10, 9, FLASHINFER, H100) - pages == 2 * ((8 << 20) + (128 << 10))
    assert workspace_bytes(few, 10, 9, FA3, H100) - pages == 2 * (32 << 20)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((8, 2), 256), ((9, 3), 64)])
@pytest.mark.parametrize("pages", [3, 64])
@both_libraries
def test_extend_dense_of_a_long_prompt_matches_the_oracle_and_the_triton_kernel(dtype, heads, head_dim, pages, library):
    request = make_request(2051, heads, head_dim, dtype)
    workspace = workspace_for(request, pages, library)
    expected = oracle(request, KVARN)
    for chunks in ([2051], [1000, 51, 1000], [100, 1, 1950]):
        out = prefill(dense(workspace), request, chunks, cache_for(request, KVARN), KVARN)
        assert relative_rms(out, expected) < BOUND[dtype]
    cache = cache_for(request, KVARN)
    triton = prefill(attention_for(cache, heads[0], KVARN), request, [2051], cache, KVARN)
    assert relative_rms(out, triton) < BOUND[dtype]


@pytest.mark.gpu
@both_libraries
def test_extend_dense_is_planned_and_issued_without_waiting_for_the_device(library):
    request = make_request(1500, (32, 8), 128, torch.bfloat16)
    workspace, cache = workspace_for(request, 8, library), cache_for(request, KVARN)
    attention = attention_for(cache, 32, KVARN)
    steps = []

    def step(new, out, cache, batch, config, sm_scale):
        def issue():
            plan = plan_dense(batch, workspace, config, gpu_of(DEVICE))
            attention.attend(new, out, cache, Step(batch, plan), sm_scale)
            return len(plan.segments)

        steps.append(issue)
        # the first call builds kernels and wrappers
        issue()

    prefill(step, request, [700, 800], cache, KVARN)
    torch.cuda.synchronize()
    asleep = torch.cuda.Event()
    torch.cuda._sleep(2 * 10**9)
    asleep.record()
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert steps[-1]() > 1
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not asleep.query(), "the host waited for the device"


@pytest.mark.gpu
def test_workspace_takes_what_is_charged():
    wrappers = pytest.importorskip("flashinfer")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    scratch = torch.empty(16, dtype=torch.uint8, device=DEVICE)
    wrapper = wrappers.BatchPrefillWithPagedKVCacheWrapper(scratch, "HND")
    taken = torch.cuda.memory_allocated() - before
    charged = workspace_bytes(AttentionShape(1, 1, 64, torch.float16), 1, 1, FLASHINFER, H100)
    assert wrapper is not None and taken - 1024 <= charged // 2
