# SPDX-License-Identifier: Apache-2.0
"""Answers of an engine in 16 bits against the oracle in 32: equal, except where two tokens are nearly as likely.

The oracle reads the prompt and the answer that the engine gave, so that every token of the answer is judged after those
that stand before it, also behind one that the oracle would not have chosen. What counts is by how much the oracle's
logit of a token is below that of its best one, 0 for most tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.common import tiny_model

# The most that tokens may be below the best one in the mean, of all answers of a test and of each, by the dtype of the
# engine. Logits of the tiny models have a standard deviation of 1.3, and two bits are few: a rounding moves single ones
# by 0.5. In the mean of nine answers of 20 tokens, on a CPU:
#     right answers                     float32 0.0004, float16 0.004, bfloat16 0.031; of one answer 0.004, 0.011, 0.05
#     right answers to something else   another prefix hit 0.22, the cache without its window 0.28, another page 2.1
MEAN = {torch.float32: 0.005, torch.float16: 0.02, torch.bfloat16: 0.1}
MEAN_OF_EACH = {torch.float32: 0.03, torch.float16: 0.1, torch.bfloat16: 0.25}


@dataclass
class Tally:
    """Judge the answers of one engine.

    Attributes:
        folder: of the model; preset: of the engine's cache; dtype: of the engine.
        below: of every token that was judged.
    """

    folder: str
    preset: str
    dtype: torch.dtype
    below: list[float] = field(default_factory=list)

    def judge(self, prompt: Sequence[int], answer: Sequence[int], cached: int = 0) -> None:
        """Compare a greedy answer with the oracle.

        Args:
            cached: tokens of the prompt that came from the prefix cache.

        Raises:
            AssertionError: it is no right answer.
        """
        logits = tiny_model.logits(self.folder, [*prompt, *answer], self.preset, cached=cached)
        chosen = logits[len(prompt) - 1 : -1]
        below = (chosen.amax(-1) - chosen.gather(-1, torch.tensor(answer)[:, None])[:, 0]).tolist()
        self.below += below
        assert sum(below) <= MEAN_OF_EACH[self.dtype] * len(below), (
            f"{len(prompt)} tokens, {cached} of them cached: answer {list(answer)} has tokens "
            f"{[round(x, 3) for x in below]} below the oracle's best, in the mean more than {MEAN_OF_EACH[self.dtype]}"
        )

    def close(self) -> None:
        """Print the figures.

        Raises:
            AssertionError: in the mean of all answers, tokens are further below the best than near ties.
        """
        mean, best = sum(self.below) / len(self.below), self.below.count(0.0)
        print(
            f"near ties: {best} of {len(self.below)} tokens are the oracle's best, in the mean they are {mean:.4f} "
            f"below it, at most {max(self.below):.3f}"
        )
        assert mean <= MEAN[self.dtype], f"tokens are {mean:.4f} below the oracle's best, more than {MEAN[self.dtype]}"
