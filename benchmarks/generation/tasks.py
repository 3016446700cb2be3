# SPDX-License-Identifier: Apache-2.0
"""Prompts whose answers are known, made by a seeded generator, and texts to go on from.

Every prompt spans several pages of 128 tokens, so that its answer is read from what the cache keeps of old tokens.
The examples in a prompt show a small model the form of the answer; the answer itself stands in the prompt (needle,
table), or follows from a rule (instruction) or a sum that is not among the examples. Tasks that SmolLM2-135M did not do
clearly better than chance with a 16-bit cache were left out: sums of two varying numbers (1 of 12), capitals (3 of 8),
the longest word (2 of 8), tables of two-word names (1 of 8).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from benchmarks.generation import words
from benchmarks.quality import texts

# token ids of a text
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Task:
    """One prompt.

    Attributes:
        section: tasks of one section are sent together and scored together.
        prompt: token ids.
        expected: the answer that counts as correct; None where only the agreement of caches is measured.
        new_tokens: tokens to generate.
        depth: of a needle, 0 (beginning) .. 1 (end).
    """

    section: str
    prompt: list[int]
    expected: str | None
    new_tokens: int
    depth: float | None = None


def story(encode: Encode, length: int, fact: str, depth: float, draw: random.Random) -> list[int]:
    """Return filler sentences of at most `length` tokens with one fact among them.

    Args:
        depth: where the fact stands, 0 (beginning) .. 1 (end), moved to the end of a sentence.
    """
    hidden, filler = encode(fact), list[int]()
    room, place = length - len(hidden), 0
    while len(filler) + len(sentence := encode(words.sentence(draw))) <= room:
        filler += sentence
        if len(filler) <= depth * room:
            place = len(filler)
    return filler[:place] + hidden + filler[place:]


def needle(encode: Encode, length: int, depth: float, draw: random.Random) -> Task:
    """Return a prompt of at most `length` tokens with one number in filler sentences; depth as in `story`."""
    name, answer = words.names(draw, 1)[0], words.number(draw)
    head = encode("There is one secret number in this story. Remember it.\n\n")
    question = encode(f"\n\nThe secret number of the {name} is")
    fact = f" The secret number of the {name} is {answer}."
    body = story(encode, length - len(head) - len(question), fact, depth, draw)
    return Task(f"needle, {length} tokens", head + body + question, answer, 6, depth)


def table(encode: Encode, entries: int, draw: random.Random) -> Task:
    """Return a table of words and numbers, and the question for one of them."""
    keys = draw.sample(words.WORDS, entries)
    values = [words.number(draw) for _ in keys]
    lines = "".join(f"{key}: {value}\n" for key, value in zip(keys, values, strict=True))
    # one of the first half, which no exact window reaches
    asked = draw.randrange(entries // 2)
    return Task(f"table of {entries}", encode(f"{lines}\n{keys[asked]}:"), values[asked], 6)


def sums(encode: Encode, addend: int, shots: int, draw: random.Random) -> Task:
    """Return "a + addend =" for a number of two digits, after examples with other numbers."""
    asked, *others = draw.sample(range(10, 90), shots + 1)
    lines = "".join(f"{a} + {addend} = {a + addend}\n" for a in others)
    return Task(f"sums: + {addend}", encode(f"{lines}{asked} + {addend} ="), str(asked + addend), 5)


def _is_animal(word: str) -> bool:
    return word in words.ANIMALS


# what to write, and how it follows from three words, one of them an animal
RULES: dict[str, tuple[str, Callable[[list[str]], str]]] = {
    "first": ("the first word of", lambda given: given[0]),
    "last": ("the last word of", lambda given: given[-1]),
    "copy": ("all words of", ", ".join),
    "animal": ("the animal in", lambda given: next(filter(_is_animal, given))),
}


def instruction(encode: Encode, name: str, shots: int, draw: random.Random) -> Task:
    """Return an instruction about a list of three words after examples that follow it.

    Args:
        name: one of `RULES`.
    """
    what, answer = RULES[name]

    def three() -> list[str]:
        others = [word for word in words.WORDS if not _is_animal(word)]
        return draw.sample([draw.choice(words.ANIMALS), *draw.sample(others, 2)], 3)

    *lists, asked = (three() for _ in range(shots + 1))
    lines = "".join(f"List: {', '.join(given)}\nAnswer: {answer(given)}\n" for given in lists)
    prompt = encode(f"Write {what} the list.\n\n{lines}List: {', '.join(asked)}\nAnswer:")
    return Task(f"instruction: {name}", prompt, answer(asked), 12)


def continuation(tokenizer: Any, kind: str, length: int, new_tokens: int, seed: int) -> Task:
    """Return a piece of a text to go on from; see `quality.texts`."""
    return Task(f"go on, {length} tokens", texts.load(kind, length, seed, tokenizer).tokens, None, new_tokens)
