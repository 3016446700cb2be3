# SPDX-License-Identifier: Apache-2.0
"""Sessions of seeded synthetic tokens: a shared prompt, a first task, then turns on top of each other."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field

import numpy as np

# token ids below this one are special in most vocabularies
FIRST_TOKEN = 3


@dataclass(frozen=True)
class Turn:
    """Describe one request of a session.

    Attributes:
        token_ids: what the turn adds to the history, or the whole prompt if `whole`.
        output_tokens: tokens to generate, whatever they are.
        think_seconds: pause between the answer before and this request.
        whole: the prompt is token_ids alone; the history is not repeated (an agent that rewrote its context).
    """

    token_ids: list[int]
    output_tokens: int
    think_seconds: float = 0.0
    whole: bool = False

    def prompt(self, history: list[int]) -> list[int]:
        """Return the token ids to send after this history (prompts and answers so far)."""
        return list(self.token_ids) if self.whole else history + list(self.token_ids)


@dataclass(frozen=True)
class Workload:
    """Hold what all sessions share, and the sessions.

    Attributes:
        shared: token ids in front of every session; sent once before the first session starts.
        sessions: the turns of each session, in order.
    """

    shared: list[int]
    sessions: list[list[Turn]]

    def take(self, count: int) -> Workload:
        """Return the first sessions; the loader of a trace may have fewer.

        Raises:
            ValueError: there are not that many.
        """
        if count > len(self.sessions):
            raise ValueError(
                f"expected at least {count} sessions, got {len(self.sessions)}: "
                "lower --concurrency or give a longer trace"
            )
        return Workload(self.shared, self.sessions[:count])


@dataclass(frozen=True)
class Shape:
    """Describe synthetic sessions; all lengths in tokens.

    The defaults are a coding agent: 8K of system prompt and tools that all sessions share, a task of 10K,
    then 12 tool results of 2K, with 200 tokens of answer each: 45,608 tokens at the end. Think times are
    drawn between half and one and a half times `think_seconds`.
    """

    system_tokens: int = 8192
    task_tokens: int = 10240
    turns: int = 12
    turn_tokens: int = 2048
    output_tokens: int = 200
    think_seconds: float = 2.0
    vocabulary: int = 30_000
    seed: int = 0

    def as_dict(self) -> dict:
        """Return the fields, for the result files."""
        return asdict(self)

    def tokens(self, count: int, *key: int) -> list[int]:
        """Return random token ids that depend on the seed and the key alone."""
        generator = np.random.default_rng([self.seed, *key])
        return generator.integers(FIRST_TOKEN, self.vocabulary, count).tolist()

    def session(self, number: int) -> list[Turn]:
        """Return the turns of one session, equal whatever the number of sessions."""
        think = np.random.default_rng([self.seed, 2, number]).uniform(0.5, 1.5, self.turns) * self.think_seconds
        first = Turn(self.tokens(self.task_tokens, 1, number, 0), self.output_tokens)
        rest = [
            Turn(self.tokens(self.turn_tokens, 1, number, n + 1), self.output_tokens, float(think[n]))
            for n in range(self.turns)
        ]
        return [first, *rest]

    def workload(self, sessions: int) -> Workload:
        """Return the shared prompt and that many sessions."""
        return Workload(self.tokens(self.system_tokens, 0), [self.session(n) for n in range(sessions)])


@dataclass
class History:
    """Follow one session: what it has sent and received, and what a cache without limits holds of it.

    Attributes:
        shared: token ids that the server has seen before the session.
        tokens: prompt and answer of the last turn; the shared prompt at first.
    """

    shared: list[int]
    tokens: list[int] = field(init=False)
    computed: list[np.ndarray] = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = list(self.shared)
        self.computed = [np.asarray(self.shared, np.int64)]

    def add(self, prompt: list[int], output: list[int]) -> None:
        """Note a finished turn.

        The last token of an answer counts: SGLang's overlapped scheduler has mostly begun the step after it
        when it learns that the request is finished, and caches what that step wrote. Where a prefill came
        between, the real hit is one token, and so at most one page, below the theoretical one.
        """
        self.tokens = prompt + output
        sent = np.asarray(self.tokens, np.int64)
        # a sequence that the next one extends adds nothing
        self.computed = [old for old in self.computed if not _starts_with(sent, old)] + [sent]


def _starts_with(tokens: np.ndarray, prefix: np.ndarray) -> bool:
    return len(prefix) <= len(tokens) and bool((tokens[: len(prefix)] == prefix).all())
