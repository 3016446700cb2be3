# SPDX-License-Identifier: Apache-2.0
"""95 % intervals of what is computed over texts, questions or chains: the bootstrap over them.

Tokens of one text are not independent, so a text as a whole is drawn or left out (Efron, "Bootstrap methods", 1979).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

RESAMPLES = 10_000


def interval(
    rows: Sequence[Sequence[float]] | torch.Tensor, figure: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[float, float, float]:
    """Return (a figure of all rows, bounds of its 95 % interval over drawings of as many rows).

    Args:
        rows: [N, K], what is known of each text.
        figure: of the mean row: float64 [..., K] -> [...].

    Example: rows (own, base) of three texts and `lambda mean: mean[..., 0] / mean[..., 1]` give the ratio of two means.
    """
    known = torch.as_tensor(rows, dtype=torch.float64).cpu()
    drawn = torch.randint(len(known), (RESAMPLES, len(known)), generator=torch.Generator().manual_seed(0))
    low, high = figure(known[drawn].mean(1)).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return figure(known.mean(0)).item(), low, high
