# SPDX-License-Identifier: Apache-2.0
"""The encoders against the oracle: the same bytes, whatever the source of the tokens."""

import pytest
import torch
from builders import DEVICE, PAGE, RowCache, encoded, fill_rings, int32, make_cache, random_rows, read_ring, write_ring
from kvarn_kernels import reference
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.write import encode, encode_cuda

PRESETS = ["kvarn", "kvarn_canonical", "kvarn_k4v3_g128", "kvarn_k4v4_g128", "kvarn_k3v2_g128", "kvarn_k2v2_g128"]
KV_HEADS = 2


@pytest.fixture(params=[encode, encode_cuda] if DEVICE.type == "cuda" else [encode], ids=lambda m: m.__name__)
def encoder(request):
    """The module whose encoder is tested: both forms where a GPU runs them."""
    return request.param


FIRST_PAGE = torch.arange(PAGE)


def filled_cache(config, head_dim, dtype, scale=1.0) -> RowCache:
    cache = make_cache(config, KV_HEADS, head_dim, dtype, pages=6, rows=3)
    fill_rings(cache, config, scale)
    return cache


def decode_batch(ring_pages: torch.Tensor, seq_lens: torch.Tensor, store_pages: torch.Tensor) -> DecodeBatch:
    """Return a step whose page table and exact starts are not read."""
    return DecodeBatch(ring_pages, seq_lens, store_pages[:, None], store_pages, torch.zeros_like(seq_lens))


def encode_row_1(encoder, cache: RowCache, config) -> None:
    """Encode the first page of request row 1 into page 2."""
    encoder.encode_from_ring(cache, decode_batch(cache.ring_pages(1), int32(PAGE), int32(2)), config)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_encode_from_ring_gives_the_bytes_of_the_oracle(encoder, preset, dtype, head_dim):
    config = KVarNConfig.from_preset(preset)
    cache = filled_cache(config, head_dim, dtype)
    before = cache.records.clone()
    # request 0 fills its second page, request 1 is in the middle of one, request 2 is a padded row
    batch = decode_batch(cache.ring_pages(2, 1, 0), int32(2 * PAGE, 100, 1), int32(3, 4, 0))
    encoder.encode_from_ring(cache, batch, config)
    before[3] = encoded(*read_ring(cache, 2, torch.arange(PAGE, 2 * PAGE)), config)
    assert torch.equal(cache.records, before)


@pytest.mark.parametrize("page", range(2, 7))
def test_encode_from_a_ring_that_was_written_over_gives_the_bytes_of_the_oracle(encoder, page):
    config = KVarNConfig.from_preset("kvarn")
    cache = make_cache(config, KV_HEADS, 64, torch.float16, pages=4, rows=3)
    k, v = (random_rows((PAGE, KV_HEADS, 64), torch.float16) for _ in "kv")
    # the rest of the ring is NaN
    write_ring(cache, 2, torch.arange(page * PAGE, (page + 1) * PAGE), k, v)
    before = cache.records.clone()
    batch = decode_batch(cache.ring_pages(2), int32((page + 1) * PAGE), int32(1))
    encoder.encode_from_ring(cache, batch, config)
    before[1] = encoded(k, v, config)
    assert torch.equal(cache.records, before)


def test_encode_from_ring_finds_full_pages_anywhere_in_a_large_batch(encoder):
    config, size = KVarNConfig.from_preset("kvarn"), 100
    cache = make_cache(config, KV_HEADS, 64, torch.float16, pages=size, rows=size + 1)
    # a program walks over every 32nd request: the first, second and last of different programs fill a page
    full = (3, 40, 99)
    for b in full:
        tokens = (random_rows((PAGE, KV_HEADS, 64), torch.float16) for _ in "kv")
        write_ring(cache, 1 + b, FIRST_PAGE, *tokens)
    before = cache.records.clone()
    seq_lens = int32(*(PAGE if b in full else 1 + b for b in range(size)))
    pages = torch.arange(size, device=DEVICE).flip(0)
    rings = cache.ring_pages(*range(1, size + 1))
    encoder.encode_from_ring(cache, decode_batch(rings, seq_lens, pages.int()), config)
    for b in full:
        record = encoded(*read_ring(cache, 1 + b, FIRST_PAGE), config)
        assert torch.equal(cache.records[pages[b]], record)
        before[pages[b]] = record
    assert torch.equal(cache.records, before)


