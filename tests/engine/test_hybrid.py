# SPDX-License-Identifier: Apache-2.0
"""Models in which some layers keep states instead of keys and values: SGLang's own layers and prefix tree for those."""

from __future__ import annotations

import functools

import hybrids
import pytest
import states_on_cpu
from hybrids import DELTA, HAS_PREFIX_CACHE, MAMBA2, OPTIONS, PRESET, STEP, TWO_RANKS

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers, flush, prompt

NEW = 8
FAMILIES = list(dict.fromkeys([DELTA, *MAMBA2, "qwen3_next"]))
# of a step SGLang keeps one state, that of its last whole chunk
CHUNKS = {"falcon_h1": 256, "granitemoehybrid": 256}
steady = functools.partial(hybrids.steady, new_tokens=NEW)
needs_prefix_cache = pytest.mark.skipif(not HAS_PREFIX_CACHE, reason="this SGLang saves states of other tokens")


def families(*quick: str) -> list:
    """Return the parameters of a test that every family goes through, those that are not quick as `long`."""
    return [pytest.param(name, marks=() if name in quick else pytest.mark.long) for name in FAMILIES]


@pytest.fixture(scope="module", autouse=True)
def states(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        states_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        yield


@pytest.fixture(scope="module", params=families(DELTA, "nemotron_h"))
def hybrid(request, start_engine, tmp_path_factory):
    """Return (engine, folder of its model, name of its family)."""
    folder = tiny_model.save(tmp_path_factory.mktemp(request.param), request.param)
    with start_engine(model_path=folder, kv_cache_dtype=PRESET, **OPTIONS) as engine:
        yield engine, folder, request.param


@pytest.mark.parametrize("length", [127, 128, 129, 300, 520])
def test_answer_of_a_hybrid_is_the_oracles(hybrid, length):
    engine, folder, _ = hybrid
    tokens, expected = steady(folder, length)
    flush(engine)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected


@needs_prefix_cache
def test_a_hit_at_a_checkpoint_amid_a_step_is_the_oracles(hybrid):
    engine, folder, _ = hybrid
    tokens = prompt(300, seed=300)
    longer, expected = steady(folder, 372, after=tokens, cached=256)
    flush(engine)
    answers(engine, [tokens], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 256 and hit["tokens"] == expected


@needs_prefix_cache
def test_a_hit_that_is_shorter_than_the_shared_pages_is_the_oracles(hybrid):
    engine, folder, family = hybrid
    tokens, chunk = prompt(650, seed=650), CHUNKS.get(family, 128)
    # there are 512 tokens in shared pages, but states only at the last chunk of either step
    kept = STEP // chunk * chunk
    longer, expected = steady(folder, 640, after=tokens[:600], cached=kept)
    flush(engine)
    answers(engine, [tokens], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == kept < 512 and hit["tokens"] == expected


@needs_prefix_cache
def test_a_hit_where_prompts_parted_before_is_the_oracles(hybrid):
    engine, folder, family = hybrid
    tokens, shared = prompt(STEP, seed=1), 300
    # those of 256 have kept a state there anyway
    first = 256 if family in CHUNKS else 0
    longer, expected = steady(folder, 370, after=tokens[:shared], cached=256)
    flush(engine)
    for branch in (tokens, tokens[:shared] + prompt(60, seed=2)):
        (answer,) = answers(engine, [branch], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert answer["cached"] == first and hit["cached"] == 256 and hit["tokens"] == expected


@needs_prefix_cache
def test_a_hit_of_a_prompt_that_began_amid_a_chunk_of_its_step_is_the_oracles(hybrid):
    engine, folder, _ = hybrid
    tokens = prompt(300, seed=4)
    longer, expected = steady(folder, 372, after=tokens, cached=256)
    flush(engine)
    # the first prompt is a step; meanwhile the others come, and share the next one
    answers(engine, [prompt(STEP, seed=5), prompt(60, seed=6), tokens], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 256 and hit["tokens"] == expected


@needs_prefix_cache
def test_a_second_turn_starts_from_a_state_that_decoding_saved(hybrid):
    engine, folder, _ = hybrid
    tokens, expected = steady(folder, 252)
    flush(engine)
    (first,) = answers(engine, [tokens], NEW)
    assert first["tokens"] == expected
    turn, expected = steady(folder, 300, after=tokens + first["tokens"], cached=256)
    (hit,) = answers(engine, [turn], NEW)
    assert hit["cached"] == 256 and hit["tokens"] == expected


def test_more_requests_than_rows_are_all_answered_as_alone(hybrid):
    engine, folder, _ = hybrid
    prompts, expected = zip(*[steady(folder, length) for length in (60, 130, 257, 140, 128, 90)], strict=True)
    flush(engine)
    together = answers(engine, list(prompts), NEW)
    assert [answer["tokens"] for answer in together] == list(expected)


def test_a_hybrid_with_large_key_channels_answers_as_one_without(start_engine, tmp_path):
    folder = tiny_model.save(tmp_path / "plain", DELTA)
    # a RoPE pair, and two channels that RoPE does not turn
    hard = hybrids.with_large_keys(folder, tmp_path / "hard", [3, 35, 100, 200])
    preset = "kvarn_k2v2_g128_canonical"
    tokens, expected = steady(folder, 300, preset=preset)
    # what two bits make of the answer where nobody balances the channels
    assert tiny_model.expected(hard, tokens, preset, new_tokens=NEW) != expected
    with start_engine(model_path=hard, kv_cache_dtype=preset, **OPTIONS) as engine:
        (miss,) = answers(engine, [tokens], NEW)
    assert miss["tokens"] == expected


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_retraction_changes_no_token_and_a_hit_reads_the_window_preset_from_records(
    family, start_engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "3")
    folder = tiny_model.save(tmp_path, family)
    prompts, expected = zip(*[steady(folder, length, preset="kvarn") for length in (330, 129, 60, 200)], strict=True)
    cached = 256 * HAS_PREFIX_CACHE
    longer, continued = steady(folder, 380, after=prompts[0], cached=cached, preset="kvarn")
    with start_engine(model_path=folder, kv_cache_dtype="kvarn", **OPTIONS) as engine:
        got = answers(engine, list(prompts), NEW)
        (hit,) = answers(engine, [longer], NEW)
        facts = engine.get_server_info()["internal_states"][0]["kvarn"]
    assert sum(answer["retractions"] for answer in got) > 0
    assert [answer["tokens"] for answer in got] == list(expected)
    assert hit["cached"] == cached and hit["tokens"] == continued
    assert (facts["states"], facts["max_requests"]) == (40, 4)
    sessions = {"8192": {"sessions": 1, "runs_out": "tokens"}} if HAS_PREFIX_CACHE else {}
    assert sessions.items() <= facts["cached_sessions"].items()


# SGLang 0.5.16 sums the states of Falcon-H1 wrongly, which is refused
RANKED = [name for name in FAMILIES if name != "falcon_h1" or HAS_PREFIX_CACHE]


@pytest.mark.long
@pytest.mark.parametrize("family", RANKED)
def test_two_ranks_answer_as_the_oracle(family, start_engine, tmp_path):
    folder = tiny_model.save(tmp_path, family, **TWO_RANKS.get(family, {}))
    tokens, expected = steady(folder, 300)
    longer, continued = steady(folder, 372, after=tokens, cached=256 * HAS_PREFIX_CACHE)
    with start_engine(model_path=folder, kv_cache_dtype=PRESET, tp_size=2, **OPTIONS) as engine:
        (miss,) = answers(engine, [tokens], NEW)
        (hit,) = answers(engine, [longer], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected
    assert hit["cached"] == 256 * HAS_PREFIX_CACHE and hit["tokens"] == continued
