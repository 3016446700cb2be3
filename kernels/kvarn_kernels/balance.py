# SPDX-License-Identifier: Apache-2.0
"""Channel balance: attention weights that compute the same, with channels of a head that are alike in the cache.

A Hadamard rotation spreads the quantisation error of a head evenly over its channels. A key channel that is 32 times as
large as the others, with a query channel smaller by as much, leaves them all with an error of its size: 4 of 64 such
channels cost SmolLM2 38.7 times its KL with k4v2, 380 times with k2v2. A factor per channel,

    q * s, k / s        leaves q . k as it is
    v / t, o_proj * t   leaves the output as it is (o_proj by its columns)

chooses how that error is shared out. Where it is the same in every channel, the error of q . k is in proportion to
(sum_c |q_c|^2 s_c^2) (sum_c |k_c|^2 / s_c^2), at least (sum_c |q_c| |k_c|)^2 by Cauchy-Schwarz, and that at
s_c^2 = |k_c| / |q_c|; values likewise. |.| is read off the weights, so nothing is calibrated: the norm of a row of the
projection and of its bias, where each input counts by its weight in the RMSNorm before it. (So the RMS of the values of
SmolLM2's layers is found within a factor of about two; without the norm's weights, within 25.) Factors are powers of
two, so that scaling a weight is exact, and both channels of a RoPE pair have the same.

An RMSNorm of queries and keys undoes what scales their projections, so its weight takes the factors. Gemma's form of it
multiplies by w + 1, and (w + 1) s - 1 may be no number of 16 bits: there queries and keys are multiplied behind RoPE.

A bias of v_proj is added to every value, and attention weights sum to one: it can be added to the output instead and
need not enter the cache at all, where it would widen the range of every token.

Folding factors into weights is SmoothQuant's idea (Xiao et al., arXiv 2211.10438). Departs from it: between two
projections instead of an activation and a weight, an optimum instead of a strength alpha, from weights alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

# A head below this predicted gain stays as it is, bit for bit: SmolLM2's have 1.01 to 1.1, and to balance those too
# brought nothing (KL of k2v2 0.0221 before and after).
GAIN = 1.25
# log2 of the least factor. How large a channel is follows from its weights only roughly: where factors of 2 are applied
# too, SmolLM2 with 4 key channels times 4 has 1.45 times its own KL with k2v2 instead of 1.04, with 4 value channels
# times 32 1.29 times with k4v2 instead of 1.04 (one text of 512 tokens).
LEAST = 2
# log2 of the largest factor: it and its inverse are normal numbers of fp16
MOST = 14
# A bias of more than this share of the energy of a head's values is kept out of the cache. In all layers of SmolLM2 a
# share of 1/256, 1/64, 1/16, 1/4 has 1.3, 2.1, 5, 12 to 14 times the KL with k4v2, on 4 channels as on all of them;
# with k2v2 1.1, 1.2, 1.7, 3 (one text of 512 tokens). A smaller one stays: tokens that attract attention without having
# anything to say have values near zero, and without the bias they would be stored as its negative.
BIAS_SHARE = 1 / 64


@dataclass(frozen=True)
class Rows:
    """A weight of which each channel of a head has a row.

    Attributes:
        weight: a view [H, M, D, n] of the model's weight, any float dtype; written in place. M is 1 for keys and
            values, the query heads of a KV head else.
        inputs: RMS of each of the n inputs, float32 [n], or [H, M, D, n] where each channel has its own (an axis can be
            1); None for 1.
    """

    weight: torch.Tensor
    inputs: torch.Tensor | None = None

    def squares(self) -> torch.Tensor:
        """Return the expected square of each channel, float32 [H, M, D]."""
        # head by head, since a copy in float32 is made
        if self.inputs is None:
            heads = [head.float().square().sum(-1) for head in self.weight]
        else:
            inputs = self.inputs.expand_as(self.weight)
            heads = [(head.float() * x).square().sum(-1) for head, x in zip(self.weight, inputs, strict=True)]
        return torch.stack(heads)

    def room(self) -> torch.Tensor:
        """Return by which power of two a channel may grow without overflow, float32 [H, D]."""
        largest = torch.maximum(self.weight.amax((1, -1)), -self.weight.amin((1, -1))).float()
        return (math.frexp(torch.finfo(self.weight.dtype).max)[1] - largest.frexp().exponent).float()


def _squares(side: Sequence[Rows]) -> torch.Tensor:
    """Return the expected square of each channel of a projection with its bias, float32 [H, M, D]."""
    return torch.stack([rows.squares() for rows in side]).sum(0)


@dataclass(frozen=True)
class Product:
    """The two sides of a product over the channels of a head, of which one is cached.

    Attributes:
        cached: weight and, where there is one, bias of the keys or the values.
        other: weight and bias of the queries, or the columns of o_proj.
        partners: int64 [D], the channel that must have the factor of this one; None where none must.
        in_weights: whether the weights take the factors; else what is multiplied does, see `Balance.queries_and_keys`.
    """

    cached: tuple[Rows, ...]
    other: tuple[Rows, ...]
    partners: torch.Tensor | None = None
    in_weights: bool = True

    def exponents(self, *, bias_leaves: bool = False) -> torch.Tensor:
        """Return log2 of the factors, float32 [H, D]: 0 or at least `LEAST`, and 0 in heads below `GAIN`.

        A channel without weights on one side stays as it is, and none grows beyond its dtype.

        Args:
            bias_leaves: whether the bias of the cached side is no part of what is cached.
        """
        sides = (self.cached[:1] if bias_leaves else self.cached, self.other)
        cached, other = (self._paired(_squares(side).sum(1)) for side in sides)
        known = (cached > 0) & (other > 0) & cached.isfinite() & other.isfinite()
        # rounded before it is centred, so that balanced weights stay as they are
        ideal = (torch.where(known, cached.log2() - other.log2(), torch.nan) / 4 + 0.5).floor()
        ideal -= ideal.nanmedian(-1, keepdim=True).values
        shrink, grow = (torch.stack([rows.room() for rows in side]).amin(0) for side in (self.cached, self.other))
        chosen = torch.minimum(torch.maximum(ideal, -shrink), grow).nan_to_num(0.0).clamp(-MOST, MOST)
        if self.partners is not None:
            # of two channels that must agree, the one with less room decides
            partner = chosen[:, self.partners]
            chosen = torch.where(chosen.abs() < partner.abs(), chosen, partner)
        chosen = chosen * (chosen.abs() >= LEAST)
        return chosen * (gain(cached, other, chosen) >= GAIN)

    def _paired(self, squares: torch.Tensor) -> torch.Tensor:
        """Return the sum over a channel and its partner, [H, D]."""
        return squares if self.partners is None else squares + squares[:, self.partners]

    @torch.no_grad()
    def scale(self, exponents: torch.Tensor) -> None:
        """Divide the cached side by 2^exponents and multiply the other, in place.

        Exact, but for what leaves the normal numbers of fp16 at its lower end: 2^-14 and below, in steps of 2^-24.
        Nothing if the weights do not take the factors.
        """
        if not self.in_weights:
            return
        for side, signed in ((self.cached, -exponents), (self.other, exponents)):
            for rows in side:
                rows.weight.mul_(signed.exp2()[:, None, :, None])


@dataclass(frozen=True)
class AttentionWeights:
    """Views of what one attention module computes with.

    Attributes:
        keys: projections of q and k, or the norms behind them; H = 1 where all heads share their weights.
        values: v_proj and o_proj.
        value_bias: [Hk, D], the bias in `values.cached`; None where v_proj has none.
    """

    keys: Product
    values: Product
    value_bias: torch.Tensor | None = None


@dataclass
class Balance:
    """What was changed in one attention module, chosen once: it can be taken out of the weights and put back.

    Attributes:
        keys: log2 of s, float32 [Hk, D], or [1, D] of norms that all heads share. values: log2 of t, float32 [Hk, D].
        output_bias: [Hk, D] in the model's dtype, to be added to the output of every query head; None where no bias was
            taken out. Its memory stays the same, since CUDA graphs read it.
        queries_and_keys: s [Hq, D] and 1 / s [Hk, D] in the model's dtype, by which queries and keys are multiplied
            behind RoPE; None where the weights have the factors.
        applied: whether the weights are balanced at the moment.
    """

    keys: torch.Tensor
    values: torch.Tensor
    output_bias: torch.Tensor | None
    queries_and_keys: tuple[torch.Tensor, torch.Tensor] | None = None
    applied: bool = field(default=False, init=False)

    @property
    def heads(self) -> int:
        """How many heads have factors on either side; all, where all share the factors of norms."""
        return int(((self.keys != 0).any(-1) | (self.values != 0).any(-1)).sum())

    @property
    def largest(self) -> float:
        """The largest factor by which a channel shrank or grew."""
        return 2.0 ** max(x.abs().max().item() for x in (self.keys, self.values))

    @torch.no_grad()
    def put_in(self, weights: AttentionWeights) -> None:
        """Balance the weights; nothing if they are."""
        if self.applied:
            return
        weights.keys.scale(self.keys)
        weights.values.scale(self.values)
        if self.output_bias is not None:
            assert weights.value_bias is not None, "a bias that was taken out has its place in the weights"
            self.output_bias.copy_(weights.value_bias)
            weights.value_bias.zero_()
        self.applied = True

    @torch.no_grad()
    def take_out(self, weights: AttentionWeights) -> None:
        """Return the weights to what they were; nothing if they are."""
        if not self.applied:
            return
        if self.output_bias is not None:
            assert weights.value_bias is not None, "a bias that was taken out has its place in the weights"
            weights.value_bias.copy_(self.output_bias)
        weights.keys.scale(-self.keys)
        weights.values.scale(-self.values)
        self.applied = False


def gain(cached: torch.Tensor, other: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Return by how much factors lower the power of the error, from squares and log2 of factors [H, D]: [H, 1]."""
    squared = (2 * exponents).exp2()
    before = cached.sum(-1) * other.sum(-1)
    after = (cached / squared).sum(-1) * (other * squared).sum(-1)
    return (before / after).nan_to_num(0.0)[:, None]


