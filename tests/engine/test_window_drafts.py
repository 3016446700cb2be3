# SPDX-License-Identifier: Apache-2.0
"""Drafts of models with sliding windows: verified by SGLang's backend in windows of its own, or from records."""

from __future__ import annotations

import functools

import draft_models
import drafts_on_cpu
import hybrids
import pytest
from sglang_kvarn import compat

from benchmarks.common import models, tiny_model
from benchmarks.common.tiny_model import answers, flush

NEW = 14
NGRAM = models.draft_arguments(models.TINY, models.NGRAM, 8)
# SGLang before 0.5.23 keeps sliding windows for longer
RATIO = 0.1 if compat.is_since("0.5.23") else 0.2
# By family: preset, and arguments of its engine, the first of which has room for the sliding windows of few requests.
# The tiny Mellum repeats itself, so that drafts are right before anything was answered
FAMILIES = {
    "gpt_oss": ("kvarn_canonical", {"moe_runner_backend": "triton", "swa_full_tokens_ratio": RATIO}),
    "laguna": ("kvarn_canonical", {}),
    "step3p5": ("kvarn_canonical", {}),
    "olmo3": ("kvarn", {}),
    "gemma3_text": ("kvarn_canonical", {}),
}
LONG = [pytest.param(name, marks=pytest.mark.long) for name in ("laguna", "gemma3_text", "step3p5")]


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # SGLang counts every page of both pools in every step
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        drafts_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        drafts_on_cpu.keep_ngrams(patch)
        # Gemma 3 and experts of gpt-oss compile functions of a few lines, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module", params=["gpt_oss", "olmo3", *LONG])
def drafting(request, start_engine, tmp_path_factory):
    """Return (engine, what makes a prompt and the answer of the oracle)."""
    family = request.param
    if family in (*tiny_model.WINDOWS_IN_RECORDS, "step3p5") and not compat.is_since("0.5.23"):
        pytest.skip("refused with this SGLang")
    preset, options = FAMILIES[family]
    folder = tiny_model.save(tmp_path_factory.mktemp(family), family)
    with start_engine(model_path=folder, kv_cache_dtype=preset, **options, **NGRAM) as engine:
        yield engine, functools.partial(hybrids.steady, folder, preset=preset, new_tokens=NEW)


def varied(steady, length: int) -> tuple[list[int], list[int], int]:
    """Return a prompt, its answer, and the place of a token that is the first of its kind in the answer's later half.

    Some of the models repeat themselves, so that drafts are right before anything was answered.
    """
    for token in range(tiny_model.VOCABULARY):
        tokens, expected = steady(length, after=[token])
        if fresh := [n for n in range(NEW // 2, NEW - 1) if expected[n] not in expected[:n]]:
            return tokens, expected, fresh[0]
    raise AssertionError("every answer repeats itself")


@pytest.mark.parametrize("length", [60, 300])
def test_answers_are_the_oracles_whether_drafts_are_rejected_or_accepted(drafting, length):
    engine, steady = drafting
    tokens, expected, _ = varied(steady, length)
    found = []
    # at the second time the drafts are what was answered at the first
    for _ in range(2):
        flush(engine)
        found += answers(engine, [tokens], NEW)
    assert [(answer["tokens"], answer["cached"]) for answer in found] == [(expected, 0)] * 2
    first, second = (answer["drafts_accepted"] for answer in found)
    assert first < second and second >= NEW // 2


def test_an_answer_that_stops_amid_accepted_drafts_serves_the_next_turn(drafting):
    engine, steady = drafting
    # longer than a window; its page ends behind the fourth token of the answer
    tokens, expected, stop = varied(steady, 380)
    flush(engine)
    answers(engine, [tokens], NEW)
    flush(engine)
    sampling = {"temperature": 0, "max_new_tokens": NEW, "stop_token_ids": [expected[stop]]}
    output = engine.generate(input_ids=tokens, sampling_params=sampling)
    assert output["output_ids"] == expected[: stop + 1] and output["meta_info"]["finish_reason"]["type"] == "stop"
    assert output["meta_info"]["spec_num_correct_drafts"] >= 4
    turn, continued = steady(450, after=tokens + expected[: stop + 1], cached=384)
    (hit,) = answers(engine, [turn], NEW)
    assert hit["cached"] == 384 and hit["tokens"] == continued


def test_more_requests_than_rows_are_all_answered_as_alone(drafting):
    engine, steady = drafting
    prompts, expected = zip(*[steady(length) for length in (60, 250, 120, 330, 90)], strict=True)
    for _ in range(2):
        flush(engine)
        together = answers(engine, list(prompts), NEW)
        assert [answer["tokens"] for answer in together] == list(expected)
    assert sum(answer["drafts_accepted"] for answer in together) > NEW


@pytest.mark.parametrize(
    ("family", "algorithm"), [("gpt_oss", "EAGLE3"), pytest.param("laguna", "EAGLE", marks=pytest.mark.long)]
)
def test_a_head_drafts_from_a_cache_of_its_own(start_engine, tmp_path, capfd, family, algorithm):
    preset, options = FAMILIES[family]
    folder = tiny_model.save(tmp_path / "model", family)
    drafted = draft_models.arguments(algorithm, tmp_path / "draft") | {"log_level": "info"}
    # longer than a window; its second page ends amid the answer
    tokens, expected = hybrids.steady(folder, 380, preset=preset, new_tokens=NEW)
    turn, continued = hybrids.steady(folder, 450, after=tokens + expected, cached=384, preset=preset, new_tokens=NEW)
    with start_engine(model_path=folder, kv_cache_dtype=preset, **options, **drafted) as engine:
        (first,) = answers(engine, [tokens], NEW)
        (hit,) = answers(engine, [turn], NEW)
    assert first["tokens"] == expected and first["cached"] == 0
    assert hit["tokens"] == continued and hit["cached"] == 384
    # 2 KV heads of 64 channels in float32
    assert "the draft model keeps 1,024 bytes of a token" in capfd.readouterr().err
