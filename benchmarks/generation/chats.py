# SPDX-License-Identifier: Apache-2.0
"""Conversations: a story in parts, with a question after each about a number in this part or an earlier one."""

from __future__ import annotations

import random

from benchmarks.generation import words
from benchmarks.generation.tasks import Encode, Task, story


def conversation(encode: Encode, turns: int, part: int, draw: random.Random) -> list[Task]:
    """Return one task per turn; its prompt is the whole conversation up to its question.

    The right answers stand in the history, so that all caches get the same prompts.

    Args:
        part: most tokens of a part of the story; more than a page of 128, so that each turn fills pages.
    """
    names, facts = words.names(draw, turns), dict[str, str]()
    history, tasks = encode("There are secret numbers in this story. Remember them.\n\n"), []
    for turn, name in enumerate(names):
        facts[name] = words.number(draw)
        fact = f" The secret number of the {name} is {facts[name]}."
        asked = draw.choice(list(facts))
        question = encode(f"\n\nThe secret number of the {asked} is")
        prompt = history + story(encode, part, fact, draw.random(), draw) + question
        section = "conversation, later turns" if turn else "conversation, first turn"
        tasks.append(Task(section, prompt, facts[asked], 6))
        history = prompt + encode(f" {facts[asked]}.\n\nThe story goes on.\n\n")
    return tasks
