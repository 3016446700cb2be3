# SPDX-License-Identifier: Apache-2.0
"""Decode steps inside CUDA graphs and at serving size: nothing is read by the host, nothing is allocated."""

import pytest
import torch
from builders import DEVICE, PAGE, RELATIVE_RMS, attention_for, make_cache, make_request, oracle, prefill, relative_rms
from kvarn_kernels.batch import QKV, DecodeBatch
from kvarn_kernels.config import KVarNConfig

pytestmark = pytest.mark.gpu
HEADS, HEAD_DIM = (8, 2), 128
TOLERANCE = RELATIVE_RMS[torch.bfloat16] + 1e-3


def static_batch(size: int, max_pages: int, ring_pages: int, drafts: int = 1) -> DecodeBatch:
    """Return a batch of padded rows: page 0, one token."""
    return DecodeBatch(
        ring_pages=torch.zeros(size, ring_pages, dtype=torch.int32, device=DEVICE),
        seq_lens=torch.ones(size, dtype=torch.int32, device=DEVICE),
        page_table=torch.zeros(size, max_pages, dtype=torch.int32, device=DEVICE),
        store_pages=torch.zeros(size, dtype=torch.int32, device=DEVICE),
        exact_starts=torch.zeros(size, dtype=torch.int32, device=DEVICE),
        drafts=drafts,
    )


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical", "kvarn_k4v4_g128", "kvarn_k2v2_g128"])
def test_one_graph_serves_every_length_and_every_padding(preset):
    config = KVarNConfig.from_preset(preset)
    requests, first_page = [], 1
    for n, tokens in enumerate((3 * PAGE + 2, PAGE + 1, 700)):
        requests.append(make_request(tokens, HEADS, HEAD_DIM, torch.bfloat16, row=n + 1, first_page=first_page, seed=n))
        first_page += len(requests[-1].pages)
    cache = make_cache(config, HEADS[1], HEAD_DIM, torch.bfloat16, first_page, rows=4)
    cache.records[0] = 0  # the padding
    begins = [3 * PAGE - 3, 1, 640]
    size = 5
    attention = attention_for(cache, HEADS[0], config, max_batch=size, max_pages=8)
    batch = static_batch(size, 8, cache.rings.shape[1])
    for request, begin in zip(requests, begins, strict=True):
        prefill(attention, request, [begin], cache, config)
    shapes = {"q": HEADS[0], "k": HEADS[1], "v": HEADS[1]}
    inputs = {name: torch.zeros(size, n, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE) for name, n in shapes.items()}
    out = torch.zeros_like(inputs["q"])

    planned = attention.plan(batch)

    def step() -> None:
        attention.attend(QKV(**inputs), out, cache, planned, HEAD_DIM**-0.5)

    step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    # torch registers its random generator with a graph: two tensors of 512 bytes
    assert torch.cuda.memory_allocated() <= before + 1024
    expected = [oracle(request, config) for request in requests]
    for count in range(70):
        live = [n for n, request in enumerate(requests) if begins[n] + count < len(request.q)]
        for x in (batch.ring_pages, batch.store_pages, batch.exact_starts, batch.page_table):
            x.zero_()
        batch.seq_lens.fill_(1)
        for slot, n in enumerate(live):
            request, position = requests[n], begins[n] + count
            batch.ring_pages[slot], batch.seq_lens[slot] = cache.rings[request.row], position + 1
            used = request.pages[: position // PAGE + 1]
            batch.page_table[slot, : len(used)] = torch.tensor(used, dtype=torch.int32)
            batch.store_pages[slot] = used[-1]
            for name, x in inputs.items():
                x[slot] = getattr(request, name)[position]
        attention.plan(batch)
        graph.replay()
        for slot, n in enumerate(live):
            assert relative_rms(out[slot], expected[n][begins[n] + count]) < TOLERANCE, (count, n)


@pytest.mark.parametrize("drafts", [4, 8])
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_a_verify_graph_gives_what_an_eager_step_gives(preset, drafts):
    """Chains over the end of a page, one of them of a padded request, replayed from a graph and run eagerly."""
    config, rows = KVarNConfig.from_preset(preset), 3 * drafts
    requests, first_page = [], 1
    for n, tokens in enumerate((3 * PAGE + 40, PAGE + 40)):
        requests.append(make_request(tokens, HEADS, HEAD_DIM, torch.bfloat16, row=n + 1, first_page=first_page, seed=n))
        first_page += len(requests[-1].pages)
    ring = config.ring_pages(HEAD_DIM, 2, drafts)
    more = ring - config.ring_pages(HEAD_DIM, 2)
    cache = make_cache(config, HEADS[1], HEAD_DIM, torch.bfloat16, first_page, rows=3, more_ring_pages=more)
    cache.records[0] = 0
    lengths = [3 * PAGE - 3, PAGE - 2]
    attention = attention_for(cache, HEADS[0], config, max_batch=rows, max_pages=8, drafts=drafts)
    for request, length in zip(requests, lengths, strict=True):
        prefill(attention, request, [length], cache, config)
    batch = static_batch(rows, 8, ring, drafts)
    inputs = {
        name: torch.zeros(rows, n, HEAD_DIM, dtype=torch.bfloat16, device=DEVICE)
        for name, n in {"q": HEADS[0], "k": HEADS[1], "v": HEADS[1]}.items()
    }
    out = torch.zeros_like(inputs["q"])
    planned = attention.plan(batch)
    attention.attend(QKV(**inputs), out, cache, planned, HEAD_DIM**-0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attention.attend(QKV(**inputs), out, cache, planned, HEAD_DIM**-0.5)
    # of the padded request: 2 .. D + 1 tokens on page 0
    batch.seq_lens.copy_(torch.arange(2, drafts + 2).repeat(3))
    for n, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        for draft in range(drafts):
            row, position = n * drafts + draft, length + draft
            batch.ring_pages[row], batch.seq_lens[row] = cache.rings[request.row], position + 1
            batch.page_table[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
            batch.store_pages[row] = request.pages[position // PAGE]
            for name, x in inputs.items():
                x[row] = getattr(request, name)[position]
    eager, before = torch.zeros_like(out), cache.records.clone()
    attention.attend(QKV(**inputs), eager, cache, attention.plan(batch), HEAD_DIM**-0.5)
    after = cache.records.clone()
    cache.records.copy_(before)
    graph.replay()
    assert torch.equal(out[: 2 * drafts], eager[: 2 * drafts]) and torch.equal(cache.records[1:], after[1:])
    for n, (request, length) in enumerate(zip(requests, lengths, strict=True)):
        expected = oracle(request, config, length, length + drafts)
        assert relative_rms(out[n * drafts : (n + 1) * drafts], expected) < TOLERANCE


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_large_batches_match_the_oracle(preset):
    config = KVarNConfig.from_preset(preset)
    heads, tokens, size = (32, 8), 40 * PAGE + 77, 48
    request = make_request(tokens, heads, HEAD_DIM, torch.bfloat16, row=1)
    cache = make_cache(config, heads[1], HEAD_DIM, torch.bfloat16, 1 + max(request.pages), rows=size + 1)
    attention = attention_for(cache, heads[0], config, max_batch=size, max_pages=len(request.pages))
    prefill(attention, request, [tokens - 1], cache, config)
    cache.records[cache.rings[2:].long()] = cache.records[cache.rings[1].long()]
    batch = DecodeBatch(
        ring_pages=cache.ring_pages(*range(1, size + 1)),
        seq_lens=torch.full((size,), tokens, dtype=torch.int32, device=DEVICE),
        page_table=torch.tensor([request.pages] * size, dtype=torch.int32, device=DEVICE),
        store_pages=torch.full((size,), request.pages[-1], dtype=torch.int32, device=DEVICE),
        exact_starts=torch.zeros(size, dtype=torch.int32, device=DEVICE),
    )
    new = QKV(*(getattr(request, n)[-1:].expand(size, -1, -1).contiguous() for n in "qkv"))
    out = torch.full_like(new.q, float("nan"))
    attention.attend(new, out, cache, attention.plan(batch), HEAD_DIM**-0.5)
    assert all(torch.equal(out[n], out[0]) for n in range(size))
    assert relative_rms(out[0], oracle(request, config, tokens - 1)[0]) < TOLERANCE
