# SPDX-License-Identifier: Apache-2.0
"""Gated delta nets on a machine without a GPU: torch in the place of the Triton kernels that SGLang has for them.

SGLang's kernels take 16-bit models on a GPU only. Nothing here touches layers with full attention.

Gated delta rule (arXiv 2412.06464): S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t,
per head S [V, K], with q and k of unit length.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch
from sglang_kvarn import compat

# tokens between two states that SGLang may keep of a prefill
CHUNK = 64


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run these layers in 32 bits in the processes of the engines that this one starts.

    An engine hands its processes the search path, on which this puts an SGLang plugin that calls `install`. This
    process checks arguments only.
    """
    info = folder / "gdn_on_cpu-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gdn-on-cpu\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\ngdn_on_cpu = gdn_on_cpu:install\n")
    patch.syspath_prepend(folder)
    patch.setenv("SGLANG_MAMBA_CONV_DTYPE", "float32")
    accept_states(patch)


def accept_states(patch: pytest.MonkeyPatch) -> None:
    """Let SGLang take arguments of these models here: 0.5.16 asks for the maker of the GPU, later ones the platform."""
    arguments = compat.resolve("sglang.srt.server_args.ServerArgs")
    patch.setattr(arguments, "_validate_mamba_extra_buffer", lambda *args: None, raising=False)


def install() -> None:
    """Put the torch forms in place, for good."""
    backend = compat.resolve("sglang.srt.layers.attention.linear.gdn_backend")
    _stand_in_for_a_device()
    backend.causal_conv1d_fn, backend.causal_conv1d_update = convolve, convolve_one
    backend.fused_gdn_gating = gates
    kernel = compat.resolve("sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel")
    kernel.extend, kernel.packed_decode = extend, packed_decode
    kernel.supports_track_state_snapshot = False
    compat.resolve("sglang.kernels.ops.attention.fla.layernorm_gated.RMSNorm").forward = gated_norm


def _stand_in_for_a_device() -> None:
    """Answer what SGLang asks of CUDA around these layers, where torch was built for CUDA and finds no driver."""
    device_module, tensor = torch.get_device_module, torch.tensor

    @functools.wraps(device_module)
    def get_device_module(device=None):
        return torch.cpu if device is None else device_module(device)

    @functools.wraps(tensor)
    def unpinned(*args, pin_memory=False, **kwargs):
        return tensor(*args, **kwargs)

    torch.get_device_module, torch.tensor = get_device_module, unpinned
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def gated_norm(self, x, z=None, *args, **kwargs):
    """RMS norm of x, times silu(z)."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
    return (y if z is None else y * torch.nn.functional.silu(z.float())).to(x.dtype)


def _activated(x: torch.Tensor, activation: str | bool) -> torch.Tensor:
    return torch.nn.functional.silu(x) if activation in ("silu", "swish", True) else x


def convolve(x, weight, bias, *, activation, conv_states, has_initial_state, cache_indices, query_start_loc, **kwargs):
    """Convolve the new tokens of packed requests, x [C, T], after their states [slots, C, w - 1], which move on."""
    out, past = torch.empty_like(x), weight.shape[1] - 1
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot = int(cache_indices[i])
        before = conv_states[slot, :, -past:].to(x.dtype) * bool(has_initial_state[i])
        whole = torch.cat([before, x[:, start:end]], 1)
        y = torch.nn.functional.conv1d(whole[None], weight[:, None].to(x.dtype), bias, groups=x.shape[0])[0]
        out[:, start:end] = _activated(y, activation)
        conv_states[slot] = whole[:, -past:].to(conv_states.dtype)
    return out


def convolve_one(x, conv_states, weight, bias, activation, *, conv_state_indices, **kwargs):
    """Convolve one new token per request, x [B, C]."""
    slots = conv_state_indices.long()
    whole = torch.cat([conv_states[slots].to(x.dtype), x[..., None]], -1)
    y = (whole * weight.to(x.dtype)).sum(-1)
    conv_states[slots] = whole[..., 1:].to(conv_states.dtype)
    return _activated(y if bias is None else y + bias, activation)


def gates(a_log, a, b, dt_bias, *args, **kwargs):
    """Return (g, beta), float32 [1, T, heads]."""
    g = -a_log.float().exp() * torch.nn.functional.softplus(a.float() + dt_bias.float())
    return g[None], b.float().sigmoid()[None]


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def _step(state, q, k, v, g, beta):
    """Advance states [..., V, K] by a token: q and k [..., K], v [..., V], g and beta [...]."""
    state = state * g.exp()[..., None, None]
    new = beta[..., None] * (v - (state @ k[..., None])[..., 0])
    state = state + new[..., None] * k[..., None, :]
    return state, (state @ q[..., None])[..., 0]


def extend(self, q, k, v, g, beta, *, ssm_states, cache_indices, query_start_loc, **kwargs):
    """Run packed requests, q and k [1, T, Hk, K], v [1, T, Hv, V].

    Returns:
        The outputs [1, T, Hv, V], None, and the state before every `CHUNK` tokens of a request [1, N, Hv, V, K].
    """
    group = v.shape[2] // q.shape[2]
    q, k = (_unit(x[0].float()).repeat_interleave(group, 1) for x in (q, k))
    q = q * q.shape[-1] ** -0.5
    values, out, history = v[0].float(), torch.empty_like(v), []
    bounds = query_start_loc.tolist()
    for i, (start, end) in enumerate(itertools.pairwise(bounds)):
        slot = int(cache_indices[i])
        state = ssm_states[slot].float()
        for t in range(start, end):
            if (t - start) % CHUNK == 0:
                history.append(state)
            state, out[0, t] = _step(state, q[t], k[t], values[t], g[0, t].float(), beta[0, t].float())
        ssm_states[slot] = state.to(ssm_states.dtype)
    return out, None, torch.stack(history)[None]


def packed_decode(
    self, mixed_qkv, a, b, *, A_log, dt_bias, scale, ssm_states, cache_indices, num_v_heads, head_v_dim, **kwargs
):
    """Run one new token per request, mixed_qkv [B, C]; return the outputs [1, B, Hv, V]."""
    size, slots = mixed_qkv.shape[0], cache_indices.long()
    values, key_dim = num_v_heads * head_v_dim, ssm_states.shape[-1]
    heads = (mixed_qkv.shape[1] - values) // 2 // key_dim
    q, k, v = mixed_qkv.float().split([heads * key_dim, heads * key_dim, values], -1)
    q, k = (_unit(x.view(size, heads, key_dim)).repeat_interleave(num_v_heads // heads, 1) for x in (q, k))
    g, beta = gates(A_log, a, b, dt_bias)
    state, y = _step(ssm_states[slots].float(), q * scale, k, v.view(size, num_v_heads, head_v_dim), g[0], beta[0])
    ssm_states[slots] = state.to(ssm_states.dtype)
    return y.to(mixed_qkv.dtype)[None]
