# SPDX-License-Identifier: Apache-2.0
"""A hierarchical cache of models in which some layers keep states: pages and states that left the device come back."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import draft_models
import drafts_on_cpu
import hybrids
import pytest
import states_on_cpu
import tiny_engines
from damages import DAMAGES
from hybrids import DELTA, MAMBA2, STEP, TWO_RANKS
from sglang_kvarn import compat
from test_hicache import wait_for_files

from benchmarks.common import models, tiny_model
from benchmarks.common.tiny_model import answers, flush, prompt

NEW = 4
# in the names of files of states
STATE = ".mamba_"
KVARN, CANONICAL = "kvarn", "kvarn_canonical"
NGRAM = models.draft_arguments(models.TINY, models.NGRAM, 4)
steady = functools.partial(hybrids.steady, new_tokens=NEW)
pytestmark = pytest.mark.skipif(not compat.hosts_states(), reason="this SGLang has no prefix cache of hybrid models")


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # SGLang counts every page and every state of every step
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        states_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        yield


def options(
    folder: str, preset: str, *, pages: int, rows: int = 1, states: int = 40, drafts: int = 1, **others
) -> dict[str, Any]:
    """Return the options of an engine with a pool of so many pages beside the rings of some requests, and host memory.

    Args:
        folder: of the model; states: that the device has room for, those of running requests included.
    """
    ring = tiny_engines.ring_pages(folder, preset, 4, drafts)
    chosen = {
        "model_path": folder,
        "kv_cache_dtype": preset,
        "max_total_tokens": (rows * ring + pages) * 128,
        "max_running_requests": rows,
        "max_mamba_cache_size": states,
        "chunked_prefill_size": STEP,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 3.0,
        "enable_cache_report": True,
    }
    return chosen | others


def ask(engine, folder: str, preset: str, tokens: list[int]) -> dict[str, int]:
    """Return where the prefix came from, after comparing the answer with the oracle's."""
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    output = engine.generate(input_ids=tokens, sampling_params=sampling)
    found, cached = output["meta_info"], output["meta_info"]["cached_tokens"]
    expected = tiny_model.expected(folder, tokens, preset, cached=cached, new_tokens=NEW)
    assert output["output_ids"] == expected, found["cached_tokens_details"]
    return {"device": 0, "host": 0} | (found["cached_tokens_details"] or {}) | {"all": cached}


def prompts_for(folder: str, preset: str, count: int) -> list[list[int]]:
    """Return prompts with two full pages each, all of which differ from their first token on."""
    # `steady` tries the seeds behind the length
    return [steady(folder, 270 + 11 * n, preset=preset)[0] for n in range(count)]


def find_in_host_memory(engine, folder: str) -> None:
    """Ask for more than the device holds, twice: what left the device is found in host memory."""
    prompts = prompts_for(folder, CANONICAL, 4)
    for tokens in prompts:
        ask(engine, folder, CANONICAL, tokens)
    found = [ask(engine, folder, CANONICAL, tokens) for tokens in prompts]
    assert sum(each["host"] == 256 for each in found) >= 3, found


def from_files(engine, folder: str, preset: str, prompts: list[list[int]]) -> list[int]:
    """Return how many tokens of each prompt came from files, after comparing the answers with the oracle's."""
    found = [ask(engine, folder, preset, tokens) for tokens in prompts]
    assert all(each["all"] == each.get("storage", 0) for each in found), found
    return [each["all"] for each in found]


def files_of_states(pages: Path, prompts: int) -> list[Path]:
    """Return the files of states, oldest first, once all of some prompts with two pages and a state each are there."""
    return [file for file in wait_for_files(pages, 3 * prompts) if STATE in file.name]


def facts_of(engine) -> dict[str, Any]:
    return engine.get_server_info()["internal_states"][0]["kvarn"]


def cases() -> list:
    """Return (family, preset, policy); what takes long is marked, as gated delta nets in torch do."""
    quick = [(DELTA, CANONICAL, "write_through"), ("nemotron_h", KVARN, "write_back")]
    others = [(DELTA, KVARN, "write_through_selective"), (DELTA, KVARN, "write_back"), (DELTA, CANONICAL, "write_back")]
    others += [(family, KVARN, "write_through") for family in (*MAMBA2, "qwen3_next")]
    return quick + [pytest.param(*case, marks=pytest.mark.long) for case in others]


