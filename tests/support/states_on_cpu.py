# SPDX-License-Identifier: Apache-2.0
"""Layers with states on a machine without a GPU: torch in the place of the Triton kernels that SGLang has for them.

SGLang's kernels take 16-bit models on a GPU only. What both kinds of layers need is here, a kind has a module of its
own: `gdn_on_cpu`, `mamba2_on_cpu`; so have copies of states to host memory, `host_pools_on_cpu`. Nothing touches full
attention.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import host_pools_on_cpu
import pytest
import torch
import unpinned
from engine_plugin import add_to_engines
from sglang_kvarn import compat

# of a process with these layers in 32 bits
ENVIRONMENT = {"SGLANG_MAMBA_CONV_DTYPE": "float32"}


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run these layers in 32 bits in the processes of the engines that this one starts; this one checks arguments."""
    add_to_engines(patch, folder, "states_on_cpu:install")
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    accept_states(patch)


def accept_states(patch: pytest.MonkeyPatch) -> None:
    """Let SGLang take arguments of these models here: 0.5.16 asks for the maker of the GPU, later ones the platform."""
    arguments = compat.resolve("sglang.srt.server_args.ServerArgs")
    patch.setattr(arguments, "_validate_mamba_extra_buffer", lambda *args: None, raising=False)


def install() -> None:
    """Put the torch forms in place, for good."""
    import gdn_on_cpu
    import mamba2_on_cpu

    _stand_in_for_a_device()
    scatter = compat.resolve("sglang.kernels.ops.mamba.mamba_state_scatter_triton")
    scatter.fused_mamba_state_scatter_with_mask = scatter.fused_conv_window_scatter_with_mask = commit
    gdn_on_cpu.install()
    mamba2_on_cpu.install()
    host_pools_on_cpu.install()


def _stand_in_for_a_device() -> None:
    """Answer what SGLang asks of CUDA around these layers, where torch was built for CUDA and finds no driver."""
    unpinned.install()
    device_module, zeros = torch.get_device_module, torch.zeros

    @functools.wraps(device_module)
    def get_device_module(device=None):
        return torch.cpu if device is None else device_module(device)

    @functools.wraps(zeros)
    def on_cpu(*args, device=None, **kwargs):
        # 0.5.16 puts the states of drafts there, whatever the device of the server
        return zeros(*args, device="cpu" if device == "cuda" else device, **kwargs)

    torch.get_device_module, torch.zeros = get_device_module, on_cpu


def requests(query_start_loc: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield (i, start, end) of the requests of a step, packed one after the other."""
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        yield i, start, end


def _activated(x: torch.Tensor, activation: str | bool) -> torch.Tensor:
    return torch.nn.functional.silu(x) if activation in ("silu", "swish", True) else x


def convolve(x, weight, bias, *, activation, conv_states, has_initial_state, cache_indices, query_start_loc, **kwargs):
    """Convolve the new tokens of packed requests, x [C, T], after their states [slots, C, w - 1], which move on."""
    out, past = torch.empty_like(x), weight.shape[1] - 1
    for i, start, end in requests(query_start_loc):
        slot = int(cache_indices[i])
        before = conv_states[slot, :, -past:].to(x.dtype) * bool(has_initial_state[i])
        whole = torch.cat([before, x[:, start:end]], 1)
        y = torch.nn.functional.conv1d(whole[None], weight[:, None].to(x.dtype), bias, groups=x.shape[0])[0]
        out[:, start:end] = _activated(y, activation)
        conv_states[slot] = whole[:, -past:].to(conv_states.dtype)
    return out


def convolve_new(
    x,
    conv_states,
    weight,
    bias,
    activation,
    *,
    conv_state_indices,
    intermediate_conv_window=None,
    intermediate_state_indices=None,
    **kwargs,
):
    """Convolve one new token per request, x [B, C], or drafts in a chain, x [B, C, D]; the states move on by all.

    Args:
        intermediate_conv_window: where the state after each draft goes, [slots, D, C, w - 1], None without drafts.
    """
    slots, drafts = conv_state_indices.long(), x if x.dim() == 3 else x[..., None]
    whole = torch.cat([conv_states[slots].to(x.dtype), drafts], -1)
    # [B, C, D, w]
    windows = whole.unfold(-1, weight.shape[1], 1)
    y = (windows * weight.to(x.dtype)[:, None]).sum(-1)
    conv_states[slots] = windows[:, :, -1, 1:].to(conv_states.dtype)
    if intermediate_conv_window is not None:
        after = windows[..., 1:].transpose(1, 2).to(intermediate_conv_window.dtype)
        intermediate_conv_window[intermediate_state_indices.long(), : after.shape[1]] = after
    y = _activated(y if bias is None else y + bias[:, None], activation)
    # as x lies in memory, which SGLang relies on
    return torch.empty_like(x).copy_(y if x.dim() == 3 else y[..., 0])


def commit(states, drafted, slots, steps, rows=None):
    """Take the state after an accepted draft, of each request i with steps[i] >= 0, as that of its slot.

    Args:
        states: [layers, slots, ...]; drafted: after each draft of each request, [layers, B, D, ...].
    """
    assert rows is None, "states of other rows are for pipelines"
    kept = steps >= 0
    states[:, slots[kept].long()] = drafted[:, kept.nonzero()[:, 0], steps[kept].long()]
