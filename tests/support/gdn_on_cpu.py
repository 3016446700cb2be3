# SPDX-License-Identifier: Apache-2.0
"""Gated delta nets in torch, in the place of SGLang's kernels.

Gated delta rule (arXiv 2412.06464): S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T, o_t = S_t q_t,
per head S [V, K], with q and k of unit length.
"""

from __future__ import annotations

import torch
from sglang_kvarn import compat
from states_on_cpu import convolve, convolve_new, requests

# tokens between two states that SGLang may keep of a prefill
CHUNK = 64


def install() -> None:
    """Put the torch forms in place, for good."""
    backend = compat.resolve("sglang.srt.layers.attention.linear.gdn_backend")
    backend.causal_conv1d_fn, backend.causal_conv1d_update = convolve, convolve_new
    backend.fused_gdn_gating = gates
    kernel = compat.resolve("sglang.srt.layers.attention.linear.kernels.gdn_triton.TritonGDNKernel")
    kernel.extend, kernel.packed_decode, kernel.target_verify = extend, packed_decode, verify
    kernel.supports_track_state_snapshot = False
    compat.resolve("sglang.kernels.ops.attention.fla.layernorm_gated.RMSNorm").forward = gated_norm


def gated_norm(self, x, z=None, *args, **kwargs):
    """RMS norm of x, times silu(z)."""
    y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps) * self.weight.float()
    return (y if z is None else y * torch.nn.functional.silu(z.float())).to(x.dtype)


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
    for i, start, end in requests(query_start_loc):
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


def verify(
    self,
    A_log,
    dt_bias,
    q,
    k,
    v,
    a,
    b,
    *,
    ssm_states,
    cache_indices,
    query_start_loc,
    intermediate_states_buffer,
    intermediate_state_indices,
    **kwargs,
):
    """Run as many drafts in a chain per request, q and k [1, B * D, Hk, K], v [1, B * D, Hv, V]; leave the states.

    The state after each draft goes to intermediate_states_buffer [slots, D, Hv, V, K].

    Returns:
        The outputs [1, B * D, Hv, V].
    """
    size, group, out = len(query_start_loc) - 1, v.shape[2] // q.shape[2], torch.empty_like(v)
    q, k = (_unit(x[0].float()).repeat_interleave(group, 1) for x in (q, k))
    g, beta = gates(A_log, a.reshape(v.shape[1], -1), b.reshape(v.shape[1], -1), dt_bias)
    by_request = [x.unflatten(0, (size, -1)) for x in (q * q.shape[-1] ** -0.5, k, v[0].float(), g[0], beta[0])]
    state, rows = ssm_states[cache_indices[:size].long()].float(), intermediate_state_indices[:size].long()
    outputs = out[0].unflatten(0, (size, -1))
    for draft in range(outputs.shape[1]):
        state, outputs[:, draft] = _step(state, *(x[:, draft] for x in by_request))
        intermediate_states_buffer[rows, draft] = state.to(intermediate_states_buffer.dtype)
    return out
