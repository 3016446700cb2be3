# SPDX-License-Identifier: Apache-2.0
"""Compare greedy answers."""

from __future__ import annotations


def agreement(first: list[int], other: list[int]) -> int:
    """Return how many leading tokens are equal."""
    return next((n for n, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
