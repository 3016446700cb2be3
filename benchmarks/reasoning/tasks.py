# SPDX-License-Identifier: Apache-2.0
"""Tasks whose solution is a long written chain of steps, made by a seeded generator.

machine    a program of a machine with 8 registers of one digit: each step is an instruction, number first, what it
           works on, and all registers after it. The instruction stands in the prompt, the registers in the step before.
walk       a graph whose nodes have two successors each, one for even and one for odd steps: each step is the successor
           and, as the node to go on from, the same again. The successors stand in the prompt.
multiply   two long numbers, multiplied as on paper: each step is the place of a digit, the two digits, what stood at
           their place, the carry, and the digit and carry that come of them.

One wrong token makes all later ones wrong, so a chain is right only if a model read the right places of its cache in
every step: what is measured is whether errors of a cache add up over a long answer.

Chains are token ids of a vocabulary of words, so no tokenizer has a part in them. A word says what it is for: place i7
begins an instruction and t7 is where a jump goes to, b3 is register b that holds 3, n5 is a node and e5 or o5 the same
as the successor of an even or odd step. So a step is found by its first word, and a small model learns to.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate, islice

REGISTERS, MOST_INSTRUCTIONS, MOST_NODES, MOST_DIGITS = 8, 32, 64, 40
_PLACES = max(MOST_INSTRUCTIONS, MOST_DIGITS)
# of registers: those that no other kind of word begins with
_NAMES = "abcdfghj"
assert len(_NAMES) == REGISTERS
_WORDS = (
    *("pad", "machine", "walk", "multiply", "start", "solve", "row"),
    *("add", "subtract", "raise", "jump"),
    *(str(digit) for digit in range(10)),
    *_NAMES,
    *(f"{name}{digit}" for name in _NAMES for digit in range(10)),
    *(f"i{n}" for n in range(_PLACES)),
    *(f"t{n}" for n in range(MOST_INSTRUCTIONS)),
    *(f"{kind}{n}" for kind in "neo" for n in range(MOST_NODES)),
)
VOCABULARY = {word: number for number, word in enumerate(_WORDS)}
PAD = VOCABULARY["pad"]


@dataclass(frozen=True)
class Chain:
    """A task and its solution.

    Attributes:
        prompt: token ids; shared: how many of them other chains of the same problem begin with, too.
        steps: token ids of each step; the last one may be cut.
    """

    prompt: list[int]
    shared: int
    steps: list[list[int]]

    @property
    def answer(self) -> list[int]:
        """Return the token ids of the solution."""
        return [token for step in self.steps for token in step]


def ids(text: str) -> list[int]:
    """Return the token ids of words: ids("start n3") has two."""
    return [VOCABULARY[word] for word in text.split()]


def words(tokens: list[int]) -> str:
    """Return the words of token ids."""
    return " ".join(_WORDS[token] for token in tokens)


Steps = Iterator[str]
# (what all chains of a problem begin with, what one of them begins with behind it, its steps without end)
Problem = tuple[str, Callable[[random.Random], tuple[str, Steps]]]


def _machine(draw: random.Random, size: int) -> Problem:
    def instruction(number: int) -> tuple[str, int, int]:
        register, other = draw.sample(range(REGISTERS), 2)
        kind = draw.choices(("add", "subtract", "raise", "jump"), (3, 3, 3, 2))[0]
        if kind == "raise":
            return kind, register, draw.randrange(1, 10)
        if kind == "jump":
            return kind, register, draw.choice([place for place in range(size) if place != number])
        return kind, register, other

    program = [instruction(number) for number in range(size)]

    def line(place: int) -> str:
        kind, register, other = program[place]
        second = {"raise": str(other), "jump": f"t{other}"}.get(kind) or _NAMES[other % REGISTERS]
        return f"i{place} {kind} {_NAMES[register]} {second}"

    def begin(own: random.Random) -> tuple[str, Steps]:
        registers = [own.randrange(10) for _ in range(REGISTERS)]
        place = own.randrange(size)

        def shown() -> str:
            return " ".join(f"{name}{digit}" for name, digit in zip(_NAMES, registers, strict=True))

        def run() -> Steps:
            at = place
            while True:
                kind, a, b = program[at]
                after = (at + 1) % size
                other = shown().split()[b] if kind in ("add", "subtract") else line(at).split()[-1]
                begun = f"{line(at)} {_NAMES[a]}{registers[a]} {other}"
                if kind == "add":
                    registers[a] = (registers[a] + registers[b]) % 10
                elif kind == "subtract":
                    registers[a] = (registers[a] - registers[b]) % 10
                elif kind == "raise":
                    registers[a] = (registers[a] + b) % 10
                elif registers[a]:
                    # it jumps unless the register is 0, and raises it, so that no loop is without end
                    registers[a] = (registers[a] + 1) % 10
                    after = b
                yield f"{begun} {shown()}"
                at = after

        return f"start i{place} {shown()}", run()

    return f"machine {' '.join(map(line, range(size)))}", begin


def _walk(draw: random.Random, size: int) -> Problem:
    nodes = draw.sample(range(MOST_NODES), size)
    # permutations, so that walks come back late
    even, odd = (dict(zip(nodes, draw.sample(nodes, size), strict=True)) for _ in range(2))
    lines = (f"n{node} e{even[node]} o{odd[node]}" for node in nodes)

    def begin(own: random.Random) -> tuple[str, Steps]:
        first = own.choice(nodes)

        def go() -> Steps:
            node = first
            while True:
                for parity, successor in (("e", even), ("o", odd)):
                    node = successor[node]
                    yield f"{parity}{node} n{node}"

        return f"start n{first}", go()

    return f"walk {' '.join(lines)}", begin


def _multiply(draw: random.Random, size: int) -> Problem:
    x = [draw.randrange(10) for _ in range(size)]
    shown = " ".join(f"i{n} {digit}" for n, digit in enumerate(x))

    def begin(own: random.Random) -> tuple[str, Steps]:
        y = [own.randrange(10) for _ in range(size)]

        def multiply() -> Steps:
            result = [0] * (2 * size)
            for j, factor in enumerate(y):
                carry = 0
                yield f"row i{j} {factor}"
                for i, digit in enumerate(x):
                    old = result[i + j]
                    after, result[i + j] = divmod(old + digit * factor + carry, 10)
                    yield f"i{i} {digit} {factor} {old} {carry} {result[i + j]} {after}"
                    carry = after
                result[j + size] = carry

        return f"solve {' '.join(f'i{n} {digit}' for n, digit in enumerate(y))}", multiply()

    return f"multiply {shown}", begin


def _digits(tokens: int) -> int:
    """Return how many digits two numbers have whose multiplication takes at least so many tokens."""
    return next(n for n in range(2, MOST_DIGITS + 1) if n * (3 + 7 * n) >= tokens or n == MOST_DIGITS)


_MAKE = {"machine": _machine, "walk": _walk, "multiply": _multiply}
TASKS = tuple(_MAKE)


def chains(
    task: str, tokens: int, number: int, seed: object, *, least: int | None = None, most: int | None = None
) -> list[Chain]:
    """Return chains of one problem: the same program, graph or first number, other starts.

    Args:
        task: one of `TASKS`.
        tokens: of a solution, which is cut there; `multiply` ends after 11,320 at most.
        number: of chains.
        seed: anything with a text; the same makes the same chains.
        least, most: instructions, or nodes; from half as many as a problem may have, to as many, where not given. Small
            problems are as frequent as large ones. Numbers have the digits they need.
    """
    draw = random.Random(f"{task} {tokens} {seed}")
    room = {"machine": MOST_INSTRUCTIONS, "walk": MOST_NODES}.get(task)
    if room is None:
        size = _digits(tokens)
    else:
        greatest = min(room, most or room)
        smallest = min(least or greatest // 2 + 1, greatest)
        size = round(smallest * (greatest / smallest) ** draw.random())
    problem, begin = _MAKE[task](draw, size)
    shared = ids(problem)
    found = []
    for _ in range(number):
        own, steps = begin(draw)
        found.append(Chain(shared + ids(own), len(shared), list(_cut(map(ids, steps), tokens))))
    return found


def _cut(steps: Iterator[list[int]], tokens: int) -> Iterator[list[int]]:
    """Yield steps until they have so many tokens; the last one is cut."""
    # no step is empty
    for step in islice(steps, tokens):
        yield step[:tokens]
        tokens -= len(step)
        if tokens <= 0:
            return


def right_tokens(chain: Chain, answer: list[int]) -> int:
    """Return how many tokens an answer begins with that are the chain's."""
    pairs = zip(chain.answer, answer, strict=False)
    return next((number for number, (own, other) in enumerate(pairs) if own != other), len(answer))


def right_steps(chain: Chain, tokens: int) -> int:
    """Return how many steps of a chain its first tokens make up."""
    ends = accumulate(map(len, chain.steps))
    return sum(end <= tokens for end in ends)
