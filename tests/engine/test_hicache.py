# SPDX-License-Identifier: Apache-2.0
"""A hierarchical cache in a real engine: pages that left the device come back, and answers stay right."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import draft_models
import drafts_on_cpu
import pytest
from kvarn_kernels.config import KVarNConfig
from sglang_kvarn import compat

from benchmarks.common import models
from benchmarks.common.tiny_model import answers, expected, flush, prompt

NEW = 4
# a prompt of 300 tokens takes 3 pages, 2 of which stay in the prefix cache
PAGES = 8


def small(preset: str, ratio: float = 2.0, drafts: int = 1) -> dict[str, Any]:
    """Return the options of an engine with a pool of one ring and `PAGES`, and host memory."""
    ring = KVarNConfig.from_preset(preset).ring_pages(64, 4, drafts)
    return {
        "kv_cache_dtype": preset,
        "max_total_tokens": (ring + PAGES) * 128,
        "enable_hierarchical_cache": True,
        "hicache_ratio": ratio,
        "enable_cache_report": True,
    }


KVARN, CANONICAL = "kvarn", "kvarn_canonical"
has_storage = pytest.mark.skipif(not compat.salts_storage_keys(), reason="storage is refused in this SGLang")


@pytest.fixture(scope="module", autouse=True)
def strict_checks():
    with pytest.MonkeyPatch.context() as patch:
        # SGLang counts every page of every step
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        yield


def ask(engine, model: str, preset: str, tokens: list[int]) -> dict[str, int]:
    """Return where the prefix came from, after comparing the answer with the oracle's."""
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    output = engine.generate(input_ids=tokens, sampling_params=sampling)
    found = output["meta_info"]
    assert output["output_ids"] == expected(
        model, tokens, preset, cached=found["cached_tokens"], new_tokens=NEW
    ), found["cached_tokens_details"]
    return {"device": 0, "host": 0} | (found["cached_tokens_details"] or {}) | {"all": found["cached_tokens"]}


def answer_with_drafts(engine, model: str, prompts: list[list[int]]) -> list[dict[str, Any]]:
    """Return answers that are long enough for drafts to be accepted; their first tokens are the oracle's."""
    found = [answers(engine, [tokens], 16)[0] for tokens in prompts]
    for tokens, answer in zip(prompts, found, strict=True):
        # the oracle is slow
        assert answer["tokens"][:NEW] == expected(model, tokens, KVARN, cached=answer["cached"], new_tokens=NEW)
    return found


def check_accepted(first: list[dict[str, Any]], again: list[dict[str, Any]]) -> None:
    """Check that drafts are accepted at the second time, too: next to none are where the draft model finds zeros."""
    accepted, accepted_again = (sum(answer["drafts_accepted"] for answer in found) for found in (first, again))
    assert accepted_again > accepted // 2 > 4


def attach(engine, storage: str) -> str | None:
    """Give a running engine a storage; return why it takes none."""
    answer = engine.loop.run_until_complete(
        engine.tokenizer_manager.attach_hicache_storage(storage, hicache_storage_prefetch_policy="wait_complete")
    )
    return None if answer.success else answer.message


@pytest.mark.parametrize(
    ("preset", "policy"),
    [
        (KVARN, "write_through"),
        (KVARN, "write_back"),
        pytest.param(KVARN, "write_through_selective", marks=pytest.mark.long),
        pytest.param(CANONICAL, "write_through", marks=pytest.mark.long),
        pytest.param(CANONICAL, "write_back", marks=pytest.mark.long),
    ],
)
def test_a_prefix_that_left_the_device_is_found_in_host_memory(start_engine, model, preset, policy):
    prompts = [prompt(300, seed) for seed in range(4)]
    with start_engine(hicache_write_policy=policy, **small(preset)) as engine:
        for tokens in prompts:
            # the selective policy copies a page at its second hit
            for _ in range(3 if policy == "write_through_selective" else 1):
                ask(engine, model, preset, tokens)
        from_host = [ask(engine, model, preset, tokens)["host"] for tokens in prompts]
        # a turn on top of a loaded prefix, and a branch in the middle of one
        turn = prompts[0] + prompt(40, seed=50)
        assert ask(engine, model, preset, turn)["all"] == 256
        branch = prompts[1][:128] + prompt(150, seed=51)
        assert ask(engine, model, preset, branch)["all"] == 128
        flush(engine)
        assert ask(engine, model, preset, prompts[0])["all"] == 0
        reason = "only files are tested" if compat.salts_storage_keys() else "leaves the salt of a request out"
        assert reason in attach(engine, "mooncake")
    assert set(from_host) <= {0, 128, 256} and sum(n == 256 for n in from_host) >= 3, from_host


@pytest.mark.long
@pytest.mark.parametrize("policy", ["write_through", "write_back"])
def test_a_host_pool_that_is_full_forgets_prefixes_and_nothing_else(start_engine, model, policy):
    # 30 pages of host memory, and 16 prompts of two pages each
    with start_engine(hicache_write_policy=policy, **small(KVARN, ratio=1.1)) as engine:
        for seed in (*range(16), 0, 15, 3, 14):
            ask(engine, model, KVARN, prompt(300, seed))


