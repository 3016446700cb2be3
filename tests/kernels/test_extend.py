# SPDX-License-Identifier: Apache-2.0
"""The extend kernel against the float64 oracle; what must not change a bit of it is in test_position_rule.py."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    attention_for,
    between_stores,
    cache_for,
    int32,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_extend,
    shape_of,
)
from kvarn_kernels import attention as attention_module
from kvarn_kernels import torch_form
from kvarn_kernels.attention import TORCH, TRITON
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100, Gpu, gpu_of
from kvarn_kernels.read import extend as extend_module
from kvarn_kernels.read.extend import block_sizes, extend, num_splits, plan_extend, query_tiles

KVARN = KVarNConfig.from_preset("kvarn")
CANONICAL = KVarNConfig.from_preset("kvarn_canonical")
# fp16 operands (2^-12 on average) of codes, queries, weights; bf16 weights, which the interpreter truncates
BOUND = {torch.float32: 1e-3, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def rotated_extend(
    new: QKV, out, cache, batch, config, sm_scale, gpu: Gpu | None = None, sinks=None, sliding_window=0
):
    rotated = QKV(torch_form.rotate(new.q), *(torch_form.rotate(x).to(x.dtype) for x in (new.k, new.v)))
    plan = plan_extend(batch, shape_of(cache, new.q.shape[1]), config, gpu or gpu_of(DEVICE), sliding_window)
    extend(rotated, out, cache, batch, plan, config, sm_scale, sinks)


# the kernel between the store steps of the torch form
extend_kernel = partial(between_stores, rotated_extend)


def chunks_of(size: int, tokens: int) -> list[int]:
    return [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        *((KVARN, n) for n in (1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 401)),
        (CANONICAL, PAGE + 1),
        (CANONICAL, 401),
    ],
    ids=lambda x: getattr(x, "name", x),
)
def test_extend_matches_the_oracle_at_every_length(tokens, config):
    request = make_request(tokens, (2, 2), 64, torch.float16)
    out = prefill(extend_kernel, request, [tokens], cache_for(request, config), config)
    assert relative_rms(out, oracle(request, config)) < BOUND[torch.float16]


@pytest.mark.parametrize(
    ("preset", "heads", "head_dim", "dtype"),
    [
        ("kvarn", (2, 2), 64, torch.float32),
        ("kvarn", (4, 1), 128, torch.bfloat16),
        ("kvarn", (2, 1), 256, torch.float16),
        ("kvarn_canonical", (6, 1), 128, torch.float16),
        ("kvarn_canonical", (7, 1), 64, torch.bfloat16),
        ("kvarn_k4v4_g128_canonical", (1, 1), 64, torch.float16),
        ("kvarn_k4v4_g128_canonical", (1, 1), 128, torch.float16),
        ("kvarn_k4v4_g128_canonical", (1, 1), 256, torch.float16),
        ("kvarn_k4v3_g128_canonical", (1, 1), 64, torch.float16),
        ("kvarn_k4v3_g128", (4, 1), 128, torch.bfloat16),
        ("kvarn_k4v3_g128_canonical", (1, 1), 256, torch.float16),
        ("kvarn_k3v2_g128_canonical", (1, 1), 64, torch.float16),
        ("kvarn_k3v2_g128", (4, 1), 128, torch.bfloat16),
        ("kvarn_k3v2_g128_canonical", (1, 1), 256, torch.float16),
        ("kvarn_k2v2_g128_canonical", (1, 1), 64, torch.float16),
        ("kvarn_k2v2_g128_canonical", (1, 1), 128, torch.float16),
        ("kvarn_k2v2_g128_canonical", (1, 1), 256, torch.float16),
    ],
)
def test_extend_matches_the_oracle_in_every_form(preset, heads, head_dim, dtype):
    config = KVarNConfig.from_preset(preset)
    request = make_request(307, heads, head_dim, dtype)
    out = prefill(extend_kernel, request, [307], cache_for(request, config), config)
    assert relative_rms(out, oracle(request, config)) < BOUND[dtype]


@pytest.mark.parametrize("heads", [(4, 2), (8, 1)], ids=str)
def test_extend_matches_the_oracle_with_the_blocks_of_a_gpu_with_less_shared_memory(heads):
    group, small = heads[0] // heads[1], replace(gpu_of(DEVICE), shared_memory=99 << 10)
    assert block_sizes(group, 256, small) != block_sizes(group, 256, gpu_of(DEVICE))
    kernel = partial(between_stores, partial(rotated_extend, gpu=small))
    request = make_request(PAGE + 51, heads, 256, torch.float16)
    out = prefill(kernel, request, [70, PAGE - 19], cache_for(request, CANONICAL), CANONICAL)
    assert relative_rms(out, oracle(request, CANONICAL)) < BOUND[torch.float16]


@pytest.mark.parametrize("least", [1, extend_module.MIN_SPLIT_PAGES], ids=lambda n: f"splits_of_{n}")
@pytest.mark.parametrize("exact_start", [PAGE, 3 * PAGE])
def test_extend_reads_a_prefix_hit_from_the_records_of_another_request(exact_start, least, monkeypatch):
    monkeypatch.setattr(extend_module, "MIN_SPLIT_PAGES", least)
    donor = make_request(3 * PAGE, (2, 1), 64, torch.float16)
    cache = cache_for(donor, KVARN)
    prefill(torch_form.attend_extend, donor, [len(donor.q)], cache, KVARN)
    hit = make_request(exact_start + 2 * PAGE + 3, (2, 1), 64, torch.float16, row=2, first_page=10, seed=1)
    hit.exact_start = exact_start
    hit.pages[: exact_start // PAGE] = donor.pages[: exact_start // PAGE]
    hit.k[:exact_start], hit.v[:exact_start] = donor.k[:exact_start], donor.v[:exact_start]
    # the ring of row 2 is poison: nothing of the prefix may be read exactly
    out = prefill(extend_kernel, hit, [70, 2 * PAGE + 3 - 70], cache, KVARN)
    assert relative_rms(out, oracle(hit, KVARN, exact_start)) < BOUND[torch.float16]


def test_extend_attends_the_first_tokens_of_more_pages_than_one_block():
    request = make_request(34 * PAGE + 7, (1, 1), 64, torch.float16)
    cache = cache_for(request, CANONICAL, pages=40)
    torch_chunk = 34 * PAGE - 2
    prefill(torch_form.attend_extend, request, [torch_chunk], cache, CANONICAL)
    out = run_extend(extend_kernel, [request], [(torch_chunk, len(request.q))], cache, CANONICAL)[0]
    assert relative_rms(out, oracle(request, CANONICAL, torch_chunk)) < BOUND[torch.float16]


@pytest.mark.parametrize(("heads", "head_dim", "dtype"), [((4, 1), 128, torch.bfloat16), ((3, 3), 64, torch.float16)])
def test_extend_matches_the_oracle_where_the_pages_are_split(heads, head_dim, dtype, monkeypatch):
    monkeypatch.setattr(extend_module, "MIN_SPLIT_PAGES", 1)
    short = make_request(2 * PAGE + 9, heads, head_dim, dtype, row=2, first_page=8, seed=1)
    request = make_request(5 * PAGE + 40, heads, head_dim, dtype)
    cache = cache_for(request, KVARN)
    prefill(torch_form.attend_extend, request, [5 * PAGE - 20], cache, KVARN)
    prefill(torch_form.attend_extend, short, [2 * PAGE - 9], cache, KVARN)
    seen = []
    counted = extend_module.num_splits
    monkeypatch.setattr(extend_module, "num_splits", lambda *step: seen.append(counted(*step)) or seen[-1])
    spans = [(5 * PAGE - 20, 5 * PAGE + 40), (2 * PAGE - 9, 2 * PAGE + 9)]
    outs = run_extend(extend_kernel, [request, short], spans, cache, KVARN, padding=3)
    # as many as the longest request has pages; the short one reads none or one of its own in splits
    assert seen == [5]
    for each, (start, end), out in zip((request, short), spans, outs, strict=True):
        assert relative_rms(out, oracle(each, KVARN, start, end)) < BOUND[dtype]


def test_splits_fill_the_device_but_for_canonical_presets():
    def of(tokens, prefix, config=KVARN, kv_heads=8):
        batch = SimpleNamespace(prefix_lens_host=[prefix], seq_lens_host=[prefix + tokens])
        return num_splits(batch, kv_heads * sum(query_tiles(batch, 32)), config, H100)

    least = extend_module.MIN_SPLIT_PAGES * PAGE
    # 132 multiprocessors, tiles of 32 tokens
    assert [of(tokens, 64 * least) for tokens in (1, 32, 33, 128, 512)] == [16, 16, 8, 4, 1]
    assert [of(1, prefix) for prefix in (0, least, 2 * least)] == [1, 1, 2]
    assert of(1, 64 * least, CANONICAL) == 1 and of(1, 64 * least, kv_heads=1) == extend_module.MAX_SPLITS


def test_extend_keeps_the_poison_of_one_request_from_the_others_where_pages_are_split(monkeypatch):
    monkeypatch.setattr(extend_module, "MIN_SPLIT_PAGES", 1)
    request = make_request(3 * PAGE + 20, (2, 1), 64, torch.float16, row=1, first_page=1)
    poisoned = make_request(2 * PAGE + 50, (2, 1), 64, torch.float16, row=2, first_page=6, seed=3)
    poisoned.k[3], poisoned.v[5], poisoned.q[-9:] = float("nan"), float("inf"), float("nan")
    cache = cache_for(request, KVARN)
    for each, cached in ((request, 3 * PAGE), (poisoned, 2 * PAGE)):
        prefill(torch_form.attend_extend, each, [cached], cache, KVARN)
    spans = [(2 * PAGE, 2 * PAGE + 50), (3 * PAGE, 3 * PAGE + 20)]
    _, out = run_extend(extend_kernel, [poisoned, request], spans, cache, KVARN)
    assert relative_rms(out, oracle(request, KVARN, 3 * PAGE)) < BOUND[torch.float16]


def test_extend_keeps_the_poison_of_one_request_from_the_others():
    request = make_request(200, (2, 1), 64, torch.float16, row=1, first_page=1)
    poisoned = make_request(150, (2, 1), 64, torch.float16, row=2, first_page=4, seed=3)
    alone = prefill(extend_kernel, request, [200], cache_for(request, KVARN), KVARN)
    poisoned.k[3], poisoned.v[5], poisoned.q[9] = float("nan"), float("inf"), float("nan")
    out = run_extend(extend_kernel, [poisoned, request], [(0, 150), (0, 200)], cache_for(request, KVARN), KVARN)
    assert torch.equal(out[1], alone)


def test_extend_stays_finite_for_keys_and_queries_of_any_magnitude():
    request = make_request(260, (2, 1), 64, torch.bfloat16)
    request.q.mul_(2.0**30)
    request.k.mul_(2.0**-34)
    request.v.mul_(2.0**20)
    out = prefill(extend_kernel, request, [260], cache_for(request, CANONICAL), CANONICAL)
    assert relative_rms(out, oracle(request, CANONICAL)) < BOUND[torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((32, 8), 128), ((8, 2), 256), ((9, 3), 64)])
def test_extend_of_a_long_prompt_does_not_depend_on_its_chunks(dtype, heads, head_dim, config):
    tokens = 2051
    request = make_request(tokens, heads, head_dim, dtype)
    right = oracle(request, config)
    attention = attention_for(cache_for(request, config), heads[0], config)
    out = prefill(attention, request, [tokens], cache_for(request, config), config)
    assert relative_rms(out, right) < BOUND[dtype]
    for size in (100, 127, 1000):
        chunked = prefill(attention, request, chunks_of(size, tokens), cache_for(request, config), config)
        # a window preset shares the older pages of short chunks between splits, which add up in another order
        if config.fixed_order:
            assert torch.equal(chunked, out)
        assert relative_rms(chunked, right) < BOUND[dtype]


@pytest.mark.parametrize("head_dim", [64, 128])
def test_extend_stores_the_same_bytes_as_the_torch_form(head_dim):
    request = make_request(2 * PAGE + 40, (2, 1), head_dim, torch.float16)
    outs, caches = [], [cache_for(request, KVARN) for _ in range(2)]
    for cache, kernels in zip(caches, (TRITON, TORCH), strict=True):
        outs.append(prefill(attention_for(cache, 2, KVARN, kernels), request, [100, PAGE, 68], cache, KVARN))
    (out, expected), (cache, expected_cache) = outs, caches
    assert relative_rms(out, expected) < BOUND[torch.float16]
    assert torch.equal(cache.records, expected_cache.records)


@pytest.mark.parametrize("reused", [0, 10**6])
def test_layers_of_a_step_share_the_memory_of_what_they_rotate(monkeypatch, reused):
    monkeypatch.setattr(attention_module, "REUSED_TOKENS", reused)
    layers = [make_request(PAGE + 40, (2, 1), 64, torch.float16, seed=seed) for seed in (1, 2, 3)]
    caches = [cache_for(request, KVARN) for request in layers]
    attention = attention_for(caches[0], 2, KVARN)
    (first, *_), length = layers, PAGE + 40
    batch = ExtendBatch(
        ring_pages=caches[0].ring_pages(first.row),
        prefix_lens=int32(0),
        seq_lens=int32(length),
        qo_indptr=int32(0, length),
        page_table=int32(*first.pages)[None],
        exact_starts=int32(0),
        prefix_lens_host=[0],
        seq_lens_host=[length],
    )
    step, places = attention.plan(batch), set()
    for request, cache in zip(layers, caches, strict=True):
        expected_cache = cache_for(request, KVARN)
        expected = prefill(torch_form.attend_extend, request, [length], expected_cache, KVARN)
        out = torch.empty_like(request.q)
        attention.attend(QKV(request.q, request.k, request.v), out, cache, step, 64**-0.5)
        assert relative_rms(out, expected) < BOUND[torch.float16]
        assert torch.equal(cache.records[request.pages[0]], expected_cache.records[request.pages[0]])
        places |= {x.data_ptr() for chunk in step.rotated.values() for x in chunk}
    assert len(places) == (3 if reused else 0)
