# SPDX-License-Identifier: Apache-2.0
"""The published KVarN quantiser, written from its description, as the method to compare with.

Sources: arXiv 2606.03458, algorithm 1 and appendix D; the settings of the authors' implementation for vLLM
(huawei-csl/KVarN, Apache-2.0): standard deviations with Bessel's correction, 8 iterations, the best iterate
kept.
"""

from __future__ import annotations

import torch

ITERATIONS = 8
# bounds of the logarithm of a scale; the lower one makes the result depend on the magnitude of the tile
LOG_SCALE_BOUNDS = (-0.3, 10.0)
STD_BOUNDS = (1e-3, 1e3)


def _std(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.std(dim, keepdim=True, unbiased=True)


def _imbalance(x: torch.Tensor) -> torch.Tensor:
    """Return max / min of the column stds plus max / min of the row stds, [..., 1, 1]; 2 is balanced."""

    def ratio(std: torch.Tensor) -> torch.Tensor:
        return std.amax((-1, -2), keepdim=True) / std.amin((-1, -2), keepdim=True).clamp_min(1e-8)

    return ratio(_std(x, -2)) + ratio(_std(x, -1))


def variance_normalise(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (row scale [..., R, 1], column scale [..., 1, C]) of T float32 [..., R, C]: the best of 8
    iterates."""
    log_column, log_row = torch.zeros_like(t[..., :1, :]), torch.zeros_like(t[..., :1])
    best, best_column, best_row = _imbalance(t), log_column, log_row
    balanced = t
    for _ in range(ITERATIONS):
        log_column = (log_column + _std(balanced, -2).clamp(*STD_BOUNDS).log()).clamp(*LOG_SCALE_BOUNDS)
        balanced = t / log_column.exp() / log_row.exp()
        log_row = (log_row + _std(balanced, -1).clamp(*STD_BOUNDS).log()).clamp(*LOG_SCALE_BOUNDS)
        balanced = t / log_column.exp() / log_row.exp()
        imbalance = _imbalance(balanced)
        better = imbalance <= best
        best = torch.where(better, imbalance, best)
        best_column = torch.where(better, log_column, best_column)
        best_row = torch.where(better, log_row, best_row)
    return best_row.exp(), best_column.exp()


def quantise(t: torch.Tensor, bits: int, row: torch.Tensor | float, column: torch.Tensor) -> torch.Tensor:
    """Return T after quantisation between the minimum and maximum of each row of T / row / column.

    Scale and zero of a row and the column scale are rounded to fp16 after the codes are chosen.
    """
    balanced = t / column / row
    low, high = balanced.amin(-1, keepdim=True), balanced.amax(-1, keepdim=True)
    step = ((high - low) / (2**bits - 1)).clamp_min(1e-10)
    codes = ((balanced - low) / step).round().clamp(0, 2**bits - 1)
    return (codes * (step * row).half().float() + (low * row).half().float()) * column.half().float()


def round_trip(t: torch.Tensor, bits: int) -> torch.Tensor:
    """Return T float32 [..., R, C] as the published method reads it back."""
    row, column = variance_normalise(t)
    return quantise(t, bits, row, column)
