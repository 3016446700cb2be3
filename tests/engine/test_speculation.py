# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding in a real engine: with drafts or without, the same tokens."""

from __future__ import annotations

import asyncio

import draft_models
import drafts_on_cpu
import pytest
import torch
from sglang_kvarn import compat
from texts import REGEX, by_the_regex, with_texts

from benchmarks.common import models, tiny_model
from benchmarks.common.tiny_model import answers, expected, flush, prompt

NEW = 20
NGRAM = models.draft_arguments(models.TINY, models.NGRAM, 8)
KVARN, CANONICAL = "kvarn", "kvarn_canonical"
# whether SGLang lets a request that drafts by EAGLE decode in the step of a prompt
MIXES = hasattr(compat.resolve("sglang.srt.speculative.spec_info.SpeculativeAlgorithm"), "supports_mixed_chunk")


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # SGLang counts every page of every step
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        drafts_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        yield


@pytest.fixture(scope="module", params=[KVARN, pytest.param(CANONICAL, marks=pytest.mark.long)])
def engine(request, start_engine, model):
    options = {"model_path": with_texts(model), "skip_tokenizer_init": False, **NGRAM}
    with start_engine(kv_cache_dtype=request.param, **options) as engine:
        engine.preset = request.param
        yield engine


@pytest.mark.parametrize("length", [60, 120, 250, 380])
def test_answers_are_the_oracles_whether_drafts_are_rejected_or_accepted(engine, model, length):
    flush(engine)
    tokens = prompt(length, seed=length)
    (first,) = answers(engine, [tokens], NEW)
    assert first["tokens"] == expected(model, tokens, engine.preset, new_tokens=NEW)
    # now the drafts are what was answered before
    (again,) = answers(engine, [tokens], NEW)
    assert again["tokens"] == expected(model, tokens, engine.preset, cached=again["cached"], new_tokens=NEW)
    assert again["cached"] == (length - 1) // 128 * 128
    assert first["drafts_accepted"] < NEW // 2
    # a window preset may answer a hit otherwise than a miss
    assert again["drafts_accepted"] > NEW // 2 or again["tokens"] != first["tokens"]


def test_a_page_that_accepted_drafts_filled_serves_the_next_turn(engine, model):
    tokens = prompt(117, seed=1)
    wanted = expected(model, tokens, engine.preset, new_tokens=NEW)
    flush(engine)
    for _ in range(2):
        (answer,) = answers(engine, [tokens], NEW)
        assert answer["tokens"] == wanted and answer["cached"] == 0
    turn = tokens + wanted + prompt(30, seed=2)
    (hit,) = answers(engine, [turn], NEW)
    assert hit["cached"] == 128
    assert hit["tokens"] == expected(model, turn, engine.preset, cached=128, new_tokens=NEW)


def test_more_requests_than_rows_are_all_answered_as_alone(engine, model):
    flush(engine)
    prompts = [prompt(length, seed=length) for length in (60, 120, 250, 126, 200, 90)]
    together = answers(engine, prompts, NEW)
    wanted = [expected(model, tokens, engine.preset, new_tokens=NEW) for tokens in prompts]
    assert [answer["tokens"] for answer in together] == wanted


def prompt_whose_answer_has(model: str, token: int) -> list[int]:
    """Return a prompt in whose answer this token is somewhere behind the first; the cache changes few choices."""
    plain = tiny_model.load(model)
    for seed in range(0, 1000, 50):
        prompts = torch.tensor([prompt(40, seed + n) for n in range(50)])
        with torch.inference_mode():
            said = plain.generate(prompts, max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False, pad_token_id=0)
        for tokens in said[(said[:, 41:] == token).any(1), :40].tolist():
            if token in expected(model, tokens, KVARN, new_tokens=NEW)[1:]:
                return tokens
    raise AssertionError(f"no answer has {token}")


def test_a_token_that_fills_up_a_short_chain_is_not_accepted_out_of_its_place(engine, model):
    """SGLang's fill, 0, follows the root of a chain, wherever it stands behind it."""
    tokens = prompt_whose_answer_has(model, 0)
    flush(engine)
    # drafts_on_cpu puts a wrong draft before the fill
    (got,) = answers(engine, [tokens], NEW)
    assert got["tokens"] == expected(model, tokens, engine.preset, new_tokens=NEW)


def test_an_answer_with_a_grammar_is_the_oracles_beside_one_without(engine, model):
    flush(engine)
    tokens = prompt(120, seed=5)
    wanted = [
        expected(model, tokens, engine.preset, new_tokens=13, allowed=by_the_regex),
        expected(model, tokens, engine.preset, new_tokens=NEW),
    ]
    # what was answered to the same prompt without a grammar is a draft that it forbids, and the other way round
    for _ in range(3):
        got = answers(engine, [tokens] * 2, NEW, regexes=[REGEX, None])
        assert [answer["tokens"] for answer in got] == wanted
    assert all(answer["drafts_accepted"] > 6 for answer in got)
    # the answer ended, amid accepted drafts, in a page that it had filled
    turn = tokens + wanted[0][:-1] + prompt(30, seed=2)
    (hit,) = answers(engine, [turn], NEW, regexes=[REGEX])
    assert hit["cached"] == 128
    assert hit["tokens"] == expected(model, turn, engine.preset, cached=128, new_tokens=13, allowed=by_the_regex)


