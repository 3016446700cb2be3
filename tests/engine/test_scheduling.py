# SPDX-License-Identifier: Apache-2.0
"""Mixed chunks, retraction, preemption and tensor parallelism give the tokens of undisturbed requests."""

from __future__ import annotations

import asyncio

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


def test_a_request_that_is_preempted_gives_its_ring_back_and_goes_on_with_another(start_engine, model, monkeypatch):
    # SGLang counts every page of every step
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
    preset, low, high = "kvarn", prompt(330, seed=1), prompt(200, seed=2)

    async def both(engine) -> list:
        runs = asyncio.Event()

        async def ask(tokens: list[int], priority: int, new_tokens: int):
            sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
            given = {"input_ids": tokens, "sampling_params": sampling, "priority": priority}
            async for answer in await engine.async_generate(stream=True, **given):
                runs.set()
                last = answer
            return last

        waiting = asyncio.create_task(ask(low, 0, 80))
        await runs.wait()
        assert not waiting.done(), "the first request was over before the second came"
        return [await ask(high, 100, 12), await waiting]

    # 15 pages beside a ring of 19: the second request's comes from the first one's
    with start_engine(
        kv_cache_dtype=preset, max_total_tokens=34 * 128, max_running_requests=1, enable_priority_scheduling=True
    ) as engine:
        first, preempted = engine.loop.run_until_complete(both(engine))
    assert preempted["meta_info"]["num_retractions"] > 0
    assert first["output_ids"] == expected(model, high, preset, new_tokens=12)
    assert preempted["output_ids"] == expected(model, low, preset, new_tokens=80)


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
