# SPDX-License-Identifier: Apache-2.0
"""The rotation kernel against the oracle."""

import pytest
import torch
from builders import DEVICE
from kvarn_kernels import reference
from kvarn_kernels.rotate import rotate, rotate_step


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 7, 33])
def test_rotate_matches_the_oracle(tokens, dtype, head_dim):
    x = torch.randn(tokens, 5, head_dim).to(dtype).to(DEVICE)
    out = torch.full((tokens, 5, head_dim), float("nan"), device=DEVICE)
    rotate(x, out)
    # the products are exact, so only the order of at most 256 float32 sums differs
    torch.testing.assert_close(out.cpu(), reference.rotate(x.cpu()), rtol=1e-6, atol=1e-5)


def test_rotate_twice_gives_the_input_back():
    x = torch.randn(4, 2, 128).half().to(DEVICE)
    once, twice = torch.empty(4, 2, 128, device=DEVICE), torch.empty(4, 2, 128, device=DEVICE)
    rotate(x, once)
    rotate(once, twice)
    torch.testing.assert_close(twice, x.float(), rtol=1e-5, atol=1e-5)


def test_rotate_step_reads_strided_views_and_writes_ring_slots():
    qkv = torch.randn(3, 8, 64).half().to(DEVICE)
    q, k, v = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    rotated_q = torch.full((5, 4, 64), float("nan"), device=DEVICE)
    rings = [torch.full((4, 256, 2, 64), float("nan"), dtype=torch.float16, device=DEVICE) for _ in range(2)]
    rows = torch.tensor([3, 1, 0], device=DEVICE)
    seq_lens = torch.tensor([258, 256, 1], dtype=torch.int32, device=DEVICE)
    rotate_step(q, k, v, rotated_q, *rings, rows, seq_lens)
    torch.testing.assert_close(rotated_q[:3].cpu(), reference.rotate(q.cpu()), rtol=1e-6, atol=1e-5)
    assert rotated_q[3:].isnan().all()
    for x, ring in zip((k, v), rings, strict=True):
        expected = reference.rotate(x.cpu()).half()
        for n, (row, slot) in enumerate([(3, 1), (1, 255), (0, 0)]):
            torch.testing.assert_close(ring[row, slot].cpu(), expected[n], rtol=1e-3, atol=1e-5)
        assert ring.isnan().sum() == (4 * 256 - 3) * 2 * 64
