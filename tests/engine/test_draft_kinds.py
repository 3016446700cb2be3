# SPDX-License-Identifier: Apache-2.0
"""Blocks of drafts (DFLASH), and a number of drafts that changes: in an engine the same tokens as without drafts."""

from __future__ import annotations

import json

import draft_models
import drafts_on_cpu
import known_drafts
import pytest

from benchmarks.common.tiny_model import answers, expected, flush, prompt

NEW = 20
KVARN, CANONICAL = "kvarn", "kvarn_canonical"
# tokens of the prompts; the drafts of the first answer are right, those of the second are of random weights
LENGTHS = (120, 250)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch, tmp_path):
    # SGLang counts every page of every step
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
    drafts_on_cpu.prepare(monkeypatch, tmp_path)


# window: tokens that the draft model reads, in rows of its own
@pytest.mark.parametrize(
    ("preset", "overlap", "window"), [(KVARN, True, None), pytest.param(CANONICAL, False, 64, marks=pytest.mark.long)]
)
def test_answers_are_the_oracles_whether_blocks_are_rejected_or_accepted(
    start_engine, model, tmp_path, monkeypatch, preset, overlap, window
):
    if overlap:
        drafts_on_cpu.allow_overlap(monkeypatch)
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    wanted = [expected(model, tokens, preset, new_tokens=NEW) for tokens in prompts]
    turn = prompts[0] + wanted[0] + prompt(30, seed=2)
    known_drafts.prepare(monkeypatch, tmp_path).know([prompts[0] + wanted[0]])
    draft = draft_models.arguments("DFLASH", tmp_path / "draft")
    draft |= {"speculative_draft_window_size": window, "disable_overlap_schedule": not overlap}
    with start_engine(kv_cache_dtype=preset, **draft) as engine:
        assert engine.tokenizer_manager.server_args.disable_overlap_schedule != overlap
        got = answers(engine, prompts, NEW)
        (hit,) = answers(engine, [turn], 8)
        flush(engine)
        again = answers(engine, prompts, NEW)
    for found in (got, again):
        assert [answer["tokens"] for answer in found] == wanted
        assert found[0]["drafts_accepted"] > NEW // 2 > NEW // 4 > found[1]["drafts_accepted"]
    # of a page that accepted drafts filled
    assert hit["cached"] == 128 and hit["tokens"] == expected(model, turn, preset, cached=128, new_tokens=8)


def test_the_number_of_drafts_may_change_from_step_to_step(start_engine, model, tmp_path, capfd):
    chosen = tmp_path / "adaptive.json"
    # three drafts of a request alone, one or none of two; a page of the first ends after the second is answered
    chosen.write_text(json.dumps({"1": {"candidate_steps": [3]}, "2": {"candidate_steps": [1]}}))
    adaptive = draft_models.arguments("EAGLE", tmp_path / "draft") | {
        "speculative_adaptive": True,
        "speculative_adaptive_config": str(chosen),
        "log_level": "info",
    }
    prompts = [prompt(length, seed=length) for length in (115, 250)]
    wanted = [expected(model, tokens, KVARN, new_tokens=new) for tokens, new in zip(prompts, (NEW, 8), strict=True)]
    turn = prompts[0] + wanted[0] + prompt(30, seed=2)
    with start_engine(kv_cache_dtype=KVARN, **adaptive) as engine:
        sampling = [{"temperature": 0, "max_new_tokens": len(answer), "ignore_eos": True} for answer in wanted]
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        (hit,) = answers(engine, [turn], 8)
    assert [output["output_ids"] for output in outputs] == wanted
    assert hit["cached"] == 128 and hit["tokens"] == expected(model, turn, KVARN, cached=128, new_tokens=8)
    log = capfd.readouterr().err
    assert "steps 3 -> 1" in log and "steps 1 -> 3" in log
