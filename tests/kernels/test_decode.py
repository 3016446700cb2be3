# SPDX-License-Identifier: Apache-2.0
"""One decode step of the kernels (store, encode, split-KV attention, merge) against the oracle."""

import dataclasses

import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    RELATIVE_RMS,
    make_cache,
    make_request,
    oracle,
    prefill,
    relative_rms,
    run_decode,
)
from kvarn_kernels import decode_plan, decode_sm90, gpu, torch_form
from kvarn_kernels.cache import DecodeWorkspace
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.decode import decode, exact_block, make_workspace
from kvarn_kernels.decode_plan import plan_decode
from kvarn_kernels.merge import merge
from kvarn_kernels.store import store_decode

PRESETS = ["kvarn", "kvarn_canonical", "kvarn_k4v3_g128", "kvarn_k4v4_g128", "kvarn_k3v2_g128", "kvarn_k2v2_g128"]

# fp16 rounding of the folded query and weights (2^-12 each) over D or G terms, on top of the output's rounding; the
# output of a single head has few terms, and 1.1e-3 was seen
TOLERANCE = {dtype: bound + 1.5e-3 for dtype, bound in RELATIVE_RMS.items()}


def kernels(q, k, v, out, cache, batch, config, sm_scale):
    plan_decode(batch, config)
    store_decode(q, k, v, cache, batch, config)
    decode(cache, batch, config, q.shape[1], k.shape[1], sm_scale)
    merge(out, batch, config)


def poisoned_workspace(batch_size, heads, head_dim, max_pages, config) -> DecodeWorkspace:
    workspace = make_workspace(batch_size, *heads, head_dim, max_pages, config, DEVICE)
    for x in (workspace.rotated_q, workspace.partial_out, workspace.partial_lse):
        x.fill_(float("nan"))
    for x in (workspace.split_requests, workspace.split_indptr):
        x.fill_(-1)
    return workspace


def decode_step(requests, heads, config, padding=0, cache=None):
    """Prefill all but the last token of each request in the torch form, decode the last one with the kernels."""
    head_dim, dtype = requests[0].q.shape[-1], requests[0].q.dtype
    pages = 1 + max(max(r.pages) for r in requests)
    rows = 1 + max(r.row for r in requests)
    cache = cache or make_cache(config, heads[1], head_dim, dtype, pages, rows)
    for request in requests:
        if len(request.q) - 1 > request.exact_start:
            chunks = [len(request.q) - 1 - request.exact_start]
            prefill(torch_form.extend_attention, request, chunks, cache, config)
    most_pages = 1 + max(len(r.pages) for r in requests)
    workspace = poisoned_workspace(len(requests) + padding, heads, head_dim, most_pages, config)
    positions = [len(r.q) - 1 for r in requests]
    return run_decode(kernels, requests, positions, cache, config, padding=padding, workspace=workspace)


def make_requests(lengths, heads, head_dim, dtype):
    requests, first_page = [], 1
    for n, tokens in enumerate(lengths):
        requests.append(make_request(tokens, heads, head_dim, dtype, row=n + 1, first_page=first_page, seed=n))
        first_page += len(requests[-1].pages)
    return requests


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((4, 1), 64), ((1, 1), 128), ((6, 1), 256)])
def test_decode_matches_the_oracle_in_every_form(preset, dtype, heads, head_dim):
    config = KVarNConfig.from_preset(preset)
    requests = make_requests([3 * PAGE + 1], heads, head_dim, dtype)
    for request, out in zip(requests, decode_step(requests, heads, config), strict=True):
        assert relative_rms(out, oracle(request, config, len(request.q) - 1)[0]) < TOLERANCE[dtype]


