# SPDX-License-Identifier: Apache-2.0
"""Torch in the place of SGLang's kernels for states gives what the kernels give, in Triton's interpreter."""

from __future__ import annotations

import contextlib

import gdn_on_cpu
import mamba2_on_cpu
import pytest
import states_on_cpu
import torch
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

CHUNK, HEADS, P, GROUPS, N = 32, 4, 16, 2, 16
REQUESTS, DRAFTS, SLOTS = 3, 4, torch.tensor([4, 0, 2], dtype=torch.int32)
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


@pytest.mark.parametrize("with_drafts", [False, True], ids=["token", "drafts"])
def test_convolution_gives_the_output_and_every_state_of_the_kernel(interpreted, with_drafts):
    kernel = compat.resolve("sglang.kernels.ops.mamba.causal_conv1d_triton.causal_conv1d_update")
    channels, width, before = 24, 4, torch.randn(6, 24, 3)
    weight, bias = torch.randn(channels, width), torch.randn(channels)
    # as they come out of a projection
    x = torch.randn(REQUESTS, DRAFTS, channels).transpose(1, 2)
    found = []
    for function in (kernel, states_on_cpu.convolve_new):
        states, options = before.clone(), {"conv_state_indices": SLOTS}
        # as SGLang keeps them for drafts: those of a request overlap
        kept = torch.zeros(REQUESTS, channels, DRAFTS + width - 2)
        windows = kept.unfold(-1, width - 1, 1).transpose(1, 2)
        if with_drafts:
            options |= {"intermediate_conv_window": windows, "intermediate_state_indices": torch.arange(3).int()}
        out = function(x if with_drafts else x[..., 0], states, weight, bias, "silu", **options)
        found.append((out, states, kept))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5, check_stride=True)


def test_verified_drafts_of_gated_delta_nets_have_the_outputs_and_states_of_the_kernel(interpreted):
    kernel = compat.resolve("sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel")
    tokens, heads = REQUESTS * DRAFTS, 2
    q, k = torch.randn(2, 1, tokens, heads, 32)
    v, a, b = torch.randn(1, tokens, HEADS, P), *torch.randn(2, tokens, HEADS)
    states = torch.randn(6, HEADS, P, 32)
    found = []
    for function in (kernel.target_verify, gdn_on_cpu.verify):
        read, after = states.clone(), torch.zeros(REQUESTS, DRAFTS, HEADS, P, 32)
        out = function(
            None,
            A_log=torch.linspace(-1, 1, HEADS),
            dt_bias=torch.linspace(-3, 0, HEADS),
            q=q,
            k=k,
            v=v,
            a=a,
            b=b,
            ssm_states=read,
            cache_indices=SLOTS,
            query_start_loc=torch.arange(0, tokens + 1, DRAFTS).int(),
            intermediate_states_buffer=after,
            intermediate_state_indices=torch.arange(REQUESTS).int(),
            cache_steps=DRAFTS,
            retrieve_parent_token=None,
        )
        assert torch.equal(read, states)
        found.append((out, after))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_committed_states_are_those_of_the_kernels(interpreted, monkeypatch):
    module = compat.resolve("sglang.kernels.ops.mamba.mamba_state_scatter_triton")
    # they ask for tensors of a GPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    before, steps = torch.randn(2, 6, 8, 3), torch.tensor([1, -1, 3])
    drafted = torch.randn(2, REQUESTS, DRAFTS, 8, 3)
    windows = torch.randn(2, REQUESTS, 8, DRAFTS + 2).unfold(-1, 3, 1).transpose(2, 3)
    for source, name in (
        (drafted, "fused_mamba_state_scatter_with_mask"),
        (windows, "fused_conv_window_scatter_with_mask"),
    ):
        found = []
        for function in (getattr(module, name), states_on_cpu.commit):
            states = before.clone()
            function(states, source, SLOTS, steps)
            found.append(states)
        assert torch.equal(*found)


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


@pytest.mark.parametrize("with_drafts", [False, True], ids=["token", "drafts"])
def test_advance_gives_the_output_and_every_state_of_the_kernel(interpreted, with_drafts):
    kernel = compat.resolve("sglang.kernels.ops.mamba.triton_ops.mamba_ssm.selective_state_update")
    size = (REQUESTS, DRAFTS) if with_drafts else (REQUESTS,)
    x, dt = torch.randn(*size, HEADS, P), torch.randn(*size, HEADS, 1).expand(*size, HEADS, P)
    b, c = torch.randn(2, *size, GROUPS, N)
    a = (-torch.rand(HEADS) - 0.5)[:, None, None].expand(-1, P, N)
    d, bias = (torch.randn(HEADS)[:, None].expand(-1, P) for _ in range(2))
    before, found = torch.randn(6, HEADS, P, N), []
    for function in (kernel, mamba2_on_cpu.advance):
        states, out, after = before.clone(), torch.empty_like(x), torch.zeros(REQUESTS, DRAFTS, HEADS, P, N)
        options = {"z": None, "dt_bias": bias, "dt_softplus": True, "state_batch_indices": SLOTS, "out": out}
        if with_drafts:
            options |= {"disable_state_update": True, "cache_steps": DRAFTS, "intermediate_states_buffer": after}
            options |= {"intermediate_state_indices": torch.arange(REQUESTS).int()}
        function(states, x, dt, a, b, c, d, **options)
        assert torch.equal(states, before) == with_drafts
        found.append((states, out, after))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
