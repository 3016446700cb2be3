# SPDX-License-Identifier: Apache-2.0
"""Failures that the attention kernels of other KVarN caches had in service, each as a test of its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import triton.language as tl
from history import HEAD_DIM, KV_HEADS, PAGE, QO_HEADS, History
from kvarn_kernels import reference
from kvarn_kernels.attention import TORCH, TRITON
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read import decode_plan
from kvarn_kernels.record import tile
from test_known_failures import PRESETS, tokens
from world import SHAPE, attend, attention_with, pages_of, ring_token, ring_tokens

FORMS = {"torch": TORCH, "triton": TRITON}
POISON = {"nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "beyond fp16": 1e6}


def poisoned_cache(config: KVarNConfig, pages: int) -> LayerCache:
    records = torch.full((pages, KV_HEADS, config.record_bytes(HEAD_DIM)), 0xFF, dtype=torch.uint8)
    return LayerCache(records, HEAD_DIM, torch.float32)


def decode_inputs(config: KVarNConfig, lengths: list[int], max_pages: int = 24):
    """Return (new, cache, batch, histories) of one decode step in which every token but the last is stored.

    Page ids are permuted, those of rings among the others; unused memory is NaN.
    """
    size = len(lengths)
    histories = [History(tokens(n, seed=n + b), pages_of(config)) for b, n in enumerate(lengths)]
    ring_size = config.ring_pages(HEAD_DIM, 4)
    total = sum(-(-n // PAGE) for n in lengths) + size * ring_size + 1
    cache = poisoned_cache(config, total)
    records = cache.records
    order = (1 + torch.randperm(total - 1)).tolist()
    ring_pages = torch.tensor([[order.pop() for _ in range(ring_size)] for _ in lengths], dtype=torch.int32)
    table = torch.full((size, max_pages), -1, dtype=torch.int32)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        pages = [order.pop() for _ in range(-(-n // PAGE))]
        table[b, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        full = (n - 1) // PAGE
        if full:
            records[pages[:full]] = history.records(full)
        for position in range(max(0, n - config.ring_len), n - 1):
            k, v = ring_token(cache, ring_pages[b], position)
            k.copy_(history.rotated_k[position]), v.copy_(history.rotated_v[position])
    batch = DecodeBatch(
        ring_pages=ring_pages,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        page_table=table,
        store_pages=torch.stack([table[b, (n - 1) // PAGE] for b, n in enumerate(lengths)]),
        exact_starts=torch.zeros(size, dtype=torch.int32),
    )
    new = QKV(*(torch.stack([getattr(h, name)[-1] for h in histories]) for name in "qkv"))
    return new, cache, batch, histories


def run_in(form: str, new: QKV, cache: LayerCache, batch, config: KVarNConfig) -> torch.Tensor:
    return attend(attention_with(FORMS[form], config, len(batch.ring_pages)), new, cache, batch)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest relative RMS error of any head; NaN if anything is NaN."""
    return ((out - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()).max().item()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_row_masked_in_a_whole_split_stays_finite(preset):
    """Splits beyond a short request hold no key: exp(-inf - -inf) was NaN, and NaN spread in the merge."""
    config = KVarNConfig.from_preset(preset)
    lengths = [1, 5, PAGE, PAGE + 1, 18 * PAGE + 3]
    new, cache, batch, histories = decode_inputs(config, lengths)
    out = run_in("triton", new, cache, batch, config)
    for b, (history, n) in enumerate(zip(histories, lengths, strict=True)):
        assert error(out[b], history.output(n - 1, n, 0)[0]) < 1e-2, n


def test_decode_writes_nothing_behind_the_split_buffer(monkeypatch):
    """The memory behind the buffer keeps its bytes at every batch size."""
    config = KVarNConfig.from_preset("kvarn")
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 1)
    attention = attention_with(TRITON, config, 6)
    # 8 programs for 2 heads: a batch of 5 has more splits than the largest
    workspace = decode_plan.make_workspace(SHAPE, config, torch.device("cpu"), 6, 24, resident=8)
    assert workspace.max_splits == (4, 8, 12, 12, 20, 12)
    # so short requests would not be cut as often
    monkeypatch.setattr(decode_plan, "SPLIT_OVERHEAD", tl.constexpr(0))
    entries = workspace.partial_lse.shape[0]
    lse, out = torch.full((entries + 8, QO_HEADS), 7.0), torch.full((entries + 8, QO_HEADS, HEAD_DIM), 7.0)
    requests = torch.full((entries + 8,), 7, dtype=torch.int32)
    guarded = dataclasses.replace(
        workspace, partial_lse=lse[:entries], partial_out=out[:entries], split_requests=requests[:entries]
    )
    attention._decode_workspace = guarded
    for size in (1, 5, 6):
        new, cache, batch, histories = decode_inputs(config, [5 * PAGE + 1, 3 * PAGE, 70, 300, 9, 1][:size])
        got = attend(attention, new, cache, batch)
        for b, history in enumerate(histories):
            n = len(history.tokens)
            assert error(got[b], history.output(n - 1, n, 0)[0]) < 1e-2, (size, n)
        assert size != 5 or workspace.split_indptr[5] > workspace.max_splits[-1]
    assert all((x[entries:] == 7).all() for x in (lse, out, requests))


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
@pytest.mark.parametrize(
    ("preset", "form"), [("kvarn", "torch"), ("kvarn_canonical", "torch"), ("kvarn", "triton")]
)
def test_decode_a_poisoned_request_leaves_every_other_bit_alone(preset, poison, form):
    """The poisoned request is in the same step, in its ring, and in the page that the step encodes."""
    config = KVarNConfig.from_preset(preset)
    lengths = [2 * PAGE, PAGE + 7, 3 * PAGE]

    def step(poisoned: bool):
        torch.manual_seed(1)
        new, cache, batch, _ = decode_inputs(config, lengths)
        if poisoned:
            cache.exact[batch.ring_pages[0].long()] = poison
            for x in new:
                x[0, 1, 5] = poison
        out = run_in(form, new, cache, batch, config)
        own = torch.cat([batch.page_table[b, : -(-n // PAGE)] for b, n in enumerate(lengths) if b])
        return out[1:], cache.records[own.long()], cache.records[batch.ring_pages[1:].flatten().long()]

    clean, poisoned = step(False), step(True)
    assert clean[0].isfinite().all()
    for one, other in zip(clean, poisoned, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
def test_extend_a_poisoned_request_leaves_every_other_bit_alone(poison, form):
    """Two prompts in one step; the first is poisoned in queries, keys and values."""
    config = KVarNConfig.from_preset("kvarn")
    sizes = [200, 150]
    histories = [History(tokens(n, seed=n), pages_of(config)) for n in sizes]

    def step(poisoned: bool):
        ring_size = config.ring_pages(HEAD_DIM, 4)
        cache = poisoned_cache(config, 5 + 2 * ring_size)
        batch = ExtendBatch(
            ring_pages=5 + torch.arange(2 * ring_size, dtype=torch.int32).view(2, ring_size).flip(1),
            prefix_lens=torch.zeros(2, dtype=torch.int32),
            seq_lens=torch.tensor(sizes, dtype=torch.int32),
            qo_indptr=torch.tensor([0, 200, 350], dtype=torch.int32),
            page_table=torch.tensor([[4, 2], [1, 3]], dtype=torch.int32),
            exact_starts=torch.zeros(2, dtype=torch.int32),
            prefix_lens_host=[0, 0],
            seq_lens_host=sizes,
        )
        new = QKV(*(torch.cat([getattr(h, name) for h in histories]) for name in "qkv"))
        if poisoned:
            for x in new:
                x[3, 0, 7] = x[199, 1, 0] = x[150] = poison
        out = run_in(form, new, cache, batch, config)
        return out[200:], cache.records[1], *ring_tokens(cache, batch.ring_pages[1], 0, 150)

    for clean, other in zip(step(False), step(True), strict=True):
        assert torch.equal(clean, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_record_carries_the_header_that_an_empty_page_lacks(dtype):
    """Pages start as zeros; without the header an unwritten page would decode to plausible zeros."""
    config = KVarNConfig.from_preset("kvarn")
    k, v = (torch.randn(PAGE, HEAD_DIM).to(dtype) for _ in range(2))
    record = reference.encode_tile(k, v, config)
    assert record[0] & 0xF == tile.header(dtype == torch.bfloat16) != 0
    assert record[0] & tile.HEADER
    decoded, _ = reference.decode_tile(record, config, HEAD_DIM)
    assert torch.equal(decoded[0], k[0].float())


@pytest.mark.parametrize("form", FORMS)
def test_canonical_decode_gives_a_request_the_same_bits_in_any_company(form):
    """The number of splits followed the batch, so that a neighbour changed the last bits of an answer."""
    config = KVarNConfig.from_preset("kvarn_canonical")
    lengths = [20 * PAGE + 3, 5, 3 * PAGE]
    new, cache, batch, _ = decode_inputs(config, lengths)
    together = run_in(form, new, cache, batch, config)
    for b in range(len(lengths)):
        alone = dataclasses.replace(
            batch,
            **{
                name: getattr(batch, name)[b : b + 1]
                for name in ("ring_pages", "seq_lens", "page_table", "store_pages", "exact_starts")
            },
        )
        one = run_in(form, QKV(*(x[b : b + 1] for x in new)), cache, alone, config)
        assert torch.equal(one[0], together[b])


@pytest.mark.parametrize("step", ["decode", "extend"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_sliding_window_over_records_begins_at_its_own_token(preset, form, step):
    """A window was taken in whole pages: it began up to a page too early or too late."""
    config, window = KVarNConfig.from_preset(preset), 2 * PAGE + 20
    # it begins at the last token of a page, at the first one of the next page, behind that, and amid a page
    lengths = [window + PAGE + over for over in (-1, 0, 1, 60)]
    new, cache, batch, histories = decode_inputs(config, lengths)
    if step == "extend":
        seq_lens = torch.tensor(lengths, dtype=torch.int32)
        batch = ExtendBatch(
            ring_pages=batch.ring_pages,
            prefix_lens=seq_lens - 1,
            seq_lens=seq_lens,
            qo_indptr=torch.arange(len(lengths) + 1, dtype=torch.int32),
            page_table=batch.page_table,
            exact_starts=batch.exact_starts,
            prefix_lens_host=[n - 1 for n in lengths],
            seq_lens_host=lengths,
        )
    attention = attention_with(FORMS[form], config, len(lengths), window=window)
    out = attend(attention, new, cache, batch, window)
    for got, history, n in zip(out, histories, lengths, strict=True):
        expected, *others = (history.output(n - 1, n, 0, window + other)[0] for other in (0, PAGE, -PAGE))
        assert error(got, expected) < 1e-2
        # so that a page more or less could be seen
        assert min(error(other, expected) for other in others) > 0.05
