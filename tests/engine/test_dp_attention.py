# SPDX-License-Identifier: Apache-2.0
"""DP attention: ranks that share the weights and have requests of their own answer as the oracle does.

In each step a rank decodes, reads a part of a prompt, or has nothing to do; all ranks take part in it, since a layer
gathers the tokens of all for what follows its attention.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dp_attention_on_cpu
import draft_models
import drafts_on_cpu
import hybrids
import known_drafts
import pytest
import tiny_engines
from kvarn_kernels.config import KVarNConfig
from sglang_kvarn import compat

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import expected, prompt

PRESET, NEW = "kvarn", 6
steady = functools.partial(hybrids.steady, new_tokens=20)
# of all that is asked at once: where a scheduler dies, SGLang ends the process that started it, and tells nobody
LIMIT_SECONDS = 100
# chunks of 256 tokens, two requests at a time and a pool for each rank
RANKS = {"tp_size": 2, "dp_size": 2, "enable_dp_attention": True, "chunked_prefill_size": 512}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> str:
    """Return the folder of a tiny model of a family that SGLang serves with DP attention."""
    return tiny_model.save(tmp_path_factory.mktemp("qwen") / "model", "qwen3")


def drafting(
    patch: pytest.MonkeyPatch, folder: Path, algorithm: str, **options: Any
) -> tuple[known_drafts.Texts, dict[str, Any]]:
    """Let ranks draft with a head of random weights, or texts that they are told of; return these, and options."""
    drafts_on_cpu.prepare(patch, folder / "drafts")
    drafts_on_cpu.allow_overlap(patch)
    known = known_drafts.prepare(patch, folder / "known")
    return known, draft_models.arguments(algorithm, folder / "head", **options)


class Ranks:
    """Ask the ranks of an engine.

    Attributes:
        engine: of a model; folder: of the model.
        retractions: of all requests so far; answers: whether all that was asked so far was answered.
        accepted, from_host: of each request that was checked, drafts and cached tokens.
    """

    def __init__(self, engine: Any, folder: str) -> None:
        self.engine, self.folder, self.retractions, self.answers = engine, folder, 0, True
        self.accepted: list[int] = []
        self.from_host: list[int] = []

    async def generate(
        self, rank: int, tokens: list[int], new: int = NEW, begun: asyncio.Event | None = None
    ) -> dict[str, Any]:
        """Return what SGLang answers; begun: set with the first token."""
        sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        given = {"input_ids": tokens, "sampling_params": sampling, "routed_dp_rank": rank}
        if begun is None:
            return await self.engine.async_generate(**given)
        async for so_far in await self.engine.async_generate(**given, stream=True):
            begun.set()
            answer = so_far
        return answer

    def check(self, tokens: list[int], answer: dict[str, Any]) -> int:
        """Check an answer against the oracle; return how much of the prompt was cached."""
        found, cached = answer["output_ids"], answer["meta_info"]["cached_tokens"]
        self.retractions += answer["meta_info"]["num_retractions"]
        self.accepted.append(answer["meta_info"].get("spec_num_correct_drafts", 0))
        details = answer["meta_info"]["cached_tokens_details"] or {}
        self.from_host.append(details.get("host", 0))
        assert found == expected(self.folder, tokens, PRESET, cached=cached, new_tokens=len(found)), len(tokens)
        return cached

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        """Return what a coroutine returns that asks."""
        assert self.answers, "the ranks do not answer any more"
        self.answers = False
        found = self.engine.loop.run_until_complete(asyncio.wait_for(coroutine, LIMIT_SECONDS))
        self.answers = True
        return found

    def ask(self, asked: list[tuple[int, list[int]]], new: int = NEW) -> list[int]:
        """Ask at once, each time a rank; return how much of each prompt was cached."""

        async def together() -> list[dict[str, Any]]:
            return await asyncio.gather(*(self.generate(rank, tokens, new) for rank, tokens in asked))

        answers = self.run(together())
        return [self.check(tokens, answer) for (_, tokens), answer in zip(asked, answers, strict=True)]

    def check_rest(self, requests: int) -> None:
        """Check that ranks have room for so many requests each, and hold nothing after a flush."""
        assert self.answers, "the ranks do not answer any more"
        tiny_model.flush(self.engine)
        states = [state["kvarn"] for state in self.engine.get_server_info()["internal_states"]]
        found = [(state["max_requests"], state["rings_in_use"], state["pages_in_use"]) for state in states]
        assert found == [(requests, 0, 0)] * 2


@pytest.fixture(scope="module")
def start_ranks(start_engine, tmp_path_factory):
    """Return a context manager that runs an engine with DP attention."""

    @contextmanager
    def start(folder: str, **options: Any) -> Iterator[Ranks]:
        with pytest.MonkeyPatch.context() as patch:
            # SGLang counts every page of every step
            patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
            dp_attention_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
            chosen = {"model_path": folder, "kv_cache_dtype": PRESET, "port": dp_attention_on_cpu.free_port()}
            with start_engine(**RANKS | chosen | options) as engine:
                yield Ranks(engine, folder)

    return start


@pytest.fixture(scope="module")
def ranks(start_ranks, qwen) -> Iterator[Ranks]:
    """Return two ranks, which have nothing left when the tests are over."""
    with start_ranks(qwen) as ranks:
        yield ranks
        ranks.check_rest(2)


def test_each_rank_answers_its_requests_from_its_cache(ranks):
    # on each rank a prompt in chunks, and more requests than rows
    asked = [(0, 330), (1, 400), (0, 60), (1, 129), (0, 150), (1, 256), (1, 20)]
    asked = [(rank, prompt(length, seed=length)) for rank, length in asked]
    assert ranks.ask(asked) == [0] * 7
    again = [asked[n] for n in (0, 1, 4, 5)]
    assert ranks.ask(again) == [256, 384, 128, 128]
    # what one rank keeps the other does not have
    assert ranks.ask([(1, asked[4][1]), (0, asked[5][1])]) == [0, 0]


def test_a_rank_fills_a_page_while_the_other_has_nothing_to_do(ranks):
    tokens = prompt(120, seed=1)
    answer = ranks.run(ranks.generate(1, tokens, 10))
    assert ranks.check(tokens, answer) == 0
    # the page is in the cache of that rank
    turn = [*tokens, *answer["output_ids"], *prompt(30, seed=2)]
    assert ranks.ask([(1, turn), (0, turn)]) == [128, 0]


def test_a_rank_decodes_while_the_other_reads_a_prompt_in_chunks(ranks):
    short, long = prompt(110, seed=3), prompt(520, seed=4)

    async def both() -> list[dict[str, Any]]:
        begun = asyncio.Event()
        decoding = asyncio.create_task(ranks.generate(0, short, 24, begun))
        await begun.wait()
        assert not decoding.done(), "the first request was over before the second came"
        return [await ranks.generate(1, long), await decoding]

    for tokens, answer in zip((long, short), ranks.run(both()), strict=True):
        assert ranks.check(tokens, answer) == 0


def test_each_rank_finds_prefixes_in_its_own_host_memory(start_ranks, qwen):
    ring = KVarNConfig.from_preset(PRESET).ring_pages(64, 4)
    hosted = {"enable_hierarchical_cache": True, "hicache_ratio": 3.0, "enable_cache_report": True}
    # a request and the prefixes of three prompts fit the pool of a rank
    small = {"max_total_tokens": (ring + 9) * 128}
    prompts = [[prompt(300, seed=10 * rank + n) for n in range(6)] for rank in (0, 1)]
    asked = [(rank, prompts[rank][n]) for n in range(6) for rank in (0, 1)]
    with start_ranks(qwen, **hosted | small) as ranks:
        for pair in zip(asked[::2], asked[1::2], strict=True):
            assert ranks.ask(list(pair)) == [0, 0]
        ranks.from_host.clear()
        # both load at once; then one does while the other has nothing to do
        found = [ranks.ask(list(pair)) for pair in zip(asked[::2], asked[1::2], strict=True)]
        assert found == [[256, 256]] * 6 and min(map(sum, (ranks.from_host[::2], ranks.from_host[1::2]))) >= 512
        ranks.from_host.clear()
        assert [ranks.ask([(1, tokens)]) for tokens in prompts[1][:3]] == [[256]] * 3
        assert sum(ranks.from_host) >= 512
        # what one rank keeps the other does not have
        assert ranks.ask([(0, prompts[1][0]), (1, prompts[0][0])]) == [0, 0]
        ranks.check_rest(2)


def test_drafts_are_accepted_on_one_rank_and_rejected_on_the_other(start_ranks, qwen, monkeypatch, tmp_path):
    known, options = drafting(monkeypatch, tmp_path, "EAGLE3")
    prompts = [prompt(length, seed=length) for length in (115, 330, 117, 60)]
    wanted = [expected(qwen, tokens, PRESET, new_tokens=20) for tokens in prompts]
    known.know([tokens + answer for tokens, answer in zip(prompts[:2], wanted, strict=False)])
    with start_ranks(qwen, **options) as ranks:
        assert ranks.ask([(0, prompts[0]), (1, prompts[2]), (0, prompts[1]), (1, prompts[3])], 20) == [0] * 4
        assert min(ranks.accepted[::2]) > 10 > 5 > max(ranks.accepted[1::2])
        # alone, on a page that accepted drafts filled
        turn = prompts[0] + wanted[0] + prompt(30, seed=2)
        assert ranks.ask([(0, turn)], 20) == [128]
        ranks.check_rest(2)


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "changes", "options"),
    [
        pytest.param("qwen3_moe", {"num_experts": 2, "num_experts_per_tok": 2}, {}, id="experts"),
        pytest.param(
            "qwen3", {"num_key_value_heads": 4}, {"tp_size": 4, "max_running_requests": 6}, id="pairs share heads"
        ),
        pytest.param("qwen3", {}, {"enable_mixed_chunk": True}, id="mixed chunks"),
        pytest.param("qwen3", {}, {"enable_dp_lm_head": True}, id="a head for each rank"),
        pytest.param("qwen3", {}, {"disable_overlap_schedule": True}, id="one step at a time"),
    ],
)
def test_ranks_answer_with_other_models_and_options_and_retractions(
    start_ranks, tmp_path, monkeypatch, family, changes, options
):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "7")
    folder = tiny_model.save(tmp_path / "model", family, **changes)
    asked = [(n % 2, prompt(length, seed=length)) for n, length in enumerate((330, 500, 60, 129, 150, 256, 20))]
    with start_ranks(folder, **options) as ranks:
        assert ranks.ask(asked) == [0] * len(asked)
        assert sum(ranks.ask(asked)) > 0
        assert ranks.ask(asked[:1]) == [256]
        assert ranks.retractions > 0
        ranks.check_rest(options.get("max_running_requests", 4) // 2)


HOSTED = {"enable_hierarchical_cache": True, "hicache_ratio": 3.0}


@pytest.mark.long
@pytest.mark.skipif(not compat.is_since("0.5.23"), reason="tested with one SGLang")
@pytest.mark.parametrize(
    ("family", "algorithm", "hosted"),
    [
        ("qwen3", "EAGLE3", HOSTED),
        ("qwen3_5_text", None, {}),
        ("qwen3_5_text", None, HOSTED),
        ("qwen3_5_text", "NEXTN", {}),
        ("qwen3_5_text", "NEXTN", HOSTED),
        ("gpt_oss", None, {}),
        ("gpt_oss", None, HOSTED),
    ],
)
def test_ranks_answer_beside(start_ranks, tmp_path, monkeypatch, family, algorithm, hosted):
    has_states = family in hybrids.TWO_RANKS
    tiny_engines.prepare(monkeypatch, tmp_path / "plugins", states=has_states, windows=family == "gpt_oss", drafts=True)
    # on a CPU SGLang makes up heads until their number fits all ranks
    folder = tiny_model.save(tmp_path / "model", family, **hybrids.TWO_RANKS.get(family, {}))
    first = [steady(folder, length) for length in (300, 250, 120, 390)]
    turn, continued = steady(folder, 440, after=first[0][0] + first[0][1], cached=256)
    options = hosted | {"kv_cache_dtype": hybrids.PRESET, "chunked_prefill_size": 2 * hybrids.STEP}
    if has_states:
        options["max_mamba_cache_size"] = 2 * hybrids.OPTIONS["max_mamba_cache_size"]
    if family == "gpt_oss":
        options["moe_runner_backend"] = "triton"
    if algorithm:
        # right drafts for one of two ranks
        known_drafts.prepare(monkeypatch, tmp_path / "known").know([tokens + answer for tokens, answer in first[::2]])
        options |= draft_models.arguments(algorithm, tmp_path / "head")
    with start_ranks(folder, **options) as ranks:

        async def together() -> list[dict[str, Any]]:
            asked = [ranks.generate(n % 2, tokens, len(answer)) for n, (tokens, answer) in enumerate(first)]
            return await asyncio.gather(*asked)

        found = ranks.run(together())
        assert [each["output_ids"] for each in found] == [answer for _, answer in first]
        accepted = [each["meta_info"].get("spec_num_correct_drafts", 0) for each in found]
        assert min(accepted[::2]) > 10 > max(accepted[1::2]) if algorithm else sum(accepted) == 0
        # a hit on one rank; a miss on the other, and a hit of its own
        for rank, cached in ((0, 256), (1, 0), (1, 384)):
            hit = ranks.run(ranks.generate(rank, turn, len(continued)))
            assert (hit["output_ids"], hit["meta_info"]["cached_tokens"]) == (continued, cached)
        ranks.check_rest(2)
