# SPDX-License-Identifier: Apache-2.0
"""Mixed chunks, forced retraction and tensor parallelism give the tokens of undisturbed requests."""

from __future__ import annotations

import pytest

from benchmarks.common.tiny_model import answers, expected, prompt

LENGTHS = (330, 150, 60, 500, 129, 256)


@pytest.mark.parametrize("preset", ["kvarn_canonical", "kvarn"])
def test_mixed_chunks_and_retraction_change_no_token(start_engine, model, monkeypatch, preset):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    prompts = [prompt(length, seed=length) for length in LENGTHS]
    with start_engine(kv_cache_dtype=preset, enable_mixed_chunk=True) as engine:
        got = answers(engine, prompts, 30)
    assert sum(answer["retractions"] for answer in got) > 0
    for tokens, answer in zip(prompts, got, strict=True):
        assert answer["tokens"] == expected(model, tokens, preset, new_tokens=30)


def test_a_window_preset_reads_the_cached_prefix_from_records(start_engine, model):
    preset = "kvarn"
    shared, tokens = prompt(300, seed=1), prompt(300, seed=1) + prompt(90, seed=2)
    with start_engine(kv_cache_dtype=preset, chunked_prefill_size=1024) as engine:
        (miss,) = answers(engine, [shared], 12)
        (hit,) = answers(engine, [tokens], 12)
    assert miss["tokens"] == expected(model, shared, preset, new_tokens=12)
    assert hit["cached"] == 256
    assert hit["tokens"] == expected(model, tokens, preset, cached=256, new_tokens=12)


def test_two_tensor_parallel_ranks_give_the_tokens_of_one(start_engine, model, monkeypatch):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    prompts = [prompt(length, seed=length) for length in (330, 150)]
    with start_engine(kv_cache_dtype="kvarn_canonical", tp_size=2) as engine:
        got = answers(engine, prompts, 12)
        (again,) = answers(engine, prompts[:1], 12)
    for tokens, answer in zip(prompts, got, strict=True):
        assert answer["tokens"] == expected(model, tokens, "kvarn_canonical", new_tokens=12)
    assert again["cached"] == 256 and again["tokens"] == got[0]["tokens"]