def rope_partners(head_dim: int, rotary_dim: int, neox: bool) -> torch.Tensor:
    """Return the channel that RoPE turns together with each, int64 [D]: itself beyond rotary_dim.

    Example:
        head_dim 6, rotary_dim 4: [2, 3, 0, 1, 4, 5] for neox, [1, 0, 3, 2, 4, 5] for GPT-J.
    """
    channels = torch.arange(head_dim)
    turned = (channels + rotary_dim // 2) % rotary_dim if neox else channels ^ 1
    return torch.where(channels < rotary_dim, turned, channels)


@dataclass(frozen=True)
class Norms:
    """RMSNorms of the queries and the keys, between projection and RoPE.

    Attributes:
        queries, keys: their weights: [D], a norm of each head, or [heads * D], a norm over the whole projection.
        offset: what is added to a weight: 1 in Gemma's form, 0 else.
    """

    queries: torch.Tensor
    keys: torch.Tensor
    offset: int = 0

    def sides(self, queries: Sequence[Rows], keys: Sequence[Rows]) -> list[tuple[Rows]]:
        """Return what is behind the norms, of what is before them: of the queries and of the keys."""
        pairs = ((self.queries, queries), (self.keys, keys))
        return [(self._behind(weight, _squares(side)),) for weight, side in pairs]

    def _behind(self, weight: torch.Tensor, squares: torch.Tensor) -> Rows:
        heads, group, head_dim = squares.shape
        if weight.numel() > head_dim:
            # over all heads of this rank, which stand for those of the others
            return Rows(weight.view(heads, group, head_dim, 1), (squares / squares.mean()).sqrt()[..., None])
        unit = squares / squares.mean(-1, keepdim=True)
        if self.offset:
            return Rows((weight.float() + self.offset).expand(heads, group, -1)[..., None], unit.sqrt()[..., None])
        return Rows(weight[None, None, :, None], unit.nanmean((0, 1)).sqrt()[None, None, :, None])


def _rows(
    weight: torch.Tensor, bias: torch.Tensor | None, kv_heads: int, inputs: torch.Tensor | None
) -> tuple[Rows, ...]:
    """Return a projection [heads, D, n] and its bias [heads, D], if there is one, by KV head."""
    rows = Rows(weight.unflatten(0, (kv_heads, -1)), inputs)
    return (rows,) if bias is None else (rows, Rows(bias.unflatten(0, (kv_heads, -1))[..., None]))


def attention_weights(
    projections: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
    output: torch.Tensor,
    partners: torch.Tensor | None,
    *,
    inputs: torch.Tensor | None = None,
    norms: Norms | None = None,
) -> AttentionWeights:
    """Return views of the weights of an attention module.

    Args:
        projections: of q, k and v: weight [heads, D, n] and bias [heads, D] or None.
        output: the weight of o_proj, [n, Hq * D].
        partners: as `rope_partners` returns them, None without RoPE.
        inputs: the weight of the RMSNorm before the projections, float32 [n], if it is known.
        norms: those of a model that has any; where it has, they or what they put out get the factors of the keys, since
            scaled rows of a projection would change what a norm divides by.
    """
    kv_heads, head_dim = projections[1][0].shape[:2]
    q, k, v = (_rows(weight, bias, kv_heads, inputs) for weight, bias in projections)
    if norms is not None:
        q, k = norms.sides(q, k)
    return AttentionWeights(
        keys=Product(
            k,
            q,
            None if partners is None else partners.to(output.device),
            in_weights=norms is None or norms.offset == 0,
        ),
        values=Product(v, (Rows(output.T.unflatten(0, (kv_heads, -1, head_dim))),)),
        value_bias=v[1].weight[:, 0, :, 0] if len(v) > 1 else None,
    )


def _multipliers(weights: AttentionWeights, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return what queries and keys are multiplied by, for log2 of s [Hk, D]; None where they are not."""
    if weights.keys.in_weights or not keys.any():
        return None
    output = weights.values.other[0].weight
    return keys.exp2().repeat_interleave(output.shape[1], 0).to(output.dtype), (-keys).exp2().to(output.dtype)


def choose(weights: AttentionWeights) -> Balance | None:
    """Return what to change in one attention module, None for nothing. The weights stay as they are."""
    output_bias = None
    if (bias := weights.value_bias) is not None:
        projected = weights.values.cached[0].squares().sum((1, 2))
        if (bias.float().square().sum(-1) > BIAS_SHARE * projected).any():
            output_bias = torch.zeros_like(bias, memory_format=torch.contiguous_format)
    values = weights.values.exponents(bias_leaves=output_bias is not None)
    keys = weights.keys.exponents()
    chosen = Balance(keys, values, output_bias, _multipliers(weights, keys))
    return None if output_bias is None and not chosen.heads else chosen