def test_overlap_retraction_and_pages_that_end_while_drafts_are_verified(start_engine, model, monkeypatch):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "3")
    drafts_on_cpu.allow_overlap(monkeypatch)
    prompts, regexes = [prompt(length, seed=length) for length in (370, 120, 60, 250)], [None, REGEX, None, None]
    options = {"model_path": with_texts(model), "skip_tokenizer_init": False, **NGRAM}
    with start_engine(kv_cache_dtype=CANONICAL, **options) as engine:
        rounds = [answers(engine, prompts, NEW, regexes=regexes) for _ in range(2)]
    wanted = [expected(model, tokens, CANONICAL, new_tokens=NEW) for tokens in prompts]
    wanted[1] = expected(model, prompts[1], CANONICAL, new_tokens=13, allowed=by_the_regex)
    for got in rounds:
        assert [answer["tokens"] for answer in got] == wanted
    assert sum(answer["retractions"] for got in rounds for answer in got) > 0
    assert sum(answer["cached"] for answer in rounds[1]) > 0


def test_two_ranks_accept_the_same_drafts(start_engine, model, monkeypatch):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    prompts = [prompt(length, seed=length) for length in (120, 250)]
    wanted = [expected(model, tokens, CANONICAL, new_tokens=NEW) for tokens in prompts]
    turn = prompts[0] + wanted[0] + prompt(30, seed=2)
    with start_engine(kv_cache_dtype=CANONICAL, tp_size=2, **NGRAM) as engine:
        rounds = [answers(engine, prompts, NEW) for _ in range(2)]
        (hit,) = answers(engine, [turn], NEW)
    for got in rounds:
        assert [answer["tokens"] for answer in got] == wanted
    assert all(answer["drafts_accepted"] > NEW // 2 for answer in rounds[1])
    # of a page that accepted drafts filled, on both ranks
    assert hit["cached"] == 128 and hit["tokens"] == expected(model, turn, CANONICAL, new_tokens=NEW)


@pytest.mark.parametrize(
    "algorithm", ["STANDALONE", *(pytest.param(name, marks=pytest.mark.long) for name in ("EAGLE", "EAGLE3"))]
)
def test_a_draft_model_keeps_a_cache_of_its_own(start_engine, model, tmp_path, algorithm):
    draft = draft_models.arguments(algorithm, tmp_path / "draft", model=model)
    tokens = prompt(121, seed=3)
    wanted = expected(model, tokens, KVARN, new_tokens=NEW)
    with start_engine(kv_cache_dtype=KVARN, **draft) as engine:
        (first,) = answers(engine, [tokens], NEW)
        turn = tokens + wanted + prompt(30, seed=2)
        (hit,) = answers(engine, [turn], 8)
    assert first["tokens"] == wanted
    # a draft that is the same model, with a cache that is not quantised, is mostly right
    assert (first["drafts_accepted"] > NEW // 4) == (algorithm == "STANDALONE")
    assert hit["cached"] == 128 and hit["tokens"] == expected(model, turn, KVARN, cached=128, new_tokens=8)


def answers_amid(engine, prompts: list[list[int]], new_tokens: list[int]) -> list[dict]:
    """Return the outputs for two prompts, the second of which comes when the first one is being answered."""
    first, second = prompts
    sampling, own = ({"temperature": 0, "max_new_tokens": count, "ignore_eos": True} for count in new_tokens)

    async def generate():
        late, output = None, None
        async for output in await engine.async_generate(input_ids=first, sampling_params=sampling, stream=True):
            if late is None and output["meta_info"]["completion_tokens"] > 2:
                late = asyncio.ensure_future(engine.async_generate(input_ids=second, sampling_params=own))
        return [output, await late]

    return engine.loop.run_until_complete(generate())


@pytest.mark.long
@pytest.mark.parametrize(("preset", "overlap"), [(KVARN, False), (CANONICAL, True)])
def test_a_request_goes_on_with_drafts_after_steps_that_it_shared_with_a_prompt(
    start_engine, model, tmp_path, monkeypatch, preset, overlap
):
    if overlap:
        drafts_on_cpu.allow_overlap(monkeypatch)
    eagle = draft_models.arguments("EAGLE", tmp_path / "draft") | {"enable_mixed_chunk": True}
    # the page of the first ends in a step of the second, which has eight of them
    prompts, new = [prompt(length, seed=length) for length in (119, 2000)], [30, 8]
    asked = list(zip(prompts, new, strict=True))
    wanted = [expected(model, tokens, preset, new_tokens=count) for tokens, count in asked]
    turn = prompts[0] + wanted[0] + prompt(30, seed=2)
    with start_engine(kv_cache_dtype=preset, **eagle) as engine:
        got = answers_amid(engine, prompts, new)
        (hit,) = answers(engine, [turn], 8)
    assert [output["output_ids"] for output in got] == wanted
    facts = got[0]["meta_info"]
    # what neither the prompt's own step nor those with drafts gave; 0.5.16 shares no step
    shared = new[0] - 1 - facts["spec_verify_ct"] - facts["spec_num_correct_drafts"]
    assert (shared >= 6) == MIXES and facts["spec_verify_ct"] > 6
    assert hit["cached"] == 128 and hit["tokens"] == expected(model, turn, preset, cached=128, new_tokens=8)
