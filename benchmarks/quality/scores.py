# SPDX-License-Identifier: Apache-2.0
"""How far one model's predictions are from another's, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise

import torch

from benchmarks.common.intervals import interval

BUCKETS = (0, 128, 256, 512, 1024, 2048, 4096, 8192)


@dataclass
class Scores:
    """Collect the scores of one cache over texts; every list has one tensor [T] per text, NaN where
    undefined.

    Attributes:
        divergence: KL(unquantised || cache) of the next-token distribution, in nats.
        flipped: 1.0 where the most likely next token differs.
        loss, exact_loss: negative log-likelihood of the text's next token, with and without the cache.
        seconds: time of the forward passes.
        finite: whether every logit was.
    """

    divergence: list[torch.Tensor] = field(default_factory=list)
    flipped: list[torch.Tensor] = field(default_factory=list)
    loss: list[torch.Tensor] = field(default_factory=list)
    exact_loss: list[torch.Tensor] = field(default_factory=list)
    seconds: float = 0.0
    finite: bool = True

    def add(self, exact: torch.Tensor, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        """Add one text: logits [T, V] without and with the cache, and its tokens int64 [T]."""
        self.finite = self.finite and bool(logits.isfinite().all())
        scores = [_score(exact[i : i + 256], logits[i : i + 256]) for i in range(0, len(tokens), 256)]
        divergence, flipped = (torch.cat(x) for x in zip(*scores, strict=True))
        self.divergence.append(divergence)
        self.flipped.append(flipped)
        self.loss.append(_loss(logits, tokens))
        self.exact_loss.append(_loss(exact, tokens))

    def summary(self, start: int, end: int) -> dict[str, float]:
        """Return the figures of the positions start .. end - 1 of every text."""
        divergence, flipped, loss, exact_loss = (
            torch.cat([text[start:end] for text in texts])
            for texts in (self.divergence, self.flipped, self.loss, self.exact_loss)
        )
        return {
            "kl_mean": divergence.mean().item(),
            "kl_median": divergence.median().item(),
            "kl_p99": divergence.quantile(0.99).item(),
            "flips": flipped.mean().item(),
            "perplexity": loss.nanmean().exp().item(),
            "perplexity_16bit": exact_loss.nanmean().exp().item(),
        }

    def ratio(self, other: Scores, start: int, end: int) -> tuple[float, float, float]:
        """Return (mean KL over that of another cache on the same texts, bounds of its 95 % interval).

        The interval is that of the bootstrap over texts.
        """
        means = [torch.stack([t[start:end].mean() for t in s.divergence]).double().cpu() for s in (self, other)]
        return interval(torch.stack(means, -1), lambda mean: mean[..., 0] / mean[..., 1])

    def buckets(self, context: int) -> dict[str, dict[str, float]]:
        """Return `summary` of each range of positions that the context reaches, named "start-end"."""
        edges = [edge for edge in BUCKETS if edge < context] + [context]
        return {f"{start}-{end}": self.summary(start, end) for start, end in pairwise(edges)}


def _score(exact: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    log_exact, log_own = exact.log_softmax(-1), logits.log_softmax(-1)
    divergence = (log_exact.exp() * (log_exact - log_own)).sum(-1).clamp_min(0.0)
    return divergence, (exact.argmax(-1) != logits.argmax(-1)).float()


def _loss(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the negative log-likelihood of the next token at each position, NaN at the last."""
    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    return torch.cat([losses, losses.new_full((1,), float("nan"))])
