# SPDX-License-Identifier: Apache-2.0
"""bench_quality scores predictions, and draws its texts by seed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import scores, texts


def test_scores_of_equal_predictions_are_zero_and_of_a_swap_are_not():
    torch.manual_seed(0)
    exact, tokens = torch.randn(8, 50), torch.randint(50, (8,))
    swapped = exact.clone()
    swapped[3, [exact[3].argmax(), exact[3].argmin()]] = exact[3, [exact[3].argmin(), exact[3].argmax()]]
    same, other = scores.Scores(), scores.Scores()
    same.add(exact, exact, tokens)
    other.add(exact, swapped, tokens)
    assert same.summary(0, 8)["kl_mean"] == 0 and same.summary(0, 8)["flips"] == 0
    assert other.summary(0, 8)["flips"] == pytest.approx(1 / 8)
    assert other.summary(3, 4)["kl_mean"] > 0 and other.summary(4, 8)["kl_mean"] == 0


def test_text_is_chosen_by_the_seed(tmp_path):
    def tokenizer(text, add_special_tokens=True):
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [ord(character) for character in text])

    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(4000)))
    pieces = [texts.load(str(path), 64, seed, tokenizer) for seed in (0, 0, 1)]
    assert pieces[0] == pieces[1] != pieces[2]
    # the token that begins every text, then the text
    assert len(pieces[0].tokens) == 64 and bytes(pieces[0].tokens[:6]) == b"\x01line "
    with pytest.raises(ValueError, match="lower --context"):
        texts.load(str(path), 100_000, 0, tokenizer)
