# SPDX-License-Identifier: Apache-2.0
"""Models in which some layers keep states instead of keys and values: SGLang's own layers and prefix tree for those."""

from __future__ import annotations

import itertools

import gdn_on_cpu
import pytest
from sglang_kvarn import compat

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers, flush, prompt

PRESET = "kvarn_canonical"
NEW = 8
# A layer of states sums in another order than transformers does, so that a key can fall on the other side of a rounding
# edge: a logit moves by up to 2e-3. Prompts are those whose answer does not hang on as little.
MARGIN = 0.02
# dense layers, which 0.5.16 knows only as a part of a model that sees; a mixture of experts in every layer
FAMILY = "qwen3_5_text" if compat.has_argument("attn_dp_size") else "qwen3_next"


@pytest.fixture(scope="module", autouse=True)
def gdn(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        gdn_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        yield


@pytest.fixture(scope="module", params=[FAMILY, pytest.param("qwen3_next", marks=pytest.mark.long)])
def hybrid(request, start_engine, tmp_path_factory):
    """Return (engine, folder of its model)."""
    folder = tiny_model.save(tmp_path_factory.mktemp(request.param), request.param)
    with start_engine(model_path=folder, kv_cache_dtype=PRESET, max_mamba_cache_size=40) as engine:
        yield engine, folder


def steady(
    folder: str, length: int, *, after: list[int] = (), cached: int = 0, preset: str = PRESET
) -> tuple[list[int], list[int]]:
    """Return a prompt of so many tokens that begins with others, and the oracle's answer by a wide enough margin."""
    for seed in itertools.count(length):
        tokens = [*after, *prompt(length - len(after), seed)]
        found, margin = tiny_model.expected_with_margin(folder, tokens, preset, cached=cached, new_tokens=NEW)
        if margin > MARGIN:
            return tokens, found


@pytest.mark.parametrize("length", [127, 128, 129, 300, 520])
def test_answer_of_a_hybrid_is_the_oracles(hybrid, length):
    engine, folder = hybrid
    tokens, expected = steady(folder, length)
    flush(engine)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected


# the state after 256 tokens is that of the last whole multiple of 128 of the first prompt; or there are shared pages of
# 384 tokens, but states only after each chunk of 256
@pytest.mark.parametrize(
    ("first", "shared", "length"), [(300, 300, 372), (520, 390, 460)], ids=["whole prompt", "shorter than the pages"]
)
def test_a_hit_at_a_checkpoint_is_the_oracles(hybrid, first, shared, length):
    engine, folder = hybrid
    tokens = prompt(first, seed=first)
    longer, expected = steady(folder, length, after=tokens[:shared], cached=256)
    flush(engine)
    answers(engine, [tokens], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 256 and hit["tokens"] == expected


def test_a_second_turn_starts_from_a_state_that_decoding_saved(hybrid):
    engine, folder = hybrid
    tokens, expected = steady(folder, 252)
    flush(engine)
    (first,) = answers(engine, [tokens], NEW)
    assert first["tokens"] == expected
    turn, expected = steady(folder, 300, after=tokens + first["tokens"], cached=256)
    (hit,) = answers(engine, [turn], NEW)
    assert hit["cached"] == 256 and hit["tokens"] == expected


def test_more_requests_than_rows_are_all_answered_as_alone(hybrid):
    engine, folder = hybrid
    prompts, expected = zip(*[steady(folder, length) for length in (60, 130, 257, 140, 128, 90)], strict=True)
    flush(engine)
    together = answers(engine, list(prompts), NEW)
    assert [answer["tokens"] for answer in together] == list(expected)


def test_retraction_changes_no_token_and_a_hit_reads_the_window_preset_from_records(
    start_engine, tmp_path, monkeypatch
):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "3")
    folder = tiny_model.save(tmp_path, FAMILY)
    prompts, expected = zip(*[steady(folder, length, preset="kvarn") for length in (330, 129, 60, 200)], strict=True)
    longer, continued = steady(folder, 380, after=prompts[0], cached=256, preset="kvarn")
    with start_engine(model_path=folder, kv_cache_dtype="kvarn", max_mamba_cache_size=40) as engine:
        got = answers(engine, list(prompts), NEW)
        (hit,) = answers(engine, [longer], NEW)
        facts = engine.get_server_info()["internal_states"][0]["kvarn"]
    assert sum(answer["retractions"] for answer in got) > 0
    assert [answer["tokens"] for answer in got] == list(expected)
    assert hit["cached"] == 256 and hit["tokens"] == continued
    assert (facts["states"], facts["max_requests"]) == (40, 4)
    assert facts["cached_sessions"]["8192"] == {"sessions": 1, "runs_out": "tokens"}
