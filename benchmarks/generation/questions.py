# SPDX-License-Identifier: Apache-2.0
"""Questions with known answers from a file of the user's, prompts made of them, and whether an answer is right."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# of a line: those of GSM8K (question, answer) and of AIME as it is published (problem or Problem, answer or Answer)
QUESTION, ANSWER = ("question", "problem", "Problem"), ("answer", "Answer")
NUMERIC, EXACT = MATCHES = ("numeric", "exact")
INSTRUCTION = 'Solve this. Think step by step, then end with one line that begins with "Answer:".'
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
# where an answer says which of its words are the result: what stands behind the last one of these counts
_RESULT = re.compile(r"####|[Aa]nswer:|[Aa]nswer is|\\boxed\{")


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        answer: as the file has it; GSM8K's is a solution with the result behind ####.
    """

    text: str
    answer: str


def load(path: Path, limit: int | None = None) -> list[Question]:
    """Return the questions of a file, one JSON object a line: the first ones, all without a limit.

    Raises:
        ValueError: a line has no question or no answer, or there is no line.
    """
    found = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        fields = json.loads(line)
        pair = [next((fields[name] for name in names if name in fields), None) for names in (QUESTION, ANSWER)]
        if None in pair:
            raise ValueError(
                f"expected {' or '.join(QUESTION)}, and {' or '.join(ANSWER)}, in line {number} of {path}, got "
                f"{', '.join(fields)}: rename its fields"
            )
        found.append(Question(*map(str, pair)))
    if not found:
        raise ValueError(f"expected questions in {path}, one JSON object a line, got an empty file")
    return found[:limit]


def prompt(tokenizer: Any, question: Question, examples: Sequence[Question], instruction: str) -> list[int]:
    """Return the token ids of a prompt: a chat where the tokenizer has a template for one, else plain text.

    Args:
        examples: questions that are answered before this one is asked.
    """
    if tokenizer.chat_template:
        turns = [
            turn
            for example in examples
            for turn in ({"role": "user", "content": example.text}, {"role": "assistant", "content": example.answer})
        ]
        turns = [{"role": "system", "content": instruction}, *turns, {"role": "user", "content": question.text}]
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    shown = "".join(f"Question: {example.text}\nAnswer: {example.answer}\n\n" for example in examples)
    return tokenizer(f"{instruction}\n\n{shown}Question: {question.text}\nAnswer:")["input_ids"]


def _result(text: str) -> str:
    """Return what an answer says behind the last mark of a result, or all of it; what a model thought is left out."""
    return _RESULT.split(text.rpartition("</think>")[2])[-1]


def _number(text: str) -> float | None:
    """Return the first number behind a mark, the last one where there is no mark."""
    result = _result(text)
    numbers = _NUMBER.findall(result)
    if not numbers:
        return None
    return float(numbers[0 if result != text else -1].replace(",", ""))


def _words(text: str) -> str:
    """Return the first line behind a mark, the last one where there is no mark, without what ends a sentence."""
    result = _result(text)
    lines = [line.strip() for line in result.splitlines() if line.strip()]
    return lines[0 if result != text else -1].strip(" .}*") if lines else ""


def matcher(match: str) -> Callable[[str, str], bool]:
    """Return what says whether a text gives an expected answer: as a number, or to the letter."""

    def numeric(text: str, expected: str) -> bool:
        return _number(text) is not None and _number(text) == _number(expected)

    def exact(text: str, expected: str) -> bool:
        return _words(text) == _words(expected) != ""

    return {NUMERIC: numeric, EXACT: exact}[match]
