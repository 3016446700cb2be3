# SPDX-License-Identifier: Apache-2.0
"""bench_drafts: which drafts and from where, and what accepted ones come to."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.common import intervals, models, tiny_model
from benchmarks.generation import bench_drafts
from benchmarks.generation.acceptance import accepted, ratio


def test_a_step_counts_once_however_long_its_text_is():
    assert accepted([(10, 30), (90, 70)]) == 1.0


def test_ratio_of_caches_that_differ_alike_on_every_text_has_no_width():
    base = [(10, 20), (10, 30), (20, 40)]
    assert ratio(base, base) == (1, 1, 1)
    assert ratio([(10, 18), (10, 27), (20, 36)], base) == pytest.approx((0.9, 0.9, 0.9))


def test_ratio_is_of_the_same_texts_in_every_draw(monkeypatch):
    # texts differ much, caches little
    base = [(10, n) for n in range(1, 31)]
    own = [(10, n + n % 2 / 5) for n in range(1, 31)]
    value, low, high = ratio(own, base)
    assert low < value < high and high - low < 0.01
    # the interval of one text is as wide as the difference to the other
    monkeypatch.setattr(intervals, "RESAMPLES", 1000)
    assert ratio([(1, 1), (1, 2)], [(1, 1), (1, 1)]) == (1.5, 1, 2)


def characters(text: str, **kwargs) -> SimpleNamespace:
    return SimpleNamespace(input_ids=[ord(c) for c in text])


def test_ngrams_draft_from_a_repetition_and_a_model_from_plain_text():
    args = bench_drafts.parse(["--texts", "code", "manual", "--context", "200", "--new-tokens", "10"])
    for piece in bench_drafts.pieces(args, characters, models.NGRAM):
        assert len(piece) == 210 and piece[100:200] == piece[:100] and piece[200:] == piece[:10]
    plain = bench_drafts.pieces(args, characters, models.STANDALONE)
    assert [len(piece) for piece in plain] == [210, 210]
    assert all(piece[100:200] != piece[:100] for piece in plain)
    found = [bench_drafts.places(args, number) for number in (0, 1)]
    assert found[0] != found[1] and all(len(set(own)) == 16 and 116 <= min(own) <= max(own) < 200 for own in found)


def test_a_shortened_model_is_the_model_without_these_layers(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_made", lambda name: tmp_path / name)
    whole = tmp_path / "whole"
    whole.mkdir()
    tiny_model.save(whole)
    short = models._shortened(whole, (0,))
    assert models._shortened(whole, (0,)) == short != models._shortened(whole, (1,))
    wanted, got = (LlamaForCausalLM.from_pretrained(folder) for folder in (whole, short))
    wanted.model.layers = torch.nn.ModuleList([wanted.model.layers[1]])
    wanted.model.layers[0].self_attn.layer_idx = 0
    tokens = torch.tensor([tiny_model.prompt(20, seed=0)])
    with torch.inference_mode():
        assert torch.equal(got(tokens).logits, wanted(tokens).logits)


def test_the_draft_is_of_the_model_it_drafts_for():
    with pytest.raises(ValueError, match="other models have no draft here"):
        models.draft_arguments(models.TINY, models.STANDALONE, 4)
