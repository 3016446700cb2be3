# SPDX-License-Identifier: Apache-2.0
"""What verify steps of speculative decoding come to: drafts accepted in a step, and the ratio of two caches."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# of each text (verify steps, drafts accepted in them)
Steps = Sequence[tuple[int, int]]
RESAMPLES = 10_000


def accepted(steps: Steps) -> float:
    """Return the drafts accepted in a step, mean over the steps of all texts."""
    return sum(drafts for _, drafts in steps) / sum(number for number, _ in steps)


def ratio(own: Steps, base: Steps) -> tuple[float, float, float]:
    """Return (`accepted` over that of another cache on the same texts, bounds of its 95 % interval).

    The interval is that of the bootstrap over texts, since steps of one text are not independent.
    """
    drawn = torch.randint(len(own), (RESAMPLES, len(own)), generator=torch.Generator().manual_seed(0))
    (own_steps, own_drafts), (base_steps, base_drafts) = (
        torch.tensor(steps, dtype=torch.float64)[drawn].sum(1).T for steps in (own, base)
    )
    ratios = (own_drafts / own_steps) / (base_drafts / base_steps)
    low, high = ratios.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return accepted(own) / accepted(base), low, high
