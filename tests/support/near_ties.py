# SPDX-License-Identifier: Apache-2.0
"""Answers of an engine in 16 bits against the oracle in 32: equal, except where two tokens are nearly as likely.

The oracle reads the prompt and the answer that the engine gave, so that every token of the answer is judged after those
that stand before it, also behind one that the oracle would not have chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from benchmarks.common import tiny_model

# How far the oracle's logit of a token may be below that of its best one, by the dtype of the engine. Logits of the tiny
# models have a standard deviation of about 1.3; the best two of 512 are 0.4 apart in the mean, and a token that has
# nothing to do with the request is 4 below the best.
BOUND = {torch.float32: 0.02, torch.float16: 0.05, torch.bfloat16: 0.25}
# of the tokens of all answers of a test, how many are to be the oracle's best
BEST_SHARE = 0.8


@dataclass
class Tally:
    """Judge answers of one engine, and count.

    Attributes:
        folder: of the model; preset: of the engine's cache; dtype: of the engine.
        tokens, best: tokens that were judged, and those that are the oracle's best.
        worst: how far below the best one any token was.
    """

    folder: str
    preset: str
    dtype: torch.dtype
    tokens: int = 0
    best: int = 0
    worst: float = 0.0

    def judge(self, prompt: Sequence[int], answer: Sequence[int], cached: int = 0) -> None:
        """Compare a greedy answer with the oracle.

        Args:
            cached: tokens of the prompt that came from the prefix cache.

        Raises:
            AssertionError: a token is further below the oracle's best than `BOUND`.
        """
        logits = tiny_model.logits(self.folder, [*prompt, *answer], self.preset, cached=cached)
        chosen = logits[len(prompt) - 1 : -1]
        below = chosen.amax(-1) - chosen.gather(-1, torch.tensor(answer)[:, None])[:, 0]
        self.tokens += len(answer)
        self.best += int((below == 0).sum())
        self.worst = max(self.worst, float(below.max()))
        bound = BOUND[self.dtype]
        assert self.worst <= bound, (
            f"{len(prompt)} tokens, {cached} of them cached: answer {list(answer)} has tokens "
            f"{[round(x, 3) for x in below.tolist()]} below the oracle's best, more than {bound}"
        )

    def close(self) -> None:
        """Print the figures.

        Raises:
            AssertionError: too few tokens are the oracle's best, so that the near ties are none.
        """
        print(f"near ties: {self.best} of {self.tokens} tokens are the oracle's best, others up to {self.worst:.3f} off")
        assert self.best >= BEST_SHARE * self.tokens > 0, f"{self.best} of {self.tokens} tokens are the oracle's best"
