# SPDX-License-Identifier: Apache-2.0
"""The kernels of a GPU behind a real engine on a CPU: those of Triton interpreted, that of short steps as C++."""

from __future__ import annotations

import short_steps_on_cpu
from engine_plugin import add_to_engines

from benchmarks.common.tiny_model import answers, expected, prompt

PRESET = "kvarn_canonical"


def test_interpreted_kernels_give_the_oracles_tokens(start_engine, model, monkeypatch):
    monkeypatch.setenv("KVARN_CPU_FORM", "triton")
    # 126 and 5 new tokens: a page fills in a decode step and is read in the next
    tokens = prompt(126, seed=1)
    with start_engine(kv_cache_dtype=PRESET, max_running_requests=2, context_length=512) as engine:
        (answer,) = answers(engine, [tokens], 5)
        longer = tokens + answer["tokens"] + prompt(9, seed=2)
        (hit,) = answers(engine, [longer], 2)
    assert answer["tokens"] == expected(model, tokens, PRESET, new_tokens=5)
    assert hit["cached"] == 128
    assert hit["tokens"] == expected(model, longer, PRESET, new_tokens=2)


# of log-probabilities by two kernels: the model's logits are fp16 numbers, 2e-3 apart (seen: 4e-3)
CLOSE = 1e-2


def test_short_turns_on_hits_are_those_of_the_other_kernels(start_engine, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("KVARN_CPU_FORM", "triton")
    tokens = prompt(2 * 128 - 20, seed=1)
    # within the page of the hit, over its end, and another request's behind the same page
    turns = [tokens + prompt(3, seed=2), tokens + prompt(60, seed=3), tokens[:128] + prompt(50, seed=4)]
    options = {"kv_cache_dtype": "kvarn", "dtype": "float16", "max_running_requests": 2, "context_length": 512}

    def found() -> list[dict[int, float]]:
        with start_engine(**options, chunked_prefill_size=256) as engine:
            answers(engine, [tokens], 2)
            sampling = {"temperature": 0, "max_new_tokens": 1}
            given = engine.generate(input_ids=turns, sampling_params=sampling, return_logprob=True, top_logprobs_num=5)
        facts = [answer["meta_info"] for answer in given]
        assert [fact["cached_tokens"] for fact in facts] == [128] * 3
        return [{token: log for log, token, _ in fact["output_top_logprobs"][0]} for fact in facts]

    others = found()
    add_to_engines(monkeypatch, tmp_path / "plugin", "short_steps_on_cpu:install")
    capfd.readouterr()
    own = found()
    assert short_steps_on_cpu.LINE in "".join(capfd.readouterr())
    for mine, theirs in zip(own, others, strict=True):
        both = mine.keys() & theirs.keys()
        assert len(both) >= 4 and all(abs(mine[token] - theirs[token]) < CLOSE for token in both), (mine, theirs)
