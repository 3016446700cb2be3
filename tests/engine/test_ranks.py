# SPDX-License-Identifier: Apache-2.0
"""Ranks with requests or layers of their own: replicas and the stages of a pipeline answer as one rank does."""

from __future__ import annotations

import pytest
from sglang_kvarn import compat

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers, expected, prompt

PRESET, NEW = "kvarn", 12
RANKS = {"replicas": {"dp_size": 2}, "pipeline": {"pp_size": 2}}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    """Return the folder of a tiny model of a family that SGLang serves with all of these."""
    return tiny_model.save(tmp_path_factory.mktemp("qwen") / "model", "qwen3")


@pytest.mark.parametrize(
    "ranks",
    [
        pytest.param("replicas", marks=pytest.mark.long),
        pytest.param(
            "pipeline", marks=pytest.mark.skipif(not compat.runs_pipelines(), reason="refused in this SGLang")
        ),
    ],
)
def test_ranks_answer_as_one_and_give_all_back(start_engine, qwen, monkeypatch, ranks):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    # in chunks, within a page, at the end of one; the second time from the prefix caches
    prompts = [prompt(length, seed=length) for length in (330, 150, 60, 500, 129, 256)]
    with start_engine(model_path=qwen, kv_cache_dtype=PRESET, **RANKS[ranks]) as engine:
        found = [each for _ in range(2) for each in answers(engine, prompts, NEW)]
        # while one rank has nothing to do
        found += answers(engine, prompts[:1], NEW)
        tiny_model.flush(engine)
        states = [state["kvarn"] for state in engine.get_server_info()["internal_states"]]
    for tokens, answer in zip([*prompts, *prompts, prompts[0]], found, strict=True):
        cached = answer["cached"]
        assert answer["tokens"] == expected(qwen, tokens, PRESET, cached=cached, new_tokens=NEW), (len(tokens), cached)
    assert sum(answer["cached"] for answer in found) > 0
    assert all((state["rings_in_use"], state["pages_in_use"]) == (0, 0) for state in states)
