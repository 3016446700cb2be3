# SPDX-License-Identifier: Apache-2.0
"""Two caches on the same prompts, prompt by prompt: what only one of them had right."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.common.intervals import interval
from benchmarks.common.rows import Figure


def compare(own: Sequence[bool], base: Sequence[bool], prompts: int) -> list[Figure]:
    """Return how right answers of a cache and of the first one differ.

    Args:
        own, base: [answers to a prompt * prompts], whether each answer is right, all prompts once before any twice.
    """
    pairs = list(zip(own, base, strict=True))
    # the mean over the answers to a prompt, since they are not independent
    means = [[sum(column[n::prompts]) / len(column[n::prompts]) for column in (own, base)] for n in range(prompts)]
    values = interval(means, lambda mean: mean[..., 0] - mean[..., 1])
    names = ("right_less_first", "right_less_first_low", "right_less_first_high")
    return [
        *(Figure(name, 100 * value, "%") for name, value in zip(names, values, strict=True)),
        Figure("only_this_right", sum(a and not b for a, b in pairs), "answers"),
        Figure("only_first_right", sum(b and not a for a, b in pairs), "answers"),
    ]
