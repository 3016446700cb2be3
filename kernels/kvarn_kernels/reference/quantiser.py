# SPDX-License-Identifier: Apache-2.0
"""Variance normalisation in one pass and the uniform quantiser of its rows.

The arithmetic is written so that a kernel gives the same bytes: elementwise float32 without contraction, every sum
in float64 (its order then does not reach the rounded result), square roots and divisions correctly rounded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

# range factors that the clipping quantiser tries, widest first: 1, 61/64, 58/64, ... 31/64, exact in float32
SHRINK_STEP = 3 / 64
SHRINK_STEPS = 12
# larger magnitudes saturate: fp16 scales then stay below 2^9, which attend.py relies on
LARGEST_INPUT = 2.0**22


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


def cross_scale(t: torch.Tensor) -> torch.Tensor:
    """Return s_c = std over a column of T / s_r, with s_r = std over a row, rounded to fp16: float32 [..., 1, C].

    Departs from the paper: one pass instead of 8 iterations, no clamps, no choice of a best iterate. The row scale is
    redundant with the row's range, and the clamp at exp(-0.3) made the paper's scale depend on the magnitude of the
    tile (design section 4: error 0.0291 against 0.0299 for the iterations).
    """
    row_inverse = 1.0 / _std(t, -1)
    cross = _std(t * row_inverse, -2).clamp(2.0**-13, 2.0**13)
    return cross.half().float()


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


def _best_range(balanced: torch.Tensor, low: torch.Tensor, high: torch.Tensor, levels: int):
    """Return (low, step) of the shrunk range with the least squared error in each row."""
    middle, half = (low + high) * 0.5, (high - low) * 0.5
    best_error = best_low = best_step = None
    for n in range(SHRINK_STEPS):
        reach = half * (1.0 - SHRINK_STEP * n)
        n_low, n_step = middle - reach, reach * (2.0 / levels)
        error = _codes(balanced, n_low, n_step, levels) * n_step + n_low - balanced
        squares = (error.double() * error.double()).sum(-1, keepdim=True)
        if best_error is None:
            best_error, best_low, best_step = squares, n_low, n_step
        else:
            better = squares < best_error
            best_error = torch.where(better, squares, best_error)
            best_low = torch.where(better, n_low, best_low)
            best_step = torch.where(better, n_step, best_step)
    return best_low, best_step


def quantise_side(t: torch.Tensor, bits: int) -> QuantisedSide:
    """Quantise T float32 [..., R, C]; rows get a scale and a zero, columns the cross scale.

    4 bits: the range of a row is its minimum and maximum. 2 bits: the range with the least squared error on a fixed
    grid of shrink factors, then scale and zero times <t, t> / <t_hat, t> of the row, which removes the shrink bias
    (attention averages many values, so bias hurts more than noise; design section 4).

    Powers of two move between (scale, zero) and cross so that |zero| and |scale * code + zero| are at most 2 (for
    magnitudes beyond 2^14 at most 2^9), and a matrix instruction on fp16 operands cannot overflow.

    Departs from the paper: section 3 uses the minimum and maximum at 2 bits too.
    """
    levels = 2**bits - 1
    cross = cross_scale(t)
    balanced = t * (1.0 / cross)
    low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
    if bits == 4:
        step = (high - low) * (1.0 / levels)
        codes = _codes(balanced, low, step, levels)
        gain = torch.ones_like(low)
    else:
        low, step = _best_range(balanced, low, high, levels)
        codes = _codes(balanced, low, step, levels)
        approx = (codes * step + low) * cross
        power, overlap = (t.double() * t.double()).sum(-1), (approx.double() * t.double()).sum(-1)
        gain = torch.where(overlap > 0, power / overlap, 1.0).float().clamp(0.5, 2.0).unsqueeze(-1)
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
