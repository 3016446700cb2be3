# SPDX-License-Identifier: Apache-2.0
"""Inputs that are hard to quantise, made from any model without changing what it computes.

Large key biases, outlier channels and magnitudes beyond fp16 come with other models than SmolLM2. Each frame here puts
one of them into the keys and values that enter the cache and takes it out again where exact arithmetic does not notice:

    q / s, k * s        a factor per channel cancels in q . k. Equal for both channels of a RoPE pair, it commutes with
                        RoPE, so that it could be folded into the weights of q_proj and k_proj
    k + c               one vector for all keys of a head adds the same number to all scores of a query, which softmax
                        ignores. After RoPE only: it stands for a bias on channels that RoPE hardly turns
    v * s, out / s      v_proj and the columns of o_proj
    v + c, out - c      attention weights sum to one: a bias of v_proj and one of o_proj
"""

from __future__ import annotations

import torch

from quality.frames import Frame, Inputs

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


def affine(
    name: str,
    k_scale: torch.Tensor,
    k_bias: torch.Tensor,
    v_scale: torch.Tensor,
    v_bias: torch.Tensor,
    *,
    needs_bf16: bool = False,
) -> Frame:
    """Return the frame of keys k * k_scale + k_bias and values v * v_scale + v_bias, each [Hk, D].

    Queries are divided by k_scale; v_bias and v_scale are taken out of the output.
    """

    def per_head(channels: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return channels.to(x).repeat_interleave(x.shape[1] // len(channels), 0)

    def enter(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Inputs:
        keys = k * per_head(k_scale, k) + per_head(k_bias, k)
        return q / per_head(k_scale, q), keys, v * per_head(v_scale, v) + per_head(v_bias, v)

    def leave(out: torch.Tensor) -> torch.Tensor:
        return (out - per_head(v_bias, out)) / per_head(v_scale, out)

    return Frame(name, enter, leave, needs_bf16)


def frames(kv_heads: int, head_dim: int) -> list[Frame]:
    """Return every kind of hard input for a model of so many KV heads."""
    chosen = pattern(kv_heads, head_dim)
    one, zero = torch.ones_like(chosen), torch.zeros_like(chosen)
    made = []
    for factor in FACTORS:
        few = torch.where(chosen != 0, factor, 1.0)
        made.append(affine(f"4 key channels x {factor:g}", few, zero, one, zero))
        made.append(affine(f"4 value channels x {factor:g}", one, zero, few, zero))
    made += [affine(f"4 key channels + {bias:g}", one, bias * chosen, one, zero) for bias in KEY_BIASES]
    made += [affine(f"4 value channels + {bias:g}", one, zero, one, bias * chosen) for bias in VALUE_BIASES]
    large = affine("keys, values x 2^15", RANGE * one, zero, RANGE * one, zero, needs_bf16=True)
    return [*made, large, affine("queries x 2^15", one / RANGE, zero, one, zero, needs_bf16=True)]