@pytest.mark.parametrize(("family", "preset", "policy"), cases())
def test_a_prefix_that_left_the_device_comes_back_with_its_state(start_engine, tmp_path, family, preset, policy):
    folder = tiny_model.save(tmp_path, family)
    prompts = prompts_for(folder, preset, 4)
    asked = functools.partial(ask, folder=folder, preset=preset)
    with start_engine(**options(folder, preset, pages=8, hicache_write_policy=policy)) as engine:
        for tokens in prompts:
            asked(engine, tokens=tokens)
            if policy == "write_through_selective":
                # it copies what a longer prompt goes on from: who finds all and keeps no state counts for no hit
                asked(engine, tokens=steady(folder, len(tokens) + 140, after=tokens, preset=preset, cached=256)[0])
        found = [asked(engine, tokens=tokens) for tokens in prompts]
        turn = prompts[3] + prompt(40, seed=50)
        assert asked(engine, tokens=turn)["all"] == 256
        # of a step one state is kept; that in the middle of a prompt leaves the device, too
        kept = STEP // 256 * 256 if family in ("falcon_h1", "granitemoehybrid") else STEP
        if policy == "write_through_selective":
            # nothing of a prompt that was asked for once
            kept = 0
        longer = prompt(650, seed=51)
        asked(engine, tokens=longer)
        for tokens in prompts:
            asked(engine, tokens=tokens)
        shorter = asked(engine, tokens=steady(folder, 640, after=longer[:600], preset=preset, cached=kept)[0])
        facts = facts_of(engine)
        flush(engine)
        assert asked(engine, tokens=prompts[0])["all"] == 0
    assert all(each["all"] == 256 for each in found), found
    assert sum(each["host"] == 256 for each in found) >= 3, found
    assert shorter["all"] == kept, shorter
    assert not kept or shorter["host"] > 0, shorter
    # as many as the ratio says, and the page and the state that SGLang adds
    assert facts["host_tokens"] == 3 * facts["pool_tokens"] + 128
    assert facts["host_states"] == 3 * facts["states"] + 1
    assert facts["host_pages_in_use"] >= 8


@pytest.mark.parametrize(
    ("hosted", "policy"),
    [
        (True, "write_through"),
        pytest.param(True, "write_back", marks=pytest.mark.long),
        pytest.param(False, "write_through", marks=pytest.mark.long, id="no host memory"),
    ],
)
def test_a_state_that_left_the_device_comes_back_where_its_pages_stayed(start_engine, tmp_path, hosted, policy):
    folder = tiny_model.save(tmp_path, DELTA)
    base = prompt(256, seed=1)
    first, second = (steady(folder, n, after=base, preset=CANONICAL)[0] for n in (456, 470))
    chosen = {"hicache_size": 1, "enable_hierarchical_cache": hosted, "hicache_write_policy": policy}
    sizes = options(folder, CANONICAL, pages=40, states=6, **chosen)
    with start_engine(**sizes) as engine:
        # states behind 256 tokens and behind 384, then those of others, which take the place of the older one
        for tokens in (base + prompt(10, seed=2), first, *(prompt(300, seed=seed) for seed in (3, 4))):
            answers(engine, [tokens], NEW)
        facts = facts_of(engine)
        found = ask(engine, folder, CANONICAL, second)
    # all pages stayed
    assert facts["pages_in_use"] == 7
    # where only the state is loaded, SGLang counts its tokens
    assert (found["host"], found["all"]) == ((256, 256) if hosted else (0, 0))
    if not hosted:
        return
    # shared as the device is, which keeps a state more than requests may use
    tokens, states = (facts["bytes_per_token"] * facts["pool_tokens"], facts["bytes_per_state"] * (facts["states"] + 1))
    assert facts["host_states"] * facts["bytes_per_state"] == pytest.approx(1e9 * states / (states + tokens), rel=0.02)
    assert facts["host_tokens"] * facts["bytes_per_token"] == pytest.approx(1e9 * tokens / (states + tokens), rel=0.02)


@pytest.mark.long
@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_host_memory_that_is_full_forgets_states_and_pages_and_nothing_else(start_engine, tmp_path, policy):
    folder = tiny_model.save(tmp_path, DELTA)
    prompts = prompts_for(folder, KVARN, 11)
    # 9 states of the device, and 10 of the host
    sizes = options(folder, KVARN, pages=8, states=9, hicache_write_policy=policy, hicache_ratio=1.1)
    with start_engine(**sizes) as engine:
        found = [ask(engine, folder, KVARN, prompts[n])["all"] for n in (*range(11), 0, 10, 3, 9, 10)]
    assert found[:11] == [0] * 11 and 256 in found[11:] and 0 in found[11:], found


