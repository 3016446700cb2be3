# SPDX-License-Identifier: Apache-2.0
"""The rotation kernels against the oracle; CUDA C++ runs as C++ where there is no GPU."""

from functools import cache

import cuda_as_cpp
import pytest
import torch
from builders import DEVICE, clone, int32, make_cache, read_ring, write_ring
from kvarn_kernels import reference
from kvarn_kernels.batch import QKV, DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.write import chunk_cuda, rotate
from kvarn_kernels.write.rotate import rotate_to_rings


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Return what stands in for the compiled kernels on a CPU."""
    folder = tmp_path_factory.mktemp("rotate")

    @cache
    def of(*form):
        # the last one is the device
        defines = chunk_cuda.rotate_constants(*form[:-1])
        return cuda_as_cpp.build(folder, chunk_cuda.ROTATE, "kvarn_rotate_chunk", defines, 32 * chunk_cuda.WARPS)

    return of


@pytest.fixture(params=["triton", "cuda"])
def rotate_chunk(request, compiled, monkeypatch):
    """Return who rotates the tokens of a chunk."""
    if request.param == "triton":
        return rotate.rotate_chunk
    if DEVICE.type != "cuda":
        monkeypatch.setattr(chunk_cuda, "_rotate", compiled)
        monkeypatch.setattr(chunk_cuda, "current_stream", lambda device: 0)
    return chunk_cuda.rotate_chunk


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_rotate_chunk_matches_the_oracle(rotate_chunk, tokens, dtype, head_dim):
    qk, v = (torch.randn(tokens, heads, head_dim).to(dtype).to(DEVICE) for heads in (8, 6))
    q, k, v = qk[:, :5], qk[:, 5:], v[:, ::2]
    rotated_q, *rotated = rotate_chunk(QKV(q, k, v))
    # the products are exact, so only the order of at most 256 float32 sums differs
    torch.testing.assert_close(rotated_q.cpu(), reference.rotate(q.cpu()), rtol=1e-6, atol=1e-5)
    assert rotated_q.is_contiguous()
    for x, got in zip((k, v), rotated, strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        # one rounding to 8 or 11 bits
        torch.testing.assert_close(got.cpu().float(), reference.rotate(x.cpu()), rtol=2**-8, atol=1e-5)


def test_rotate_chunk_leaves_out_a_query_that_is_not_wanted(rotate_chunk):
    q, k, v = (torch.randn(70, heads, 64).half().to(DEVICE) for heads in (4, 2, 2))
    rotated_q, *rotated = rotate_chunk(QKV(q, k, v), with_q=False)
    assert rotated_q.numel() == 0
    assert all(torch.equal(x, y) for x, y in zip(rotated, rotate_chunk(QKV(q, k, v))[1:], strict=True))


def test_rotate_chunk_writes_what_an_earlier_call_returned(rotate_chunk):
    def chunk() -> QKV:
        return QKV(*(torch.randn(9, heads, 64, dtype=torch.bfloat16, device=DEVICE) for heads in (4, 2, 2)))

    first, second = chunk(), chunk()
    out = rotate_chunk(first)
    expected = rotate_chunk(second)
    assert rotate_chunk(second, out=out) is out
    assert all(map(torch.equal, out, expected))


def test_rotate_to_rings_reads_strided_views_and_writes_places_of_rings():
    config = KVarNConfig.from_preset("kvarn")
    cache = make_cache(config, 2, 64, torch.float16, pages=3, rows=4)
    qkv = torch.randn(3, 8, 64).half().to(DEVICE)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    rotated_q = torch.full((5, 4, 64), float("nan"), device=DEVICE)
    # the first tokens of a ring's second round, and a padded row
    rows, seq_lens = (3, 1, 0), (cache.ring_size + 2, 256, 1)
    batch = DecodeBatch(cache.ring_pages(*rows), int32(*seq_lens), *[int32(0)] * 3)
    before = clone(cache)
    rotate_to_rings(QKV(q, k, v), rotated_q, cache, batch, config)
    torch.testing.assert_close(rotated_q[:3].cpu(), reference.rotate(q.cpu()), rtol=1e-6, atol=1e-5)
    assert rotated_q[3:].isnan().all()
    for n, (row, seq_len) in enumerate(zip(rows, seq_lens, strict=True)):
        stored = read_ring(cache, row, torch.tensor([seq_len - 1]))
        for x, got in zip((k, v), stored, strict=True):
            torch.testing.assert_close(got[0].cpu(), reference.rotate(x[n].cpu()).half(), rtol=1e-3, atol=1e-5)
        write_ring(before, row, torch.tensor([seq_len - 1]), *stored)
    assert torch.equal(cache.records, before.records), "written elsewhere"
