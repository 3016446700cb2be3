# SPDX-License-Identifier: Apache-2.0
"""Answers, whether they are correct, and what a set of them comes to."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from benchmarks.common.answers import agreement


@dataclass(frozen=True)
class Answer:
    """What came back for one prompt.

    Attributes:
        section, expected, depth: of the task.
        mode: "greedy", "sampled", or of a conversation "hit" (earlier turns in the prefix cache) or "miss".
        ids, text: the answer.
        prompt_tokens, cached_tokens: as the engine counted them.
    """

    section: str
    mode: str
    expected: str | None
    ids: list[int]
    text: str
    prompt_tokens: int
    cached_tokens: int
    depth: float | None = None

    @property
    def correct(self) -> bool:
        """Whether the answer, up to its first line break or full stop, is the expected one to the letter."""
        return re.split(r"[\n.]", self.text.strip())[0].strip() == self.expected


Groups = dict[tuple[str, str], list[Answer]]


def _by_section(answers: list[Answer]) -> Groups:
    groups: Groups = {}
    for answer in answers:
        groups.setdefault((answer.section, answer.mode), []).append(answer)
    return groups


def _agreement(own: list[Answer], other: list[Answer]) -> dict[str, Any]:
    """Return the mean number of leading tokens that are equal, of as many as the other answers have on average."""
    equal = sum(agreement(a.ids, b.ids) for a, b in zip(own, other, strict=True)) / len(own)
    return {"value": round(equal, 2), "of": round(sum(len(b.ids) for b in other) / len(own), 2), "unit": "tokens"}


def _correct(group: list[Answer]) -> dict[str, Any]:
    return {"value": sum(answer.correct for answer in group), "of": len(group), "unit": "answers"}


def _common(section: str, mode: str, group: list[Answer]) -> dict[str, Any]:
    """Return what every record of a group has, means of its prompts."""
    means = {
        key: round(sum(getattr(answer, key) for answer in group) / len(group))
        for key in ("prompt_tokens", "cached_tokens")
    }
    return {"task": section, "mode": mode, "prompts": len(group), **means}


def _by_depth(answers: list[Answer]) -> list[dict[str, Any]]:
    """Return the right answers of all needles by depth."""
    groups: dict[tuple[str, float], list[Answer]] = {}
    for answer in answers:
        if answer.depth is not None:
            groups.setdefault((answer.mode, answer.depth), []).append(answer)
    return [
        _common("needle, all lengths", mode, group) | {"quantity": f"correct at depth {depth:g}"} | _correct(group)
        for (mode, depth), group in groups.items()
    ]


def summarise(answers: list[Answer], baseline: list[Answer]) -> list[dict[str, Any]]:
    """Return the figures of one cache, per section and mode.

    Args:
        answers: of this cache.
        baseline: those of the first cache to the same prompts, in the same order.

    Returns:
        Records of one `quantity` each: "correct" answers where one is known; "agreement" of greedy answers with the
        baseline's; "agreement of hit and miss" of this cache; "correct at depth D" over all needles.
    """
    own, base = _by_section(answers), _by_section(baseline)
    rows = []
    for (section, mode), group in own.items():
        common = _common(section, mode, group)
        found: dict[str, dict[str, Any]] = {}
        if group[0].expected is not None:
            found["correct"] = _correct(group)
        if mode != "sampled":
            found["agreement"] = _agreement(group, base[section, mode])
        if mode == "hit":
            found["agreement of hit and miss"] = _agreement(group, own[section, "miss"])
        rows += [common | {"quantity": quantity} | figures for quantity, figures in found.items()]
    return rows + _by_depth(answers)