@pytest.mark.long
def test_retraction_changes_no_token_beside_host_memory(start_engine, tmp_path, monkeypatch):
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "1")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "3")
    folder = tiny_model.save(tmp_path, DELTA)
    lengths = (330, 129, 60, 200)
    prompts, expected = zip(*[hybrids.steady(folder, n, preset=KVARN, new_tokens=8) for n in lengths], strict=True)
    sampling = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
    with start_engine(**options(folder, KVARN, pages=4, rows=4)) as engine:
        got = answers(engine, list(prompts), 8)
        # more than the device holds
        answers(engine, [prompt(400, seed=seed) for seed in range(20)], 1)
        again = engine.generate(input_ids=list(prompts), sampling_params=sampling)
    assert [answer["tokens"] for answer in got] == list(expected)
    facts = [output["meta_info"] for output in again]
    assert [found["cached_tokens"] for found in facts] == [256, 128, 0, 128]
    assert [(found["cached_tokens_details"] or {"host": 0})["host"] for found in facts] == [256, 128, 0, 128]
    for tokens, output, found in zip(prompts, again, facts, strict=True):
        cached = found["cached_tokens"]
        assert output["output_ids"] == tiny_model.expected(folder, tokens, KVARN, cached=cached, new_tokens=8), cached
    for retractions in ([answer["retractions"] for answer in got], [found["num_retractions"] for found in facts]):
        assert sum(retractions) > 0


@pytest.mark.long
@pytest.mark.parametrize(("family", "algorithm"), [(DELTA, "NGRAM"), ("nemotron_h", "NGRAM"), (DELTA, "NEXTN")])
def test_drafts_verify_on_a_prefix_and_a_state_from_host_memory(
    start_engine, tmp_path, monkeypatch, family, algorithm
):
    drafts_on_cpu.prepare(monkeypatch, tmp_path / "plugin")
    folder = tiny_model.save(tmp_path / "model", family)
    # the head of NEXTN comes with the model, and has pages of its own
    drafted = NGRAM if algorithm == "NGRAM" else draft_models.arguments(algorithm, tmp_path / "draft")
    with start_engine(**options(folder, CANONICAL, pages=8, drafts=4), **drafted) as engine:
        find_in_host_memory(engine, folder)


@pytest.mark.long
@pytest.mark.parametrize("family", [DELTA, "nemotron_h"])
def test_two_ranks_find_pages_and_states_in_host_memory(start_engine, tmp_path, family):
    folder = tiny_model.save(tmp_path, family, **TWO_RANKS.get(family, {}))
    with start_engine(tp_size=2, **options(folder, CANONICAL, pages=8)) as engine:
        find_in_host_memory(engine, folder)


def cases_of_files() -> list:
    """Return (family, preset, policy, ways in which files of states are damaged)."""
    quick, ways = ("nemotron_h", KVARN, "write_through", ("gone", "flipped")), tuple(DAMAGES)
    others = [(DELTA, CANONICAL, "write_through", ways), (DELTA, KVARN, "write_back", ways)]
    others += [(family, KVARN, "write_through", ways) for family in (*MAMBA2, "qwen3_next")]
    return [quick, *(pytest.param(*case, marks=pytest.mark.long) for case in others)]


@pytest.mark.parametrize(("family", "preset", "policy", "ways"), cases_of_files())
def test_a_prefix_comes_back_from_files_with_its_state_and_a_damaged_state_is_a_miss(
    start_engine, tmp_path, stored, family, preset, policy, ways
):
    folder = tiny_model.save(tmp_path, family)
    prompts = prompts_for(folder, preset, len(ways) + 1)
    sizes = options(folder, preset, pages=8, hicache_write_policy=policy) | stored
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, preset, prompts) == [0] * len(prompts)
        if policy == "write_back":
            # a page reaches a file when it leaves the device
            answers(engine, [prompt(850, seed=60)], 1)
        states = files_of_states(tmp_path / "pages", len(prompts))
    for way, file in zip(ways, states, strict=False):
        DAMAGES[way](file)
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, preset, prompts) == [0] * len(ways) + [256]
        # what was read in vain was given back
        assert policy == "write_back" or facts_of(engine)["host_pages_in_use"] == 2 * len(prompts)