def test_decode_matches_the_oracle_with_the_blocks_of_a_gpu_with_less_shared_memory(monkeypatch):
    full = exact_block(256)
    # such GPUs run the Triton kernel
    monkeypatch.setattr(decode_sm90, "is_supported", lambda device: False)
    monkeypatch.setattr(gpu, "shared_memory", lambda: 99 << 10)
    assert exact_block(256) != full
    config = KVarNConfig.from_preset("kvarn")
    requests = make_requests([3 * PAGE + 1, PAGE + 77], (6, 1), 256, torch.float16)
    for request, out in zip(requests, decode_step(requests, (6, 1), config), strict=True):
        assert relative_rms(out, oracle(request, config, len(request.q) - 1)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_decode_matches_the_oracle_at_every_length(preset):
    config = KVarNConfig.from_preset(preset)
    lengths = [1, 2, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE, 401, 9 * PAGE + 77]
    requests = make_requests(lengths, (4, 1), 64, torch.float16)
    outs = decode_step(requests, (4, 1), config, padding=3)
    for request, out in zip(requests, outs, strict=True):
        error = relative_rms(out, oracle(request, config, len(request.q) - 1)[0])
        assert error < TOLERANCE[torch.float16], len(request.q)


@pytest.mark.parametrize("group", [1, 7, 8])
def test_decode_serves_any_group_size(group):
    config = KVarNConfig.from_preset("kvarn")
    requests = make_requests([3 * PAGE + 5], (2 * group, 2), 64, torch.float16)
    (out,) = decode_step(requests, (2 * group, 2), config)
    assert relative_rms(out, oracle(requests[0], config, len(requests[0].q) - 1)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
@pytest.mark.parametrize("tokens", [2 * PAGE + 1, 3 * PAGE, 3 * PAGE + 1])
def test_decode_after_a_prefix_hit_reads_records_before_exact_start(preset, tokens):
    config = KVarNConfig.from_preset(preset)
    heads = (4, 1)
    owner = make_request(tokens, heads, 64, torch.float16, row=1)
    cache = make_cache(config, 1, 64, torch.float16, 1 + max(owner.pages), rows=3)
    prefill(torch_form.extend_attention, owner, [2 * PAGE], cache, config)
    guest = make_request(tokens, heads, 64, torch.float16, row=2)
    guest.exact_start = 2 * PAGE
    (out,) = decode_step([guest], heads, config, cache=cache)
    assert relative_rms(out, oracle(guest, config, tokens - 1)[0]) < TOLERANCE[torch.float16]


def test_decode_keeps_encoding_pages_over_many_steps():
    config = KVarNConfig.from_preset("kvarn")
    request = make_request(2 * PAGE + 3, (2, 1), 64, torch.float16)
    cache = make_cache(config, 1, 64, torch.float16, 8, rows=2)
    prefill(torch_form.extend_attention, request, [PAGE - 2], cache, config)
    workspace = poisoned_workspace(1, (2, 1), 64, 3, config)
    expected = oracle(request, config)
    for position in range(PAGE - 2, 2 * PAGE + 3):
        (out,) = run_decode(kernels, [request], [position], cache, config, workspace=workspace)
        if position % 16 == 0 or position % PAGE in (0, 1, PAGE - 1):
            assert relative_rms(out, expected[position]) < TOLERANCE[torch.float16], position


def test_decode_survives_magnitudes_beyond_fp16():
    config = KVarNConfig.from_preset("kvarn")
    request = make_request(3 * PAGE, (4, 1), 64, torch.bfloat16)
    request.q *= 1e-5
    request.k *= 1e5
    request.v *= 1e5
    (out,) = decode_step([request], (4, 1), config)
    assert relative_rms(out, oracle(request, config, 3 * PAGE - 1)[0]) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_decode_of_a_poisoned_neighbour_changes_no_bit(poison):
    config = KVarNConfig.from_preset("kvarn")
    lengths, heads = [2 * PAGE + 1, 3 * PAGE], (4, 1)
    alone = decode_step(make_requests(lengths, heads, 64, torch.float16), heads, config)
    requests = make_requests(lengths, heads, 64, torch.float16)
    requests[0].k[5], requests[0].v[200], requests[0].q[-1] = poison, poison, poison
    assert torch.equal(decode_step(requests, heads, config)[1], alone[1])


def decode_behind_others(others: int, tokens: int, config: KVarNConfig) -> torch.Tensor:
    """Return the output of a request that is the last of a batch, on other pages and in another row each time."""
    requests = make_requests([*(70 + 64 * n for n in range(others)), tokens], (4, 1), 64, torch.float16)
    mine = make_request(tokens, (4, 1), 64, torch.float16)
    requests[-1] = dataclasses.replace(mine, row=others + 1, pages=requests[-1].pages[::-1])
    return decode_step(requests, (4, 1), config, padding=others % 3)[-1]


@pytest.mark.parametrize("tokens", [2 * PAGE, 17 * PAGE + 3])
def test_decode_of_canonical_presets_is_the_same_bits_at_any_batch_size(tokens, monkeypatch):
    # so few programs that a plan by the batch would differ
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 1)
    config = KVarNConfig.from_preset("kvarn_canonical")
    alone = decode_behind_others(0, tokens, config)
    assert all(torch.equal(decode_behind_others(others, tokens, config), alone) for others in (1, 4))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "kvarn_canonical"])
def test_decode_of_default_presets_agrees_within_a_thousandth_at_any_batch_size(preset, monkeypatch):
    # so few programs that a batch of 1, 2 and 5 takes splits of 2, 3 and 5 units and more
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 1)
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 1)
    config = KVarNConfig.from_preset(preset)
    alone = decode_behind_others(0, 6 * PAGE + 9, config)
    for others in (1, 4):
        assert relative_rms(decode_behind_others(others, 6 * PAGE + 9, config), alone) < 1e-3, others
