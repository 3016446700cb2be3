# SPDX-License-Identifier: Apache-2.0
"""The torch form against the float64 oracle."""

import pytest
import torch
from builders import (
    PAGE,
    RELATIVE_RMS,
    cache_for,
    make_cache,
    make_request,
    oracle,
    prefill,
    read_ring,
    relative_rms,
    run_decode,
    run_extend,
)
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.torch_form import attend_decode, attend_extend

KVARN = KVarNConfig.from_preset("kvarn")
CANONICAL = KVarNConfig.from_preset("kvarn_canonical")
PRESETS = ["kvarn", "kvarn_canonical", "kvarn_k4v3_g128", "kvarn_k4v4_g128", "kvarn_k3v2_g128", "kvarn_k2v2_g128"]


@pytest.mark.parametrize("tokens", [1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 401])
@pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)
def test_extend_matches_the_oracle_at_every_length(tokens, config):
    request = make_request(tokens, (4, 2), 64, torch.float32)
    out = prefill(attend_extend, request, [tokens], cache_for(request, config), config)
    assert relative_rms(out, oracle(request, config)) < RELATIVE_RMS[torch.float32]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "head_dim"), [((2, 2), 128), ((4, 1), 256), ((6, 1), 64)])
def test_extend_matches_the_oracle_in_every_form(preset, dtype, heads, head_dim):
    config = KVarNConfig.from_preset(preset)
    request = make_request(307, heads, head_dim, dtype)
    out = prefill(attend_extend, request, [307], cache_for(request, config), config)
    assert out.dtype == dtype
    assert relative_rms(out, oracle(request, config)) < RELATIVE_RMS[dtype]


@pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)
@pytest.mark.parametrize("size", [1, 100, 127, 128, 129, 256])
def test_extend_does_not_depend_on_the_chunks(config, size):
    tokens = 401 if size > 1 else 260
    request = make_request(tokens, (4, 2), 64, torch.float32)
    cache = cache_for(request, config)
    chunks = [size] * (tokens // size) + [tokens % size] * (tokens % size > 0)
    out = prefill(attend_extend, request, chunks, cache, config)
    assert relative_rms(out, oracle(request, config)) < RELATIVE_RMS[torch.float32]
    whole = cache_for(request, config)
    assert torch.equal(prefill(attend_extend, request, [tokens], whole, config), out)
    assert torch.equal(cache.records, whole.records)


@pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)
def test_extend_reads_a_prefix_hit_from_the_records_of_another_request(config):
    donor = make_request(3 * PAGE + 50, (4, 2), 64, torch.float32)
    cache = cache_for(donor, config)
    prefill(attend_extend, donor, [len(donor.q)], cache, config)
    hit = make_request(5 * PAGE + 3, (4, 2), 64, torch.float32, row=2, first_page=10, seed=1)
    hit.exact_start = 3 * PAGE
    hit.pages[:3] = donor.pages[:3]
    hit.k[: hit.exact_start], hit.v[: hit.exact_start] = (
        donor.k[: hit.exact_start],
        donor.v[: hit.exact_start],
    )
    # the ring of row 2 is poison: nothing of the prefix may be read exactly
    out = prefill(attend_extend, hit, [70, 100, 2 * PAGE + 3 - 170], cache, config)
    assert relative_rms(out, oracle(hit, config, hit.exact_start)) < RELATIVE_RMS[torch.float32]


@pytest.mark.parametrize("config", [KVARN, CANONICAL], ids=lambda c: c.name)
def test_decode_matches_the_oracle_across_page_boundaries(config):
    request = make_request(2 * PAGE + 12, (6, 1), 64, torch.float16)
    cache, prompt = cache_for(request, config), PAGE - 10
    prefill(attend_extend, request, [prompt], cache, config)
    positions = range(prompt, len(request.q))
    out = torch.stack([run_decode(attend_decode, [request], [p], cache, config)[0] for p in positions])
    assert relative_rms(out, oracle(request, config, prompt)) < RELATIVE_RMS[torch.float16]


def test_decode_fills_the_page_with_the_record_of_the_encoder():
    request = make_request(PAGE, (2, 2), 128, torch.float16)
    cache = cache_for(request, KVARN)
    prefill(attend_extend, request, [PAGE - 1], cache, KVARN)
    run_decode(attend_decode, [request], [PAGE - 1], cache, KVARN)
    k, v = (reference.rotate(x).to(x.dtype).transpose(0, 1).cpu() for x in (request.k, request.v))
    assert torch.equal(cache.records[request.pages[0]].cpu(), reference.encode_tile(k, v, KVARN))


def test_decode_does_not_depend_on_the_company_in_the_batch():
    requests = [
        make_request(tokens, (4, 2), 64, torch.float16, row=row, first_page=5 * row, seed=row)
        for row, tokens in ((1, PAGE), (2, 3 * PAGE - 5), (3, 2))
    ]
    outs = []
    for alone in (True, False):
        cache = make_cache(KVARN, 2, 64, torch.float16, 24, 4)
        for request in requests:
            prefill(attend_extend, request, [len(request.q) - 1], cache, KVARN)
        last = [len(r.q) - 1 for r in requests]
        if alone:
            steps = zip(requests, last, strict=True)
            outs.append([run_decode(attend_decode, [r], [p], cache, KVARN)[0] for r, p in steps])
        else:
            outs.append(run_decode(attend_decode, requests, last, cache, KVARN, padding=3))
            # padding stores one token on page 0
            k, v = read_ring(cache, 0, torch.arange(cache.page_tokens))
            assert k[0].isfinite().all() and v[0].isfinite().all()
            assert k[1:].isnan().all() and v[1:].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(*outs, strict=True))


def test_extend_does_not_depend_on_the_company_in_the_batch():
    a = make_request(300, (4, 2), 64, torch.float16, row=1, first_page=1, seed=1)
    b = make_request(170, (4, 2), 64, torch.float16, row=2, first_page=8, seed=2)
    cache = cache_for(a, KVARN)
    prefill(attend_extend, b, [40], cache, KVARN)
    together = run_extend(attend_extend, [a, b], [(0, 300), (40, 170)], cache, KVARN)
    alone = cache_for(a, KVARN)
    prefill(attend_extend, b, [40], alone, KVARN)
    assert torch.equal(together[0], run_extend(attend_extend, [a], [(0, 300)], alone, KVARN)[0])
    assert torch.equal(together[1], run_extend(attend_extend, [b], [(40, 170)], alone, KVARN)[0])
