# SPDX-License-Identifier: Apache-2.0
"""The rotation kernel against the oracle."""

import pytest
import torch
from builders import DEVICE
from kvarn_kernels import reference
from kvarn_kernels.batch import QKV
from kvarn_kernels.write.rotate import rotate_chunk, rotate_into


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_rotate_chunk_matches_the_oracle(tokens, dtype, head_dim):
    qkv = torch.randn(tokens, 11, head_dim).to(dtype).to(DEVICE)
    q, k, v = qkv[:, :5], qkv[:, 5:8], qkv[:, 8:]
    rotated_q, *rotated = rotate_chunk(QKV(q, k, v))
    # the products are exact, so only the order of at most 256 float32 sums differs
    torch.testing.assert_close(rotated_q.cpu(), reference.rotate(q.cpu()), rtol=1e-6, atol=1e-5)
    assert rotated_q.is_contiguous()
    for x, got in zip((k, v), rotated, strict=True):
        assert got.is_contiguous() and got.dtype == dtype
        # one rounding to 8 or 11 bits
        torch.testing.assert_close(got.cpu().float(), reference.rotate(x.cpu()), rtol=2**-8, atol=1e-5)


def test_rotate_chunk_leaves_out_a_query_that_is_not_wanted():
    q, k, v = (torch.randn(70, heads, 64).half().to(DEVICE) for heads in (4, 2, 2))
    rotated_q, *rotated = rotate_chunk(QKV(q, k, v), with_q=False)
    assert rotated_q.numel() == 0
    assert all(torch.equal(x, y) for x, y in zip(rotated, rotate_chunk(QKV(q, k, v))[1:], strict=True))


def test_rotate_into_reads_strided_views_and_writes_ring_slots():
    qkv = torch.randn(3, 8, 64).half().to(DEVICE)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    rotated_q = torch.full((5, 4, 64), float("nan"), device=DEVICE)
    rings = [torch.full((4, 256, 2, 64), float("nan"), dtype=torch.float16, device=DEVICE) for _ in range(2)]
    rows = torch.tensor([3, 1, 0], device=DEVICE)
    seq_lens = torch.tensor([258, 256, 1], dtype=torch.int32, device=DEVICE)
    rotate_into(QKV(rotated_q, *rings), QKV(q, k, v), rows, seq_lens)
    torch.testing.assert_close(rotated_q[:3].cpu(), reference.rotate(q.cpu()), rtol=1e-6, atol=1e-5)
    assert rotated_q[3:].isnan().all()
    for x, ring in zip((k, v), rings, strict=True):
        expected = reference.rotate(x.cpu()).half()
        for n, (row, slot) in enumerate([(3, 1), (1, 255), (0, 0)]):
            torch.testing.assert_close(ring[row, slot].cpu(), expected[n], rtol=1e-3, atol=1e-5)
        assert ring.isnan().sum() == (4 * 256 - 3) * 2 * 64
