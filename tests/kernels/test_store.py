# SPDX-License-Identifier: Apache-2.0
"""Which new tokens of a chunk its ring gets, and where; CUDA C++ runs as C++ where there is no GPU."""

import cuda_as_cpp
import pytest
import torch
from builders import DEVICE, int32, make_cache, read_ring
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.write import chunk_cuda, store


@pytest.fixture(params=["triton", "cuda"])
def store_chunk(request, tmp_path, monkeypatch):
    """Return who stores the tokens of a chunk."""
    if request.param == "triton":
        return store.store_chunk

    def compiled(*form):
        # the last one is the device
        defines = chunk_cuda.store_constants(*form[:-1])
        return cuda_as_cpp.build(tmp_path, chunk_cuda.STORE, "kvarn_store_chunk", defines, 32 * chunk_cuda.WARPS)

    if DEVICE.type != "cuda":
        monkeypatch.setattr(chunk_cuda, "_store", compiled)
        monkeypatch.setattr(chunk_cuda, "current_stream", lambda device: 0)
    return chunk_cuda.store_chunk


@pytest.mark.parametrize(
    ("preset", "head_dim", "dtype"),
    [("kvarn", 64, torch.float16), ("kvarn_canonical", 128, torch.bfloat16), ("kvarn_k4v4_g128", 256, torch.bfloat16)],
)
def test_a_ring_gets_the_newest_tokens_of_its_chunk_and_nothing_else_changes(store_chunk, preset, head_dim, dtype):
    config = KVarNConfig.from_preset(preset)
    cache = make_cache(config, 2, head_dim, dtype, pages=2, rows=4)
    length = config.ring_pages(head_dim, dtype.itemsize) * config.exact_tokens(head_dim, dtype.itemsize)
    cache.exact.fill_(float("nan"))
    # rows 2 and 1: a turn behind others, a chunk longer than its ring
    rows, prefixes, new = [2, 1], [37, 5], [9, length + 70]
    tokens = [QKV(*(torch.randn(n, 2, head_dim).to(dtype).to(DEVICE) for _ in range(3))) for n in new]
    seqs = [prefix + n for prefix, n in zip(prefixes, new, strict=True)]
    batch = ExtendBatch(
        ring_pages=torch.cat([cache.ring_pages(row) for row in rows]),
        prefix_lens=int32(*prefixes),
        seq_lens=int32(*seqs),
        qo_indptr=int32(0, new[0], sum(new)),
        page_table=torch.zeros(2, 8, dtype=torch.int32, device=DEVICE),
        exact_starts=int32(0, 0),
        prefix_lens_host=prefixes,
        seq_lens_host=seqs,
    )
    before = cache.exact.clone()
    store_chunk(QKV(*(torch.cat(each) for each in zip(*tokens, strict=True))), cache, batch, config)
    for row, own, seq, n in zip(rows, tokens, seqs, new, strict=True):
        kept = min(n, length)
        k, v = read_ring(cache, row, torch.arange(seq - kept, seq))
        assert torch.equal(k, own.k[n - kept :]) and torch.equal(v, own.v[n - kept :])
    # 2 sides of 2 heads
    written = 2 * 2 * head_dim * (new[0] + length)
    assert before.isnan().sum() - cache.exact.isnan().sum() == written
