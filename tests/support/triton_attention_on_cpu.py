# SPDX-License-Identifier: Apache-2.0
"""SGLang's Triton attention backend on a machine without a GPU, with torch in the place of its two attention kernels.

The interpreter runs the kernels hundreds of times slower. What the backend does around them is SGLang's: slots of
sliding windows, what is stored where. But for one thing: with any cache a token of gpt-oss, Mellum or Step that is
decoded sees one token less there than a token of a prompt does; here it sees as many, as in SGLang's other backends.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from engine_plugin import add_to_engines
from sglang_kvarn import compat

_KERNELS = "sglang.kernels.ops.attention"


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Run it in the processes of the engines that this one starts."""
    add_to_engines(patch, folder, "triton_attention_on_cpu:install")


def install() -> None:
    """Put the torch forms in place, for good; the backend asks for them when it is made."""
    compat.resolve(f"{_KERNELS}.decode_attention").decode_attention_fwd = decode
    compat.resolve(f"{_KERNELS}.extend_attention").extend_attention_fwd = extend
    backend = compat.resolve("sglang.srt.layers.attention.triton_backend").TritonAttnBackend
    backend.__init__ = with_window_of_layers(backend.__init__)
    backend.init_forward_metadata = with_whole_windows(backend.init_forward_metadata)


def with_window_of_layers(make):
    """Return what makes a backend and notes the largest window of the model's layers, with the query's own token."""

    @functools.wraps(make)
    def made(backend, model_runner, *args, **kwargs):
        make(backend, model_runner, *args, **kwargs)
        backend.window_of_layers = compat.window_of_layers(model_runner.model) or None

    return made


def with_whole_windows(describe):
    """Return what describes a step, in a decode step with that window: what models name is mostly one less."""

    @functools.wraps(describe)
    def described(backend, forward_batch):
        size = backend.sliding_window_size
        if forward_batch.forward_mode.is_decode():
            backend.sliding_window_size = backend.window_of_layers
        try:
            describe(backend, forward_batch)
        finally:
            backend.sliding_window_size = size

    return described


def _slots(indptr: torch.Tensor, indices: torch.Tensor, requests: int) -> Iterator[torch.Tensor]:
    for start, end in itertools.pairwise(indptr[: requests + 1].tolist()):
        yield indices[start:end]


def _attend(q, k, v, hidden, sm_scale, sinks) -> torch.Tensor:
    """Attend q [n, Hq, D] to k, v [N, Hk, D] but what is hidden, bool [n, N]; sinks: [Hq] or None."""
    group = q.shape[1] // k.shape[1]
    keys, values = (x.to(q.dtype).transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = (q.transpose(0, 1) @ keys.transpose(1, 2) * sm_scale).masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores).view(-1, 1, 1).expand(-1, len(q), 1)], -1)
    return (scores.softmax(-1)[..., : len(k)] @ values).transpose(0, 1)


def decode(
    q, k_buffer, v_buffer, o, kv_indptr, kv_indices, attn_logits, attn_lse, splits, most, sm_scale, *args, **kwargs
):
    """Attend one token of each request to the slots that are listed for it."""
    assert not kwargs.get("logit_cap"), "no cap is served"
    for b, slots in enumerate(_slots(kv_indptr, kv_indices, len(q))):
        hidden = torch.zeros(1, len(slots), dtype=torch.bool)
        o[b] = _attend(q[b : b + 1], k_buffer[slots], v_buffer[slots], hidden, sm_scale, kwargs.get("sinks"))[0]


def extend(
    q,
    k,
    v,
    o,
    k_buffer,
    v_buffer,
    qo_indptr,
    kv_indptr,
    kv_indices,
    custom_mask,
    is_causal,
    mask_indptr,
    max_len_extend,
    k_scale,
    v_scale,
    sm_scale,
    *,
    sliding_window_size=-1,
    sinks=None,
    **kwargs,
):
    """Attend new tokens to the slots that are listed before them, and to one another.

    Args:
        is_causal: not in a draft model that drafts a block at once (DFLASH), whose tokens see those behind them too.
        custom_mask: of a verify step, whether a draft [T] sees a token of its request and a draft [N + T], one request
            after the other; mask_indptr: where that of each begins.
    """
    assert not kwargs.get("logit_cap"), "no cap is served"
    bounds = list(itertools.pairwise(qo_indptr.tolist()))
    for b, slots in enumerate(_slots(kv_indptr, kv_indices, len(bounds))):
        start, end = bounds[b]
        own = slice(start, end)
        keys, values = (torch.cat([x[slots].to(y), y[own]]) for x, y in ((k_buffer, k), (v_buffer, v)))
        distance = torch.arange(len(slots), len(keys))[:, None] - torch.arange(len(keys))
        hidden = (distance < 0) & is_causal
        if sliding_window_size > -1:
            # SGLang counts the tokens before a query
            hidden |= distance > sliding_window_size
        if custom_mask is not None:
            drafts = end - start
            seen = custom_mask[mask_indptr[b] : mask_indptr[b + 1]].view(drafts, -1)[:, -drafts:].bool()
            hidden[:, len(slots) :] |= ~seen
        o[own] = _attend(q[own], keys, values, hidden, sm_scale, sinks)
