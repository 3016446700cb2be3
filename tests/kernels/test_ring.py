# SPDX-License-Identifier: Apache-2.0
"""Rings in pages of the pool: where every token is, that nothing else is read or written, and that only the ring pages
of a batch say whose tokens they are.

The CUDA forms are tested in `test_encode_cuda.py` and `test_decode_sm90_on_cpu.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise

import pytest
import torch
from builders import (
    DEVICE,
    PAGE,
    Request,
    RowCache,
    attention_for,
    clone,
    int32,
    make_cache,
    make_request,
    oracle,
    prefill,
    read_ring,
    relative_rms,
    run_decode,
    run_extend,
    write_ring,
)
from kvarn_kernels import reference, torch_form
from kvarn_kernels.attention import TORCH, TRITON, Kernels
from kvarn_kernels.batch import QKV, DecodeBatch
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.write.rotate import rotate_to_rings
from test_decode import TOLERANCE

KVARN = KVarNConfig.from_preset("kvarn")
PRESETS = sorted({KVarNConfig.from_preset(name).name for name in preset_names()})
HEADS = (2, 1)

for_every_ring = pytest.mark.parametrize(
    ("preset", "head_dim", "dtype"),
    [(p, d, dtype) for p in PRESETS for d in (64, 128, 256) for dtype in (torch.bfloat16, torch.float32)],
)
in_both_forms = pytest.mark.parametrize("kernels", [TORCH, TRITON], ids=["torch", "triton"])


def places(config: KVarNConfig, head_dim: int, itemsize: int) -> Iterator[tuple[int, int]]:
    """Yield (page of the ring, byte in a head of that page) of position 0, 1, ... by counting, without end."""
    token, record = 2 * head_dim * itemsize, config.record_bytes(head_dim)
    in_page, pages = 0, 0
    while (in_page + 1) * token <= record:
        in_page += 1
    while pages * in_page < (config.window_pages + 1) * PAGE:
        pages += 1
    while True:
        for page in range(pages):
            for n in range(in_page):
                yield page, n * token


def expected_pool(
    cache: RowCache, config: KVarNConfig, k: torch.Tensor, v: torch.Tensor, rows: list[int], start: int = 0
) -> torch.Tensor:
    """Return the bytes of the pool after positions from start on were written one by one, each to the ring of a row."""
    pool, size = cache.records.clone(), 2 * cache.head_dim * cache.dtype.itemsize
    rotated = torch.cat([k, v], -1).view(torch.uint8)
    found = islice(places(config, cache.head_dim, cache.dtype.itemsize), start, start + len(k))
    for token, row, (page, at) in zip(rotated, rows, found, strict=True):
        pool[int(cache.rings[row, page]), :, at : at + size] = token
    return pool


@for_every_ring
def test_torch_form_puts_every_token_where_counting_does(preset, head_dim, dtype):
    config = KVarNConfig.from_preset(preset)
    cache = make_cache(config, 2, head_dim, dtype, pages=2, rows=3, device=torch.device("cpu"))
    tokens = 2 * cache.ring_size + 3
    k, v = (torch.randn(tokens, 2, head_dim).to(dtype) for _ in "kv")
    expected = expected_pool(cache, config, k, v, [1] * tokens)
    # chunks that end in the middle of a page, the third one longer than the ring
    cuts = (0, 1, 50, 50 + cache.ring_size + 9, tokens)
    for start, end in pairwise(cuts):
        torch_form._store_tokens(k[start:end], v[start:end], cache, cache.rings[1], start)
    assert torch.equal(cache.records, expected)
    start = tokens - cache.ring_size
    for x, got in zip((k, v), torch_form._ring_tokens(cache, cache.rings[1], start, tokens), strict=True):
        assert torch.equal(got, x[start:])
    # what the other tests read and write rings with
    for x, got in zip((k, v), read_ring(cache, 1, torch.arange(start, tokens)), strict=True):
        assert torch.equal(got, x[start:])


@for_every_ring
def test_ring_ptrs_are_where_counting_says(preset, head_dim, dtype):
    config = KVarNConfig.from_preset(preset)
    cache = make_cache(config, 1, head_dim, dtype, pages=2, rows=3)
    # each token by a request of its own, of two rows in turn: the second round of their rings
    size = cache.ring_size
    # one channel, so that every order of summation gives the same bits
    new = QKV(*(torch.zeros(size, 1, head_dim, dtype=dtype, device=DEVICE) for _ in "qkv"))
    for x in new:
        x[torch.arange(size), 0, torch.randint(head_dim, (size,))] = torch.randint(1, 100, (size,)).to(x)
    k, v = (reference.rotate(x).to(dtype) for x in new[1:])
    rows = [1 + n % 2 for n in range(size)]
    expected = expected_pool(cache, config, k, v, rows, size)
    seq_lens = torch.arange(size + 1, 2 * size + 1, dtype=torch.int32, device=DEVICE)
    # padding behind the batch, so that reading too far finds memory
    batch = DecodeBatch(cache.ring_pages(*rows, 0, 0, 0)[:size], seq_lens, *[int32(0)] * 3)
    rotate_to_rings(new, torch.empty(size, 1, head_dim, device=DEVICE), cache, batch, config)
    assert torch.equal(cache.records, expected)


def steps(cache: RowCache, request, kernels: Kernels, config: KVarNConfig, tokens: int = 3 * PAGE + 60) -> torch.Tensor:
    """Feed a request in chunks and then token by token; return its outputs."""
    attention = attention_for(cache, HEADS[0], config, kernels)
    outs = [prefill(attention, request, [200, tokens - 200], cache, config)]
    for position in range(tokens, len(request.q)):
        outs += [out[None] for out in run_decode(attention, [request], [position], cache, config)]
    return torch.cat(outs)


@in_both_forms
def test_a_ring_of_more_pages_than_it_needs_gives_the_same_outputs(kernels):
    request = make_request(3 * PAGE + 65, HEADS, 64, torch.float16)
    needed, more = (
        steps(make_cache(KVARN, 1, 64, torch.float16, 6, 3, more_ring_pages=n), request, kernels, KVARN) for n in (0, 4)
    )
    if kernels is TORCH:
        assert torch.equal(needed, more)
    assert relative_rms(more, needed) < TOLERANCE[torch.float16]
    assert relative_rms(more, oracle(request, KVARN)) < TOLERANCE[torch.float16]


@in_both_forms
def test_what_is_behind_the_last_token_of_a_ring_page_is_not_read(kernels):
    request = make_request(3 * PAGE + 65, HEADS, 64, torch.float16)
    outs = []
    for rest in (0x00, 0xFF):
        cache = make_cache(KVARN, 1, 64, torch.float16, 6, 3)
        behind = cache.page_tokens * 2 * 64 * 2
        assert behind < cache.records.shape[2]
        cache.records[cache.rings[1].long(), :, behind:] = rest
        outs.append(steps(cache, request, kernels, KVARN))
        assert (cache.records[cache.rings[1].long(), :, behind:] == rest).all()
    assert outs[0].isfinite().all() and torch.equal(*outs)


def pool_of(cache: RowCache) -> torch.Tensor:
    """Return all the memory of a cache, also that before page 0."""
    return torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(cache.records.untyped_storage())


def check_written(before: RowCache, cache: RowCache, fed: list[tuple[Request, range]], encoded_pages) -> None:
    """Assert that nothing was written but the newest tokens of requests, to their rings, and the pages they fill."""
    for request, positions in fed:
        newest = torch.tensor(list(positions)[-cache.ring_size :])
        write_ring(before, request.row, newest, *(torch_form.rotate(x[newest]) for x in (request.k, request.v)))
    for page in encoded_pages:
        assert not torch.equal(before.records[page], cache.records[page])
        before.records[page] = cache.records[page]
    assert torch.equal(pool_of(cache), pool_of(before))


def scribbled(requests, done: list[int]) -> tuple[RowCache, RowCache]:
    """Return a cache that holds tokens of requests, random bytes in all pages of nobody, and a copy of it."""
    cache = make_cache(KVARN, HEADS[1], 64, torch.float16, pages=14, rows=5)
    pool_of(cache).copy_(torch.randint(256, pool_of(cache).shape, dtype=torch.uint8))
    for request, count in zip(requests, done, strict=True):
        prefill(torch_form.attend_extend, request, [count], cache, KVARN)
    before = replace(cache, records=pool_of(cache).clone().view(-1, *cache.records.shape[1:])[1:])
    return cache, before


def two_requests(lengths: tuple[int, int]):
    return [
        make_request(n, HEADS, 64, torch.float16, row=row, first_page=6 * row - 5, seed=row)
        for row, n in zip((1, 3), lengths, strict=True)
    ]


@in_both_forms
def test_decode_writes_its_tokens_and_the_page_that_they_fill_and_nothing_else(kernels):
    last = (3 * PAGE - 1, 2 * PAGE + 19)
    requests = two_requests((last[0] + 1, last[1] + 1))
    cache, before = scribbled(requests, list(last))
    run_decode(attention_for(cache, HEADS[0], KVARN, kernels), requests, last, cache, KVARN, padding=1)
    padded = replace(requests[0], row=0, k=torch.full_like(requests[0].k, 7.0), v=torch.full_like(requests[0].v, 7.0))
    fed = [(request, range(p, p + 1)) for request, p in zip(requests, last, strict=True)]
    check_written(before, cache, [*fed, (padded, range(1))], [requests[0].pages[2]])


@in_both_forms
def test_extend_writes_its_tokens_and_the_pages_that_they_fill_and_nothing_else(kernels):
    spans = [(100, 4 * PAGE + 9), (PAGE + 3, PAGE + 20)]
    requests = two_requests((spans[0][1], spans[1][1]))
    cache, before = scribbled(requests, [start for start, _ in spans])
    run_extend(attention_for(cache, HEADS[0], KVARN, kernels), requests, spans, cache, KVARN, padding=2)
    fed = [(request, range(*span)) for request, span in zip(requests, spans, strict=True)]
    assert len(fed[0][1]) > cache.ring_size, "more tokens than a ring holds"
    check_written(before, cache, fed, requests[0].pages[:4])


@in_both_forms
@pytest.mark.parametrize("new", [1, 20], ids=["decode", "extend"])
def test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them(kernels, new):
    tokens = 2 * PAGE - 7
    requests = two_requests((tokens, tokens))
    cache = make_cache(KVARN, HEADS[1], 64, torch.float16, pages=14, rows=5)
    for request in requests:
        prefill(torch_form.attend_extend, request, [tokens - new], cache, KVARN)
    swapped = replace(clone(cache), rings=cache.rings[[0, 3, 2, 1, 4]])
    # nothing of so short a request is read from records, so each attends the past of the other and its own new tokens
    mixed = [
        replace(a, k=torch.cat([b.k[:-new], a.k[-new:]]), v=torch.cat([b.v[:-new], a.v[-new:]]))
        for a, b in (requests, requests[::-1])
    ]
    for each, right, wrong in ((cache, requests, mixed), (swapped, mixed, requests)):
        attention = attention_for(each, HEADS[0], KVARN, kernels)
        if new == 1:
            outs = [out[None] for out in run_decode(attention, requests, [tokens - 1] * 2, each, KVARN)]
        else:
            outs = run_extend(attention, requests, [(tokens - new, tokens)] * 2, each, KVARN)
        for out, expected, other in zip(outs, right, wrong, strict=True):
            assert relative_rms(out, oracle(expected, KVARN, tokens - new)) < TOLERANCE[torch.float16]
            assert relative_rms(out, oracle(other, KVARN, tokens - new)) > 0.1
