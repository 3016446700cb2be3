# SPDX-License-Identifier: Apache-2.0
"""Inputs that are hard to quantise, made from any model without changing what it computes.

Large key biases, outlier channels and magnitudes beyond fp16 come with other models than SmolLM2. Each form here puts
one of them into the keys and values that enter the cache and takes it out again where exact arithmetic does not notice:

    q / s, k * s        a factor per channel cancels in q . k. Equal for both channels of a RoPE pair, it commutes with
                        RoPE: weights of q_proj and k_proj, or of the norms after them
    k + c               one vector for all keys of a head adds the same number to all scores of a query, which softmax
                        ignores. After RoPE only: it stands for a bias on channels that RoPE hardly turns
    v * s, out / s      v_proj and the columns of o_proj
    v + c, out - c      attention weights sum to one: a bias of v_proj and one of o_proj

Factors are powers of two. So the weights are those of a model that could have been trained like this, and what a server
does with weights (kvarn_kernels.balance) is done with them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.quality.frames import Frame

# channels of a head that get the factor or the bias
OUTLIERS = 4
# moderate and extreme; keys of SmolLM2 have a standard deviation of about 1.4 in a channel, values of 0.6
FACTORS = (4.0, 32.0)
KEY_BIASES, VALUE_BIASES = (10.0, 100.0), (1.0, 10.0)
# fp16 ends at 2^16 and a record at 2^22; rotated keys of SmolLM2 reach about 2^5
RANGE = 2.0**15


def pattern(kv_heads: int, head_dim: int) -> torch.Tensor:
    """Return -1, 0 or 1 per channel, [Hk, D]: `OUTLIERS` channels of each head, whole RoPE pairs, random signs."""
    generator = torch.Generator().manual_seed(0)
    half = head_dim // 2
    chosen = torch.zeros(kv_heads, head_dim)
    for head in range(kv_heads):
        for pair in torch.randperm(half, generator=generator)[: OUTLIERS // 2].tolist():
            sign = 1.0 - 2.0 * torch.randint(2, (), generator=generator).item()
            chosen[head, [pair, pair + half]] = sign
    return chosen


def per_head(channels: torch.Tensor, heads: int) -> torch.Tensor:
    """Return channels [Hk, D] for query heads, [Hq, D]."""
    return channels.repeat_interleave(heads // len(channels), 0)


def multiply_rows(rows: torch.Tensor | None, factor: torch.Tensor) -> None:
    """Multiply a weight [H * D, n] or a bias [H * D], if there is one, by a factor per channel, [Hk, D]."""
    if rows is None:
        return
    heads = rows.unflatten(0, (-1, factor.shape[1]))
    heads.mul_(per_head(factor, len(heads)).view(heads.shape[:2] + (1,) * (rows.ndim - 1)).to(rows))


def _multiply(projection: Any, norm: Any, factor: torch.Tensor) -> None:
    """Multiply what q_proj or k_proj gives by a factor per channel, through the norm of its heads if there is one."""
    if norm is None:
        multiply_rows(projection.weight, factor)
        multiply_rows(projection.bias, factor)
        return
    if not (factor == factor[0]).all():
        raise ValueError("expected the same factors for all heads of a model that norms queries and keys, got others")
    norm.weight.mul_(factor[0].to(norm.weight))


def scaled(
    name: str, *, keys: torch.Tensor | None = None, values: torch.Tensor | None = None, needs_bf16: bool = False
) -> Frame:
    """Return the model with k_proj or v_proj times a factor per channel [Hk, D], q_proj or o_proj's columns over it."""

    def reweigh(module: Any) -> None:
        if keys is not None:
            _multiply(module.k_proj, getattr(module, "k_norm", None), keys)
            _multiply(module.q_proj, getattr(module, "q_norm", None), 1 / keys)
        if values is not None:
            multiply_rows(module.v_proj.weight, values)
            multiply_rows(module.v_proj.bias, values)
            multiply_rows(module.o_proj.weight.T, 1 / values)

    return Frame(name, reweigh=reweigh, needs_bf16=needs_bf16)


def biased_values(name: str, bias: torch.Tensor) -> Frame:
    """Return the model with a bias of v_proj per channel [Hk, D] and one of o_proj that takes it out again."""

    def reweigh(module: Any) -> None:
        output = module.o_proj.weight
        entered = per_head(bias, output.shape[1] // bias.shape[1]).flatten().to(output)
        for projection, more in ((module.v_proj, bias.flatten().to(output)), (module.o_proj, -output @ entered)):
            own = torch.zeros_like(more) if projection.bias is None else projection.bias
            projection.bias = torch.nn.Parameter(own + more, requires_grad=False)

    return Frame(name, reweigh=reweigh)


def biased_keys(name: str, bias: torch.Tensor) -> Frame:
    """Return the model with a bias per channel [Hk, D] on its keys after RoPE."""
    return Frame(name, enter=lambda q, k, v: (q, k + bias.to(k), v))


def frames(kv_heads: int, head_dim: int) -> list[Frame]:
    """Return every kind of hard input for a model of so many KV heads."""
    chosen = pattern(kv_heads, head_dim)
    large = torch.full_like(chosen, RANGE)
    made = []
    for factor in FACTORS:
        few = torch.where(chosen != 0, factor, 1.0)
        made.append(scaled(f"4 key channels x {factor:g}", keys=few))
        made.append(scaled(f"4 value channels x {factor:g}", values=few))
    made += [biased_keys(f"4 key channels + {bias:g}", bias * chosen) for bias in KEY_BIASES]
    made += [biased_values(f"4 value channels + {bias:g}", bias * chosen) for bias in VALUE_BIASES]
    made.append(scaled("keys, values x 2^15", keys=large, values=large, needs_bf16=True))
    return [*made, scaled("queries x 2^15", keys=1 / large, needs_bf16=True)]
