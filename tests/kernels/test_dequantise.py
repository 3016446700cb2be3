# SPDX-License-Identifier: Apache-2.0
"""The workspace pages against the oracle's decoded records and the ring, both rotated back.

By the Triton kernel and by CUDA C++, which runs as C++ where there is no GPU.
"""

from functools import cache, partial

import cuda_as_cpp
import pytest
import torch
from builders import DEVICE, PAGE, RowCache, make_cache, make_request, prefill, relative_rms, write_ring
from kvarn_kernels import reference, torch_form
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import dequantise_cuda
from kvarn_kernels.dense.dequantise import PageList, dequantise
from kvarn_kernels.write import chunk_cuda, encode_cuda

KVARN = KVarNConfig.from_preset("kvarn")
# one rounding to the model's dtype (2^-12.6 and 2^-9.6 of a value on average), and fp16 operands (2^-12)
BOUND = {torch.float16: 4e-4, torch.bfloat16: 2.5e-3}


def batch_of(request, cache: RowCache, prefix: int, seq: int) -> ExtendBatch:
    def int32(x: int) -> torch.Tensor:
        return torch.tensor([x], dtype=torch.int32, device=DEVICE)

    return ExtendBatch(
        ring_pages=cache.ring_pages(request.row),
        prefix_lens=int32(prefix),
        seq_lens=int32(seq),
        qo_indptr=torch.tensor([0, seq - prefix], dtype=torch.int32, device=DEVICE),
        page_table=torch.tensor([request.pages], dtype=torch.int32, device=DEVICE),
        exact_starts=int32(request.exact_start),
        prefix_lens_host=[prefix],
        seq_lens_host=[seq],
    )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return what stands in for the compiled kernels on a CPU."""
    folder = tmp_path_factory.mktemp("dequantise")

    @cache
    def of(*form):
        # the last one is the device
        defines = dequantise_cuda.constants(*form[:-1])
        threads = dequantise_cuda.threads(form[1])
        return cuda_as_cpp.build(folder, dequantise_cuda.SOURCE, "kvarn_dequantise", defines, threads)

    return of


@pytest.fixture
def by_cuda(compiled, monkeypatch):
    """Return who writes pages out by CUDA C++."""
    if DEVICE.type != "cuda":
        monkeypatch.setattr(dequantise_cuda, "_compiled", compiled)
        monkeypatch.setattr(dequantise_cuda, "current_stream", lambda device: 0)
    return dequantise_cuda.dequantise


@pytest.fixture(params=["triton", "cuda"])
def write(request, by_cuda):
    """Return who writes pages out."""
    return dequantise if request.param == "triton" else by_cuda


def filled(write, cache, request, config, prefix: int, numbers: list[int], num_exact: int):
    """Return the workspace (keys, values), each [M, Hk, G, D], one page of NaN beyond what is asked for.

    The new tokens are those of the request after the prefix; the rows after them are NaN.
    """
    shape = (len(numbers) + 1, cache.num_kv_heads, PAGE, cache.head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=request.k.dtype, device=DEVICE) for _ in range(2))
    pages = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
    batch = batch_of(request, cache, prefix, len(request.k))
    new = QKV(
        *(torch.cat([x[prefix:], torch.full_like(x[:PAGE], float("nan"))]) for x in (request.q, request.k, request.v))
    )
    write((keys, values), new, PageList(torch.zeros_like(pages), pages, num_exact), cache, batch, config)
    assert keys[-1].isnan().all() and values[-1].isnan().all()
    return keys[:-1], values[:-1]


@pytest.mark.parametrize(
    ("preset", "head_dim", "dtype"),
    [
        ("kvarn", 128, torch.bfloat16),
        ("kvarn", 64, torch.float16),
        ("kvarn", 256, torch.bfloat16),
        ("kvarn_k2v2_g128", 64, torch.bfloat16),
        ("kvarn_k2v2_g128", 128, torch.float16),
        ("kvarn_k4v3_g128", 64, torch.float16),
        ("kvarn_k4v3_g128", 128, torch.bfloat16),
        ("kvarn_k3v2_g128", 64, torch.bfloat16),
        ("kvarn_k3v2_g128", 128, torch.float16),
        ("kvarn_k3v2_g128", 256, torch.float16),
        ("kvarn_k4v4_g128", 128, torch.bfloat16),
        ("kvarn_k4v4_g128", 256, torch.float16),
    ],
)
def test_dequantise_matches_the_decoded_records(write, preset, head_dim, dtype):
    config = KVarNConfig.from_preset(preset)
    request = make_request(3 * PAGE + 5, (2, 2), head_dim, dtype)
    cache = make_cache(config, 2, head_dim, dtype, pages=8, rows=3)
    prefill(torch_form.attend_extend, request, [3 * PAGE], cache, config)
    cache.exact[cache.rings[1].long()] = float("nan")
    got = filled(write, cache, request, config, 3 * PAGE, [2, 0, 1, 0], num_exact=0)
    records = cache.records[[request.pages[n] for n in (2, 0, 1, 0)]]
    for x, decoded in zip(got, reference.decode_tile(records, config, head_dim), strict=True):
        expected = reference.rotate(decoded)
        assert relative_rms(x, expected) < BOUND[dtype]
        # the sums of the exact rows are those of float32: at most the last bit of the model's dtype differs
        torch.testing.assert_close(
            x[:, :, 0], expected[:, :, 0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5
        )


@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.float16, 64), (torch.bfloat16, 128)])
def test_dequantise_takes_exact_pages_from_the_ring_and_then_from_the_chunk(write, dtype, head_dim):
    request = make_request(4 * PAGE + 7, (2, 1), head_dim, dtype, row=2)
    cache = make_cache(KVARN, 1, head_dim, dtype, pages=8, rows=3)
    prefix = 2 * PAGE + 44
    prefill(torch_form.attend_extend, request, [prefix], cache, KVARN)
    cache.records[request.pages[1]] = 0xFF
    keys, values = filled(write, cache, request, KVARN, prefix, [1, 2, 3, 4, 0], num_exact=4)
    for x, exact in ((keys, request.k), (values, request.v)):
        # rotated, rounded, rotated back and rounded again
        assert relative_rms(x[0, 0], exact[PAGE : 2 * PAGE, 0]) < 2 * BOUND[dtype]
        assert relative_rms(x[1, 0, :44], exact[2 * PAGE : prefix, 0]) < 2 * BOUND[dtype]
        assert torch.equal(x[1:4, 0].flatten(0, 1)[44 : len(exact) - 2 * PAGE], exact[prefix:, 0])
        assert x[3, 0, 7:].eq(0).all() and x[4].isfinite().all()


def test_dequantise_takes_pages_of_a_prefix_hit_from_their_records(write):
    request = make_request(2 * PAGE + 45, (2, 1), 64, torch.float16, row=2)
    cache = make_cache(KVARN, 1, 64, torch.float16, pages=8, rows=3)
    prefill(torch_form.attend_extend, request, [2 * PAGE + 44], cache, KVARN)
    request.exact_start = 2 * PAGE
    # the page of the hit, in the places of the ring that the new tokens left
    poison = torch.full((PAGE, 1, 64), float("nan"), device=DEVICE)
    write_ring(cache, 2, torch.arange(PAGE, 2 * PAGE), poison, poison)
    windows = filled(write, cache, request, KVARN, 2 * PAGE + 44, [1, 2], num_exact=2)
    records = filled(write, cache, request, KVARN, 2 * PAGE + 44, [1], num_exact=0)
    for window, record in zip(windows, records, strict=True):
        assert torch.equal(window[0], record[0]) and window.isfinite().all()


def test_dequantise_beside_the_encoder_waits_for_the_pages_that_it_fills(compiled, by_cuda):
    dtype, head_dim, prefix = torch.bfloat16, 128, PAGE + 44
    request = make_request(3 * PAGE + 9, (2, 2), head_dim, dtype)
    cache, whole = (make_cache(KVARN, 2, head_dim, dtype, pages=8, rows=3) for _ in range(2))
    prefill(torch_form.attend_extend, request, [prefix], cache, KVARN)
    prefill(torch_form.attend_extend, request, [prefix, len(request.k) - prefix], whole, KVARN)
    ids = request.pages[1:3]
    # an exact page, a page that the step fills, and an older one
    listed = {"prefix": prefix, "numbers": [2, 1, 0], "num_exact": 1}
    cache.records[ids] = whole.records[ids]
    expected = filled(by_cuda, cache, request, KVARN, **listed)
    early, after = partial(by_cuda, early_start=True), cache.records.clone()
    new = QKV(*(x[prefix:] for x in (request.q, request.k, request.v)))
    for _ in range(20 if DEVICE.type == "cuda" else 1):
        cache.records[ids] = 0xFF
        if DEVICE.type == "cuda":
            step = batch_of(request, cache, prefix, len(request.k))
            encode_cuda.encode_from_chunk(chunk_cuda.rotate_chunk(new), cache, step, KVARN)
            got = filled(early, cache, request, KVARN, **listed)
        else:
            kernel = compiled(KVARN, head_dim, 2, True, cache.rings.shape[1], 0)
            with cuda_as_cpp.start_beside(kernel, cache.records, after):
                got = filled(early, cache, request, KVARN, **listed)
        assert all(map(torch.equal, got, expected))
        # what is queued next finds all that the encoder wrote
        assert torch.equal(cache.records[ids], after[ids])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantise_stays_finite_for_the_largest_keys_and_values(write, dtype):
    # 2^21 is in the range that a record holds; in fp16 rotating back meets the end of the range
    largest = 60000.0 if dtype == torch.float16 else 2.0**21
    request = make_request(PAGE, (1, 1), 128, dtype)
    for x in (request.k, request.v):
        x.copy_(torch.where(x > 0, 1.0, -1.0) * (largest / 128**0.5))
        x[:, :, 0] = largest
        x[0] = largest / 16
    cache = make_cache(KVARN, 1, 128, dtype, pages=4, rows=3)
    prefill(torch_form.attend_extend, request, [PAGE], cache, KVARN)
    for x, exact in zip(filled(write, cache, request, KVARN, PAGE, [0], 0), (request.k, request.v), strict=True):
        assert x.isfinite().all()
        assert relative_rms(x[0, 0, 0], exact[0, 0]) < 2 * BOUND[dtype]


def test_dequantise_finds_the_requests_of_a_batch_and_tokens_that_do_not_follow_each_other(write):
    dtype, head_dim = torch.bfloat16, 64
    requests = [
        make_request(n, (2, 2), head_dim, dtype, row=row, first_page=first, seed=row)
        for row, n, first in ((1, 2 * PAGE + 30, 1), (2, 3 * PAGE + 9, 5))
    ]
    cache = make_cache(KVARN, 2, head_dim, dtype, pages=10, rows=3)
    prefixes = [PAGE + 3, 2 * PAGE + 40]
    for request, prefix in zip(requests, prefixes, strict=True):
        prefill(torch_form.attend_extend, request, [prefix], cache, KVARN)
    batches = [batch_of(*each, len(each[0].k)) for each in zip(requests, [cache] * 2, prefixes, strict=True)]
    tables = torch.zeros(2, 5, dtype=torch.int32, device=DEVICE)
    for row, batch in enumerate(batches):
        tables[row, : batch.page_table.shape[1]] = batch.page_table[0]
    new_tokens = [len(request.k) - prefix for request, prefix in zip(requests, prefixes, strict=True)]
    batch = ExtendBatch(
        **{
            name: torch.cat([getattr(each, name) for each in batches])
            for name in ("ring_pages", "prefix_lens", "seq_lens", "exact_starts")
        },
        qo_indptr=torch.tensor([0, *torch.tensor(new_tokens).cumsum(0)], dtype=torch.int32, device=DEVICE),
        # rows of a wider table
        page_table=tables[:, :4],
        prefix_lens_host=prefixes,
        seq_lens_host=[len(request.k) for request in requests],
    )
    # keys and values of a token beside other things, at distances of their own
    new = []
    for name, pad, gap in (("k", 3, 0), ("v", 5, 2)):
        rows = torch.cat([getattr(request, name)[n:] for request, n in zip(requests, prefixes, strict=True)])
        wide = torch.full((len(rows), 2 + pad, head_dim * (1 + gap)), float("nan"), dtype=dtype, device=DEVICE)
        wide[:, 1:3, :head_dim] = rows
        new.append(wide[:, 1:3, :head_dim])
    keys, values = (torch.full((4, 2, PAGE, head_dim), float("nan"), dtype=dtype, device=DEVICE) for _ in range(2))
    # page 2 of each is new in part, page 1 of the second is in its ring, page 0 of it is a record
    listed = [(0, 2), (1, 2), (1, 1), (1, 0)]
    pages = PageList(*(torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in zip(*listed, strict=True)), 3)
    write((keys, values), QKV(new[0], *new), pages, cache, batch, KVARN)
    for x, name in ((keys, "k"), (values, "v")):
        first, second = (getattr(request, name).transpose(0, 1) for request in requests)
        assert torch.equal(x[0, :, :30], first[:, 2 * PAGE :]) and x[0, :, 30:].eq(0).all()
        assert relative_rms(x[1, :, :40], second[:, 2 * PAGE : 2 * PAGE + 40]) < 2 * BOUND[dtype]
        assert torch.equal(x[1, :, 40:], second[:, 2 * PAGE + 40 : 3 * PAGE])
        assert relative_rms(x[2], second[:, PAGE : 2 * PAGE]) < 2 * BOUND[dtype]
        # codes of 4 and of 2 bits
        assert relative_rms(x[3], second[:, :PAGE]) < 0.5
        assert torch.allclose(x[3, :, 0], second[:, 0], rtol=2e-2, atol=2e-2)
