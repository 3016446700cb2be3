# SPDX-License-Identifier: Apache-2.0
"""What a mutation is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Mutation:
    """Describe one bug.

    Attributes:
        name: what goes wrong; file: where; old, new: the text and its replacement, old occurs once.
        tests: the tests that are to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
