# SPDX-License-Identifier: Apache-2.0
"""Mamba-2 in torch, in the place of SGLang's kernels.

State-space duality (arXiv 2405.21060, section 7), per head with a state h [P, N]: h_t = exp(dt_t a) h_{t-1} +
dt_t x_t b_t^T, y_t = h_t c_t + d x_t, with dt_t = softplus(dt_t + bias), a < 0 and d of a head, and b, c [N] of a group
of heads.
"""

from __future__ import annotations

import torch
from sglang_kvarn import compat
from states_on_cpu import convolve, convolve_new, requests


def install() -> None:
    """Put the torch forms in place, for good."""
    mixer = compat.resolve("sglang.srt.layers.attention.mamba.mamba")
    mixer.mamba_chunk_scan_combined, mixer.selective_state_update = scan, advance
    # without CUDA the module has no names for these
    mixer.causal_conv1d_fn = mixer.causal_conv1d_fn_triton = convolve
    mixer.causal_conv1d_update = mixer.causal_conv1d_update_triton = convolve_new


def _step(h, x, dt, a, b, c, d):
    """Advance states h [..., H, P, N] by a token: x [..., H, P], dt [..., H], a and d [H], b and c [..., G, N]."""
    b, c = (y.float().repeat_interleave(x.shape[-2] // y.shape[-2], -2) for y in (b, c))
    h = h * (dt * a).exp()[..., None, None] + (dt[..., None] * x)[..., None] * b[..., None, :]
    return h, (h @ c[..., None])[..., 0] + d[:, None] * x


def scan(
    x,
    dt,
    a,
    b,
    c,
    chunk_size,
    *,
    D,
    dt_bias,
    cu_seqlens,
    initial_states,
    out,
    state_dtype,
    return_track_states=False,
    track_end_locs=None,
    **kwargs,
):
    """Run packed requests, x [1, T, H, P], dt [1, T, H], b and c [1, T, G, N]; the outputs go to out.

    Returns:
        The states before every `chunk_size` tokens of the step, whosoever they are, [1, N, H, P, N], and of the
        requests at their end; from 0.5.20 on also those before the tokens `track_end_locs`, [1, n, H, P, N] or None.
    """
    dt, values = torch.nn.functional.softplus(dt[0].float() + dt_bias), x[0].float()
    if initial_states is None:
        initial_states = dt.new_zeros(len(cu_seqlens) - 1, *x.shape[2:], b.shape[-1])
    before, last = [initial_states[0].float()], []
    for i, start, end in requests(cu_seqlens):
        h = initial_states[i].float()
        for t in range(start, end):
            h, out[0, t] = _step(h, values[t], dt[t], a, b[0, t], c[0, t], D)
            before.append(h)
        last.append(h)
    grid = torch.stack(before[: x.shape[1] : chunk_size]).to(state_dtype)[None]
    ends = torch.stack(last).to(state_dtype)
    if not return_track_states:
        return grid, ends
    tracked = [] if track_end_locs is None else track_end_locs.tolist()
    return grid, ends, torch.stack([before[t] for t in tracked]).to(state_dtype)[None] if tracked else None


def advance(
    states,
    x,
    dt,
    a,
    b,
    c,
    D,
    *,
    dt_bias,
    state_batch_indices,
    out,
    disable_state_update=False,
    intermediate_states_buffer=None,
    intermediate_state_indices=None,
    **kwargs,
):
    """Run one new token per request, x [B, H, P], b and c [B, G, N]; dt, a, D and dt_bias are repeated over P and N.

    Or drafts in a chain, x [B, D, H, P], b and c [B, D, G, N]: the state after each draft goes to
    intermediate_states_buffer [slots, D, H, P, N], and the states are left.
    """
    slots = state_batch_indices.long()
    if x.dim() == 3:
        x, dt, b, c, out = (y[:, None] for y in (x, dt, b, c, out))
    dt = torch.nn.functional.softplus(dt[..., 0].float() + dt_bias[:, 0])
    h = states[slots].float()
    for draft in range(x.shape[1]):
        h, y = _step(h, x[:, draft].float(), dt[:, draft], a[:, 0, 0], b[:, draft], c[:, draft], D[:, 0])
        out[:, draft] = y
        if intermediate_states_buffer is not None:
            rows = intermediate_state_indices.long()
            intermediate_states_buffer[rows, draft] = h.to(intermediate_states_buffer.dtype)
    if not disable_state_update:
        states[slots] = h.to(states.dtype)
