# SPDX-License-Identifier: Apache-2.0
"""Variance normalisation in one pass and the uniform quantiser of its rows.

The arithmetic is written so that a kernel gives the same bytes: elementwise float32 without contraction, every sum
in float64 (its order then does not reach the rounded result), square roots and divisions correctly rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvarn_kernels.record.format import FIRST_REACH, LARGEST_INPUT, ROUNDS


@dataclass(frozen=True)
class QuantisedSide:
    """One side (keys or values) of a tile: T[r, c] ~ (scale[r] * code + zero[r]) * cross[c].

    Attributes:
        codes: int32 [..., R, C].
        scale, zero: float32 holding fp16 values, [..., R]: per row of T.
        cross: float32 holding fp16 values, [..., C]: per column of T.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    cross: torch.Tensor


def sanitise(x: torch.Tensor) -> torch.Tensor:
    """Return x as float32 with NaN as 0 and magnitudes clamped to 2^22, the range a record can hold."""
    x = x.float()
    return torch.where(x == x, x.clamp(-LARGEST_INPUT, LARGEST_INPUT), 0.0)


def _std(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the population std along dim, float32, zeros replaced by 1."""
    count = x.shape[dim]
    wide = x.double()
    total, squares = wide.sum(dim, keepdim=True), (wide * wide).sum(dim, keepdim=True)
    variance = ((squares - total * total / count) / count).clamp_min(0.0).float()
    std = variance.sqrt()
    return torch.where(std > 0, std, 1.0)


def _round_cross(cross: torch.Tensor) -> torch.Tensor:
    return cross.clamp(2.0**-13, 2.0**13).half().float()


def cross_scale(t: torch.Tensor) -> torch.Tensor:
    """Return s_c = std over a column of T / s_r, with s_r = std over a row, rounded to fp16: float32 [..., 1, C].

    Departs from the paper: one pass instead of 8 iterations, no clamps, no choice of a best iterate. The row scale is
    redundant with the row's range, and the clamp at exp(-0.3) made the paper's scale depend on the magnitude of the
    tile (design section 4: error 0.0291 against 0.0299 for the iterations).
    """
    row_inverse = 1.0 / _std(t, -1)
    return _round_cross(_std(t * row_inverse, -2))


def _exponent(x: torch.Tensor) -> torch.Tensor:
    """Return floor(log2 x) for x > 0 from the bits of the float32, int32; -127 for 0."""
    return ((x.contiguous().view(torch.int32) >> 23) & 0xFF) - 127


def _power_of_two(exponent: torch.Tensor) -> torch.Tensor:
    return ((exponent + 127) << 23).view(torch.float32)


def _to_half(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-65504.0, 65504.0).half().float()


def _codes(balanced: torch.Tensor, low: torch.Tensor, step: torch.Tensor, levels: int) -> torch.Tensor:
    """Return floor((B - low) / step + 1/2) clamped to 0 .. levels, as float32; 0 where step is 0."""
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    return torch.floor((balanced - low) * inverse + 0.5).clamp(0.0, levels)


def _refit(balanced: torch.Tensor, low: torch.Tensor, step: torch.Tensor, levels: int):
    """Return (codes, low, step): the codes of a range, and the range with the least squared error for those codes."""
    codes = _codes(balanced, low, step, levels)
    # in units of the step, so that no sum cancels
    inverse = torch.where(step > 0, 1.0 / step, 0.0)
    x, c = ((balanced - low) * inverse).double(), codes.double()
    count = balanced.shape[-1]
    x_sum, c_sum = x.sum(-1, keepdim=True), c.sum(-1, keepdim=True)
    products, squares = (x * c).sum(-1, keepdim=True), (c * c).sum(-1, keepdim=True)
    spread = squares * count - c_sum * c_sum
    slope = torch.where(spread > 0, (products * count - x_sum * c_sum) / spread, 1.0)
    offset = (x_sum - slope * c_sum) / count
    return codes, low + step * offset.float(), step * slope.float()


def _ratio(t: torch.Tensor, approx: torch.Tensor, other: torch.Tensor, dim: int) -> torch.Tensor:
    """Return <t, t> / <approx, other> along dim, float32 within 1/4 .. 4; 1 where the divisor is not positive."""
    power = (t.double() * t.double()).sum(dim, keepdim=True)
    overlap = (approx.double() * other.double()).sum(dim, keepdim=True)
    return torch.where(overlap > 0, power / overlap, 1.0).float().clamp(0.25, 4.0)


def quantise_side(t: torch.Tensor, bits: int) -> QuantisedSide:
    """Quantise T float32 [..., R, C]; rows get a scale and a zero, columns the cross scale.

    The first codes span `FIRST_REACH` of the range of a row. Then `ROUNDS` times: scale and zero of a row to the
    least squared error, the cross scale so that a column keeps its norm, new codes. At the end, the cross scale
    times <t, t> / <t_hat, t> of its column, then scale and zero times the same of their row: the error is at right
    angles to the data, so a key keeps its own logit and an average of values is not shrunk. That matters more than
    the squared error itself (2-bit keys, least squares without it: KL 1.6 times as large).

    KL of SmolLM2, mean of three texts, against a grid of 12 ranges with a gain per row: k4v2 0.00484 (0.00509), k2v2
    0.0281 (0.0347), k4v4 0.00111 (0.00123) at 1,024 tokens; k4v2 0.00662 (0.00835), k2v2 0.0455 (0.0610) at 4,096
    (benchmarks/results/encoder_search.csv).

    Squared error of 2-bit codes as a share of the variance: keys 0.111 (with minimum and maximum 0.229), values 0.115
    (0.200); the best scalar quantiser of a Gaussian has 0.1175 (``python -m benchmarks.quality.bench_quality
    --code-error``).

    Powers of two move between (scale, zero) and cross so that |zero| and |scale * code + zero| are at most 2 (for
    magnitudes beyond 2^14 at most 2^9), and a matrix instruction on fp16 operands cannot overflow.

    Departs from the paper: section 3 uses the minimum and maximum of a row, and scales that are not fitted.
    """
    levels = 2**bits - 1
    cross = cross_scale(t)
    balanced = t * (1.0 / cross)
    low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
    reach = (high - low) * (0.5 * FIRST_REACH[bits])
    low, step = (low + high) * 0.5 - reach, reach * (2.0 / levels)
    for _ in range(ROUNDS[bits]):
        codes, low, step = _refit(balanced, low, step, levels)
        approx = (codes * step + low) * cross
        cross = _round_cross(cross * _ratio(t, approx, approx, -2).sqrt())
        balanced = t * (1.0 / cross)
    codes = _codes(balanced, low, step, levels)
    rows = codes * step + low
    cross = _round_cross(cross * _ratio(t, rows * cross, t, -2))
    gain = _ratio(t, rows * cross, t, -1)
    scale, zero = step * gain, low * gain
    reach = torch.maximum(zero.abs(), (scale * levels + zero).abs())
    exponent = _exponent(reach.amax(-2, keepdim=True))
    exponent = exponent.clamp_min(-14).minimum(14 - _exponent(cross.amax(-1, keepdim=True)))
    down, up = _power_of_two(-exponent), _power_of_two(exponent)
    return QuantisedSide(
        codes=codes.to(torch.int32),
        scale=_to_half(scale * down).squeeze(-1),
        zero=_to_half(zero * down).squeeze(-1),
        cross=_to_half(cross * up).squeeze(-2),
    )
