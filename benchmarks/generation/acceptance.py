# SPDX-License-Identifier: Apache-2.0
"""What verify steps of speculative decoding come to: drafts accepted in a step, and the ratio of two caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.common.intervals import interval

# of each text (verify steps, drafts accepted in them)
Steps = Sequence[tuple[int, int]]


def accepted(steps: Steps) -> float:
    """Return the drafts accepted in a step, mean over the steps of all texts."""
    return sum(drafts for _, drafts in steps) / sum(number for number, _ in steps)


def ratio(own: Steps, base: Steps) -> tuple[float, float, float]:
    """Return (`accepted` over that of another cache on the same texts, bounds of its 95 % interval).

    The interval is that of the bootstrap over texts.
    """

    def figure(mean: torch.Tensor) -> torch.Tensor:
        own_steps, own_drafts, base_steps, base_drafts = mean.unbind(-1)
        return (own_drafts / own_steps) / (base_drafts / base_steps)

    return interval([(*a, *b) for a, b in zip(own, base, strict=True)], figure)
