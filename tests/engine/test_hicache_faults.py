# SPDX-License-Identifier: Apache-2.0
"""Faults of host memory and of the storage behind it in a real engine: nothing hangs, nothing is lost, answers are
right.

SGLang checks every page of the device at every step. What the host holds is compared with what the prompts leave there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import host_faults
import pytest
from host_faults import EXISTS, FULL_DISK, GET, LATE_LOAD, LATE_READ, NO_ROOM, SET, Faults
from test_hicache import KVARN, ask, has_storage, small, wait_for_files

from benchmarks.common.tiny_model import flush, prompt

# of each prompt, in the prefix cache
CACHED = 256


@pytest.fixture(autouse=True)
def strict_checks(monkeypatch):
    # SGLang counts every page of every step
    monkeypatch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")


@pytest.fixture
def faults(monkeypatch, tmp_path) -> Faults:
    return host_faults.prepare(monkeypatch, tmp_path / "plugin")


def expect_host_tokens(engine, count: int) -> None:
    """Wait until host memory holds so many tokens: SGLang takes notice of copies and reads at its next step.

    Raises:
        AssertionError: it holds others: pages were lost, or given back while in use.
    """

    def held() -> int:
        return engine.get_server_info()["internal_states"][0]["kvarn"]["host_pages_in_use"] * 128

    host_faults.wait_for(lambda: held() == count, f"{count} tokens in host memory")


def abort_during(engine, faults: Faults, fault: str, tokens: list[int]) -> str:
    """Abort a request while it waits for a fault to end; return why it ended."""

    async def abort() -> dict:
        sampling = {"temperature": 0, "max_new_tokens": 100, "ignore_eos": True}
        request = asyncio.ensure_future(
            engine.async_generate(input_ids=tokens, sampling_params=sampling, rid="aborted")
        )
        with faults.on(fault):
            await asyncio.get_running_loop().run_in_executor(None, faults.wait_for, fault)
            engine.tokenizer_manager.abort_request(rid="aborted")
            await asyncio.sleep(0.3)
        return await asyncio.wait_for(request, host_faults.LIMIT_SECONDS)

    return engine.loop.run_until_complete(abort())["meta_info"]["finish_reason"]["type"]


@pytest.mark.parametrize("policy", ["write_through", pytest.param("write_back", marks=pytest.mark.long)])
def test_a_load_that_fails_or_is_in_vain_harms_nobody(start_engine, model, faults, policy):
    prompts = [prompt(300, seed) for seed in range(4)]
    with start_engine(hicache_write_policy=policy, **small(KVARN)) as engine:
        for tokens in prompts:
            ask(engine, model, KVARN, tokens)
        with faults.on(NO_ROOM):
            # computed again; 0.5.16 counts the prefix that it did not load as one from the host
            assert ask(engine, model, KVARN, prompts[0])["all"] < CACHED
        if policy == "write_through":
            expect_host_tokens(engine, len(prompts) * CACHED)
        # two chunks behind the prefix are still to be computed
        assert abort_during(engine, faults, LATE_LOAD, prompts[1] + prompt(300, seed=20)) == "abort"
        found = [ask(engine, model, KVARN, tokens) for tokens in prompts]
        assert sum(each["host"] == CACHED for each in found) >= 2, found


@has_storage
def test_a_storage_that_fails_is_a_storage_without_the_page(start_engine, model, faults, stored, tmp_path):
    prompts, pages = [prompt(300, seed) for seed in range(4)], tmp_path / "pages"
    with start_engine(**small(KVARN), **stored) as engine:

        def from_storage(tokens: list[int]) -> int:
            return ask(engine, model, KVARN, tokens).get("storage", 0)

        for fault, tokens in zip((SET, FULL_DISK), prompts, strict=False):
            with faults.on(fault):
                assert from_storage(tokens) == 0
            assert list(pages.iterdir()) == []
        assert [from_storage(tokens) for tokens in prompts[2:]] == [0, 0]
        wait_for_files(pages, 4)
        expect_host_tokens(engine, len(prompts) * CACHED)
        for fault in (EXISTS, GET):
            flush(engine)
            with faults.on(fault):
                assert from_storage(prompts[2]) == 0
            expect_host_tokens(engine, CACHED)
        flush(engine)
        assert abort_during(engine, faults, LATE_READ, prompts[2]) == "abort"
        expect_host_tokens(engine, 0)
        with without(pages):
            assert from_storage(prompts[3]) == 0
        flush(engine)
        assert [from_storage(tokens) for tokens in prompts] == [0, 0, CACHED, CACHED]
        expect_host_tokens(engine, len(prompts) * CACHED)


@contextmanager
def without(folder: Path) -> Iterator[None]:
    """Let a folder be none, in which nothing can be read or written, whoever tries."""
    aside = folder.rename(folder.with_name("aside"))
    folder.touch()
    yield
    folder.unlink()
    aside.rename(folder)


@has_storage
@pytest.mark.long
def test_a_folder_that_nobody_can_write_to_stores_nothing(start_engine, model, stored, monkeypatch):
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", "/proc")
    with start_engine(**small(KVARN), **stored) as engine:
        for _ in range(2):
            for seed in range(3):
                assert ask(engine, model, KVARN, prompt(300, seed)).get("storage", 0) == 0
            flush(engine)
