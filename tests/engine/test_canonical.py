# SPDX-License-Identifier: Apache-2.0
"""One engine with chunks of 256 tokens and 4 request rows gives the oracle's tokens in every situation."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

from benchmarks.common.tiny_model import answers, expected, flush, prompt
from benchmarks.generation import runs, tasks

PRESET = "kvarn_canonical"
NEW = 12


@pytest.fixture(scope="module")
def engine(start_engine):
    with start_engine(kv_cache_dtype=PRESET) as engine:
        yield engine


def test_answer_of_a_chunked_prompt_is_the_oracles(engine, model):
    tokens = prompt(700, seed=1)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0
    assert miss["tokens"] == expected(model, tokens, PRESET, new_tokens=NEW)


@pytest.mark.parametrize("length", [1, 127, 128, 129, 256, 257])
def test_answer_at_page_edges_is_the_oracles(engine, model, length):
    tokens = prompt(length, seed=length)
    (answer,) = answers(engine, [tokens], NEW)
    assert answer["tokens"] == expected(model, tokens, PRESET, new_tokens=NEW)


def test_answer_across_a_page_that_fills_while_decoding_is_the_oracles(engine, model):
    tokens = prompt(120, seed=2)
    (answer,) = answers(engine, [tokens], 20)
    assert answer["tokens"] == expected(model, tokens, PRESET, new_tokens=20)


def test_prefix_hit_gives_the_tokens_of_a_miss(engine):
    shared, other = prompt(400, seed=3), prompt(100, seed=4)
    tokens = shared + other
    answers(engine, [shared], 1)
    (hit,) = answers(engine, [tokens], NEW)
    assert hit["cached"] == 384
    flush(engine)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0 and hit["tokens"] == miss["tokens"]


def test_prefix_hit_on_decoded_pages_gives_the_tokens_of_a_miss(engine):
    # the second page is written by decode steps, the first by the prompt
    tokens = prompt(200, seed=5)
    (first,) = answers(engine, [tokens], 80)
    longer = tokens + first["tokens"] + prompt(30, seed=6)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 256
    flush(engine)
    (miss,) = answers(engine, [longer], NEW)
    assert miss["cached"] == 0 and hit["tokens"] == miss["tokens"]


def test_conversations_of_the_benchmark_hit_the_cache_and_then_miss_it(engine):
    whole = [prompt(600, seed=seed) for seed in (30, 31)]
    conversations = [[tasks.Task("turns", tokens[:length], "", NEW) for length in (200, 400, 600)] for tokens in whole]
    found = runs.hold_conversations(engine, SimpleNamespace(decode=str), conversations)
    hits, misses = found[: len(found) // 2], found[len(found) // 2 :]
    assert [answer.cached_tokens for answer in hits] == [0, 0, 128, 128, 384, 384]
    assert not any(answer.cached_tokens for answer in misses)
    assert [answer.ids for answer in hits] == [answer.ids for answer in misses]


def test_more_requests_than_rows_are_all_answered_as_alone(engine):
    prompts = [prompt(length, seed=10 + length) for length in (60, 130, 257, 300, 128, 90, 200, 255, 40, 310)]
    together = answers(engine, prompts, NEW)
    flush(engine)
    alone = [answers(engine, [tokens], NEW)[0]["tokens"] for tokens in prompts]
    assert [answer["tokens"] for answer in together] == alone


def test_aborted_requests_leave_the_rows_clean(engine):
    kept = prompt(270, seed=20)
    (before,) = answers(engine, [kept], NEW)
    flush(engine)

    async def abort_some() -> list[dict]:
        sampling = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
        ids = [f"aborted-{n}" for n in range(6)]
        tasks = [
            asyncio.ensure_future(
                engine.async_generate(input_ids=prompt(200, seed=n), sampling_params=sampling, rid=rid)
            )
            for n, rid in enumerate(ids)
        ]
        await asyncio.sleep(2)
        for rid in ids:
            engine.tokenizer_manager.abort_request(rid=rid)
        return await asyncio.gather(*tasks)

    reasons = [o["meta_info"]["finish_reason"]["type"] for o in engine.loop.run_until_complete(abort_some())]
    assert reasons.count("abort") >= 4
    (after,) = answers(engine, [kept], NEW)
    assert after["tokens"] == before["tokens"]