def test_drafts_verify_on_a_prefix_from_host_memory(start_engine, model, monkeypatch, tmp_path_factory):
    drafts_on_cpu.prepare(monkeypatch, tmp_path_factory.mktemp("plugin"))
    ngram = models.draft_arguments(models.TINY, models.NGRAM, 4)
    prompts = [prompt(300, seed) for seed in range(4)]
    with start_engine(**small(KVARN, drafts=4), **ngram) as engine:
        for tokens in prompts:
            ask(engine, model, KVARN, tokens)
        assert sum(ask(engine, model, KVARN, tokens)["host"] for tokens in prompts) >= 256


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_draft_model_finds_its_keys_and_values_in_host_memory(
    start_engine, model, monkeypatch, tmp_path_factory, ranks
):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    drafts_on_cpu.prepare(monkeypatch, tmp_path_factory.mktemp("plugin"))
    # the model drafts for itself, from a cache that is not quantised
    drafted = draft_models.arguments("STANDALONE", tmp_path_factory.mktemp("draft"), model=model)
    prompts = [prompt(300, seed) for seed in range(4)]
    with start_engine(**small(KVARN, drafts=4), **drafted, tp_size=ranks) as engine:
        first, again = (answer_with_drafts(engine, model, prompts) for _ in range(2))
    # of 4 prompts the pool of the device holds fewer than 3
    cached, cached_again = ([answer["cached"] for answer in found] for found in (first, again))
    assert cached == [0] * 4 and cached_again.count(256) >= 3
    check_accepted(first, again)


@pytest.mark.long
@pytest.mark.parametrize("algorithm", ["EAGLE", "EAGLE3", "DFLASH"])
def test_heads_draft_on_a_prefix_from_host_memory(start_engine, model, monkeypatch, tmp_path_factory, algorithm):
    drafts_on_cpu.prepare(monkeypatch, tmp_path_factory.mktemp("plugin"))
    drafted = draft_models.arguments(algorithm, tmp_path_factory.mktemp("draft") / "model")
    prompts = [prompt(300, seed) for seed in range(4)]
    with start_engine(**small(KVARN, drafts=4), **drafted) as engine:
        for tokens in prompts:
            ask(engine, model, KVARN, tokens)
        assert sum(ask(engine, model, KVARN, tokens)["host"] for tokens in prompts) >= 256


@has_storage
def test_pages_come_back_from_files_and_damaged_ones_are_misses(start_engine, model, stored, tmp_path):
    prompts = [prompt(300, seed) for seed in range(4)]

    def found(engine) -> list[int]:
        return [ask(engine, model, KVARN, tokens).get("storage", 0) for tokens in prompts]

    with start_engine(**small(KVARN)) as engine:
        assert attach(engine, "file") is None
        assert found(engine) == [0] * 4
        files = wait_for_files(tmp_path / "pages", 8)
    assert all(re.search("-kvarn_k4v2_g128-v1-[0-9a-f]{16}_", file.name) for file in files)
    # two pages of each prompt, in the order in which they were written; those of one stay whole
    whole = [file.read_bytes() for file in files]
    # cut short, empty, a first record without its header
    bad = [whole[2][:-1], b"", bytes([whole[6][0] & 0xF0]) + whole[6][1:]]
    for file, content in zip(files[2::2], bad, strict=True):
        file.write_bytes(content)
    with start_engine(**small(KVARN), **stored) as engine:
        assert sorted(found(engine)) == [0, 0, 0, 256]


@has_storage
def test_a_draft_model_finds_its_keys_and_values_in_files(start_engine, model, stored, tmp_path, monkeypatch):
    drafts_on_cpu.prepare(monkeypatch, tmp_path / "plugin")
    options = small(KVARN, drafts=4) | stored | draft_models.arguments("STANDALONE", tmp_path / "draft", model=model)
    prompts = [prompt(300, seed) for seed in range(1, 5)]
    with start_engine(**options) as engine:
        first = answer_with_drafts(engine, model, prompts)
        files = [file for file in wait_for_files(tmp_path / "pages", 16) if ".draft_" in file.name]
    assert len(files) == 8
    # of the third prompt cut short, of the fourth other bytes
    files[4].write_bytes(files[4].read_bytes()[:-1])
    files[6].write_bytes(bytes(range(256)) * (files[6].stat().st_size // 256))
    with start_engine(**options) as engine:
        again = answer_with_drafts(engine, model, prompts)
    assert [answer["cached"] for answer in again[:2]] == [256, 256]
    check_accepted(first[:2], again[:2])


def wait_for_files(folder: Path, count: int) -> list[Path]:
    """Return the files of pages, oldest first, once there are so many."""
    for _ in range(100):
        if len(files := list(folder.glob("*.bin"))) >= count:
            return sorted(files, key=lambda file: file.stat().st_mtime_ns)
        time.sleep(0.1)
    raise AssertionError(f"expected {count} files of pages within 10 s, got {len(files)}")
