# SPDX-License-Identifier: Apache-2.0
"""Torch in the place of SGLang's kernels for Mamba-2 gives what the kernels give, in Triton's interpreter."""

from __future__ import annotations

import contextlib

import mamba2_on_cpu
import pytest
import torch
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

CHUNK, HEADS, P, GROUPS, N = 32, 4, 16, 2, 16
pytestmark = pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU")


@pytest.fixture
def interpreted(monkeypatch):
    """Let the kernels' launchers take tensors of the CPU, and the first block sizes instead of the fastest."""
    monkeypatch.setattr(torch.cpu, "device", lambda index: contextlib.nullcontext(), raising=False)
    for name in ("ssd_bmm", "ssd_chunk_scan", "ssd_chunk_state", "ssd_state_passing"):
        module = compat.resolve(f"sglang.kernels.ops.mamba.triton_ops.{name}")
        for kernel in vars(module).values():
            if hasattr(kernel, "configs"):
                monkeypatch.setattr(kernel, "configs", kernel.configs[:1])


@pytest.mark.parametrize("lengths", [[70], [20, 65, 1, 31], [32, 32, 40]], ids=str)
@pytest.mark.parametrize("with_states", [False, True], ids=["fresh", "continued"])
def test_scan_gives_the_outputs_and_every_state_of_the_kernel(interpreted, lengths, with_states):
    kernel = compat.resolve("sglang.kernels.ops.mamba.triton_ops.ssd_combined.mamba_chunk_scan_combined")
    metadata = compat.resolve("sglang.srt.layers.attention.mamba.mamba2_metadata.Mamba2Metadata")
    tokens, starts = sum(lengths), torch.tensor([0, *lengths]).cumsum(0).int()
    x, b, c = torch.randn(1, tokens, HEADS, P), *torch.randn(2, 1, tokens, GROUPS, N)
    a, d, bias = -torch.rand(HEADS) - 0.5, torch.randn(HEADS), torch.randn(HEADS) - 3
    dt = torch.randn(1, tokens, HEADS)
    seq_idx = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).int()[None]
    cut = metadata._query_start_loc_to_chunk_indices_offsets(starts, CHUNK, tokens)
    options = {
        "D": d,
        "dt_bias": bias,
        "cu_seqlens": starts,
        "initial_states": torch.randn(len(lengths), HEADS, P, N) if with_states else None,
        "state_dtype": torch.float32,
        "seq_idx": seq_idx,
        "chunk_indices": cut[0] if with_states else None,
        "chunk_offsets": cut[1] if with_states else None,
        "dt_softplus": True,
        "return_varlen_states": True,
    }
    if compat.saves_states_at_page_ends():
        # the last whole chunk of each request, from its first token on
        tracked = [i for i, length in enumerate(lengths) if length >= CHUNK]
        ends = [int(starts[i]) + lengths[i] // CHUNK * CHUNK for i in tracked]
        options |= {"return_track_states": True, "track_seq_idx": torch.tensor(tracked)}
        options |= {"track_end_locs": torch.tensor(ends)}
    else:
        options |= {"return_intermediate_states": True}
    found = []
    for function in (kernel, mamba2_on_cpu.scan):
        out = torch.empty_like(x)
        found.append((out, *function(x, dt, a, b, c, CHUNK, out=out, **options)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_advance_gives_the_output_and_the_state_of_the_kernel(interpreted):
    kernel = compat.resolve("sglang.kernels.ops.mamba.triton_ops.mamba_ssm.selective_state_update")
    x, dt = torch.randn(3, HEADS, P), torch.randn(3, HEADS, 1).expand(-1, -1, P)
    b, c, slots = torch.randn(3, GROUPS, N), torch.randn(3, GROUPS, N), torch.tensor([4, 0, 2], dtype=torch.int32)
    a = (-torch.rand(HEADS) - 0.5)[:, None, None].expand(-1, P, N)
    d, bias = (torch.randn(HEADS)[:, None].expand(-1, P) for _ in range(2))
    before, found = torch.randn(6, HEADS, P, N), []
    for function in (kernel, mamba2_on_cpu.advance):
        states, out = before.clone(), torch.empty_like(x)
        function(
            states, x, dt, a, b, c, d, z=None, dt_bias=bias, dt_softplus=True, state_batch_indices=slots, out=out
        )
        found.append((states, out))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