@pytest.mark.parametrize("scale", [1e-7, 1e5])
def test_encode_keeps_its_accuracy_at_any_magnitude(encoder, scale):
    config = KVarNConfig.from_preset("kvarn")
    cache = filled_cache(config, 64, torch.bfloat16, scale)
    encode_row_1(encoder, cache, config)
    k, v = (x.transpose(0, 1) for x in read_ring(cache, 1, FIRST_PAGE))
    assert torch.equal(cache.records[2], reference.encode_tile(k, v, config))
    for got, exact, bound in zip(
        reference.decode_tile(cache.records[2], config, 64), (k, v), (0.15, 0.45), strict=True
    ):
        # 4 bits of a Gaussian: 0.10; 2 bits: 0.35
        assert ((got - exact.float()).norm() / exact.float().norm()).item() < bound


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_encode_of_poisoned_rows_stays_finite(encoder, poison):
    config = KVarNConfig.from_preset("kvarn")
    cache = filled_cache(config, 64, torch.float16)
    k, v = read_ring(cache, 1, FIRST_PAGE)
    k[5, 0, 3], v[7, 0, 3] = poison, poison
    write_ring(cache, 1, FIRST_PAGE, k, v)
    encode_row_1(encoder, cache, config)
    for side in reference.decode_tile(cache.records[2], config, 64):
        assert side.isfinite().all()


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_k2v2_g128", "kvarn_canonical"])
def test_encode_of_constant_and_zero_rows_is_exact(encoder, preset):
    config = KVarNConfig.from_preset(preset)
    cache = filled_cache(config, 64, torch.float16)
    k = torch.zeros(PAGE, KV_HEADS, 64, device=DEVICE)
    v = k.clone()
    k[:, 1] = 3.0
    write_ring(cache, 1, FIRST_PAGE, k, v)
    encode_row_1(encoder, cache, config)
    k, v = reference.decode_tile(cache.records[2], config, 64)
    assert torch.equal(k[0], torch.zeros_like(k[0])) and torch.equal(k[1], torch.full_like(k[1], 3.0))
    assert torch.equal(v, torch.zeros_like(v))


@pytest.mark.parametrize(("prefix", "seq"), [(0, 300), (100, 260), (127, 129), (128, 256), (250, 250 + 300), (5, 90)])
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_k4v4_g128_canonical"])
def test_encode_from_chunk_joins_ring_and_chunk(encoder, preset, prefix, seq):
    config = KVarNConfig.from_preset(preset)
    cache = filled_cache(config, 64, torch.float16)
    history = random_rows((seq, KV_HEADS, 64), torch.float16), random_rows((seq, KV_HEADS, 64), torch.float16)
    cached = torch.arange(max(0, prefix - config.ring_len), prefix)
    write_ring(cache, 2, cached, *(x[cached] for x in history))
    before = cache.records.clone()
    # a first request of three tokens, so that the chunk does not begin at 0
    chunk = [torch.cat([x[:3], x[prefix:]]).contiguous() for x in history]
    batch = ExtendBatch(
        ring_pages=cache.ring_pages(1, 2),
        prefix_lens=int32(10, prefix),
        seq_lens=int32(13, seq),
        qo_indptr=int32(0, 3, 3 + seq - prefix),
        page_table=torch.tensor([[5] * 5, [4, 2, 1, 3, 0]], dtype=torch.int32, device=DEVICE),
        exact_starts=int32(0, 0),
        prefix_lens_host=[10, prefix],
        seq_lens_host=[13, seq],
    )
    encoder.encode_from_chunk(QKV(torch.empty(0), *chunk), cache, batch, config)
    for page in range(prefix // PAGE, seq // PAGE):
        tokens = slice(page * PAGE, (page + 1) * PAGE)
        before[[4, 2, 1, 3, 0][page]] = encoded(history[0][tokens], history[1][tokens], config)
    assert torch.equal(cache.records, before)