@pytest.mark.long
def test_files_bring_the_state_of_the_longest_prefix_that_has_one(start_engine, tmp_path, stored):
    folder = tiny_model.save(tmp_path, DELTA)
    # of a step one state is kept: behind 384 tokens and behind 640
    longer = prompt(650, seed=51)
    branch = steady(folder, 640, after=longer[:600], preset=KVARN, cached=STEP)[0]
    sizes = options(folder, KVARN, pages=16) | stored
    with start_engine(**sizes) as engine:
        assert ask(engine, folder, KVARN, longer)["all"] == 0
        assert len(wait_for_files(tmp_path / "pages", 7)) == 7
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, KVARN, [branch]) == [STEP]
        # the rest of the prefix and its state, behind what is on the device
        found = ask(engine, folder, KVARN, longer)
        # the page between the two is one that the branch has computed
        assert (found["all"], found["storage"]) == (640, 128), found


@pytest.mark.long
@pytest.mark.parametrize("has_files", [True, False])
def test_a_state_comes_back_from_a_file_where_its_pages_stayed(start_engine, tmp_path, stored, has_files):
    folder = tiny_model.save(tmp_path, DELTA)
    base = prompt(256, seed=1)
    first, second = (steady(folder, n, after=base, preset=CANONICAL)[0] for n in (456, 470))
    sizes = options(folder, CANONICAL, pages=40, states=6, hicache_ratio=1.1) | (stored if has_files else {})
    with start_engine(**sizes) as engine:
        # states behind 256 tokens and behind 384, then those of others, more than the host has room for
        for tokens in (base + prompt(10, seed=2), first, *(prompt(300, seed=seed) for seed in range(3, 12))):
            answers(engine, [tokens], NEW)
        found = ask(engine, folder, CANONICAL, second)
    assert found["all"] == (256 if has_files else 0), found


@pytest.mark.long
def test_files_of_another_tenant_or_of_other_states_are_misses(start_engine, tmp_path, stored):
    folder = tiny_model.save(tmp_path, DELTA)
    [tokens] = prompts_for(folder, KVARN, 1)
    sizes = options(folder, KVARN, pages=8) | stored
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, KVARN, [tokens]) == [0]
        files_of_states(tmp_path / "pages", 1)
    with start_engine(**sizes) as engine:
        for salt, cached in (("another tenant", 0), (None, 256)):
            output = engine.generate(input_ids=tokens, sampling_params=sampling, cache_salt=salt)
            assert output["meta_info"]["cached_tokens"] == cached
            assert output["output_ids"] == tiny_model.expected(folder, tokens, KVARN, cached=cached, new_tokens=NEW)
    for bits in ("float16", "bfloat16"):
        with start_engine(**sizes, mamba_ssm_dtype=bits) as engine:
            assert answers(engine, [tokens], NEW)[0]["cached"] == 0
    # of both tenants and of both other types
    assert len(files_of_states(tmp_path / "pages", 4)) == 4


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "algorithm", "ranks"),
    [(DELTA, "NGRAM", 1), ("nemotron_h", "NGRAM", 1), (DELTA, "NEXTN", 1), (DELTA, None, 2), ("nemotron_h", None, 2)],
)
def test_drafts_and_ranks_go_on_from_states_in_files(
    start_engine, tmp_path, monkeypatch, stored, family, algorithm, ranks
):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    drafts_on_cpu.prepare(monkeypatch, tmp_path / "plugin")
    folder = tiny_model.save(tmp_path / "model", family, **TWO_RANKS.get(family, {}) if ranks > 1 else {})
    prompts = prompts_for(folder, CANONICAL, 3)
    drafts, drafted = 4 if algorithm else 1, {}
    if algorithm:
        drafted = NGRAM if algorithm == "NGRAM" else draft_models.arguments(algorithm, tmp_path / "draft")
    sizes = options(folder, CANONICAL, pages=8, drafts=drafts) | stored | drafted | {"tp_size": ranks}
    # of each rank two pages and a state; a head that comes with the model has files of its own
    count = 3 * ranks * (5 if algorithm == "NEXTN" else 3)
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, CANONICAL, prompts) == [0] * 3
        states = [file for file in wait_for_files(tmp_path / "pages", count) if STATE in file.name]
    # of one rank
    DAMAGES["flipped"](states[0])
    with start_engine(**sizes) as engine:
        assert from_files(engine, folder, CANONICAL, prompts) == [0, 256, 256]
