# SPDX-License-Identifier: Apache-2.0
"""Exact changes of what enters a cache: other weights, or other queries, keys and values, with the same output."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# q [T, Hq, D], k and v [T, Hk, D], after RoPE
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def _same_inputs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Inputs:
    return q, k, v


@dataclass(frozen=True)
class Frame:
    """Another form of a model's attention, which computes the same in exact arithmetic.

    Attributes:
        name: as in the table.
        enter: maps (q, k, v), of which q and k are after RoPE, to what the cache gets; any float dtype.
        leave: maps the output [T, Hq, D'] back to [T, Hq, D]: leave(attend(*enter(q, k, v))) = attend(q, k, v).
        reweigh: changes q_proj, k_proj, v_proj and o_proj of an attention module of transformers in place; None for a
            form that only lies around attention.
        needs_bf16: whether the inputs do not fit into fp16.
        head_dim: channels of a head in the cache, where they are not those of the model.
    """

    name: str
    enter: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Inputs] = _same_inputs
    leave: Callable[[torch.Tensor], torch.Tensor] = lambda out: out
    reweigh: Callable[[Any], None] | None = None
    needs_bf16: bool = False
    head_dim: int | None = None


UNTOUCHED = Frame("untouched")


def error(frame: Frame, kv_heads: int, head_dim: int) -> float:
    """Return how far the attention of a frame is from that without it, in float64: relative RMS, random inputs."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(96, n * kv_heads, head_dim, dtype=torch.float64, generator=generator) for n in (3, 1, 1))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True, scale=head_dim**-0.5
        )
        return out.transpose(0, 1)

    expected = attend(q, k, v)
    got = frame.leave(attend(*frame.enter(q, k, v)))
    return ((got - expected).norm() / expected.norm()).item()
