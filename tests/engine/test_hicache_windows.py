# SPDX-License-Identifier: Apache-2.0
"""A hierarchical cache of models with sliding windows: pages and windows that left the device come back together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import draft_models
import drafts_on_cpu
import hybrids
import pytest
import tiny_engines
from damages import DAMAGES
from sglang_kvarn import compat
from test_hicache import wait_for_files

from benchmarks.common import models, tiny_model
from benchmarks.common.tiny_model import answers, flush, prompt

PRESET, NEW, DRAFTS = hybrids.PRESET, 4, 4
pytestmark = pytest.mark.skipif(not compat.hosts_windows(), reason="refused in this SGLang")
# arguments of their engines
FAMILIES: dict[str, dict[str, Any]] = {"gpt_oss": {"moe_runner_backend": "triton"}, "laguna": {}, "olmo3": {}}


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        # SGLang counts every page of both pools in every step
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        drafts_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        # experts of gpt-oss compile their activation, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


def options(tmp_path: Path, folder: str, family: str, algorithm: str) -> dict[str, Any]:
    """Return the options of an engine with a ring and 8 pages, of which a prompt takes 3, and host memory."""
    drafted = models.draft_arguments(models.TINY, models.NGRAM, DRAFTS) if algorithm == "NGRAM" else {}
    if algorithm == "EAGLE3":
        drafted = draft_models.arguments(algorithm, tmp_path / "draft")
    ring = tiny_engines.ring_pages(folder, PRESET, 4, DRAFTS if algorithm else 1)
    chosen = {
        "model_path": folder,
        "kv_cache_dtype": PRESET,
        "max_total_tokens": (ring + 8) * 128,
        "enable_hierarchical_cache": True,
        "hicache_ratio": 3.0,
        "enable_cache_report": True,
    }
    return chosen | FAMILIES[family] | drafted


def ask(engine, tokens: list[int], expected: list[int]) -> dict[str, int]:
    """Return where the prefix came from, after comparing the answer with the oracle's."""
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    output = engine.generate(input_ids=tokens, sampling_params=sampling)
    found = output["meta_info"]
    assert output["output_ids"] == expected, found["cached_tokens_details"]
    return {"device": 0, "host": 0} | (found["cached_tokens_details"] or {}) | {"all": found["cached_tokens"]}


def cases() -> list:
    """Return (family, write policy, algorithm of drafts)."""
    chosen = [("gpt_oss", "write_through", "")]
    rest = [(family, policy, "") for family in FAMILIES for policy in ("write_through", "write_back")]
    rest += [*((family, "write_through", "NGRAM") for family in FAMILIES), ("gpt_oss", "write_through", "EAGLE3")]
    return [*chosen, *(pytest.param(*case, marks=pytest.mark.long) for case in rest if case not in chosen)]


@pytest.mark.parametrize(("family", "policy", "algorithm"), cases())
def test_a_prefix_that_left_the_device_comes_back_with_its_windows(start_engine, tmp_path, family, policy, algorithm):
    folder = tiny_model.save(tmp_path / "model", family)
    prompts = [hybrids.steady(folder, 300, preset=PRESET, new_tokens=NEW, after=[n]) for n in range(4)]
    # a turn on top of a prefix, and a branch in the middle of one, behind a window that only the host may have
    turn = hybrids.steady(folder, 340, preset=PRESET, new_tokens=NEW, after=prompts[0][0])
    branch = hybrids.steady(folder, 290, preset=PRESET, new_tokens=NEW, after=prompts[1][0][:150])
    with start_engine(**options(tmp_path, folder, family, algorithm), hicache_write_policy=policy) as engine:
        assert [ask(engine, *each)["all"] for each in prompts] == [0] * 4
        found = [ask(engine, *each) for _ in range(2) for each in prompts]
        assert [ask(engine, *each)["all"] for each in (turn, branch)] == [256, 128]
        flush(engine)
        assert ask(engine, *prompts[0])["all"] == 0
    assert sum(each["host"] == 256 for each in found) >= 6, found


@pytest.mark.long
@pytest.mark.parametrize(
    ("family", "policy", "algorithm"),
    [
        *((family, "write_through", "") for family in FAMILIES),
        ("gpt_oss", "write_back", ""),
        *(("gpt_oss", "write_through", algorithm) for algorithm in ("NGRAM", "EAGLE3")),
    ],
)
def test_a_prefix_comes_back_from_files_with_its_windows_and_a_damaged_window_is_a_miss(
    start_engine, tmp_path, stored, family, policy, algorithm
):
    folder = tiny_model.save(tmp_path / "model", family)
    prompts = [hybrids.steady(folder, 300, preset=PRESET, new_tokens=NEW, after=[n]) for n in range(4)]
    sizes = options(tmp_path, folder, family, algorithm) | stored | {"hicache_write_policy": policy}
    # two pages of each prompt, and as many of its windows and of a draft model; those of Olmo 3 are in records
    kinds = 1 + (family != "olmo3") + (algorithm == "EAGLE3")
    with start_engine(**sizes) as engine:
        assert [ask(engine, *each)["all"] for each in prompts] == [0] * 4
        if policy == "write_back":
            # a page reaches a file when it leaves the device
            answers(engine, [prompt(850, seed=60)], 1)
        files = wait_for_files(tmp_path / "pages", 8 * kinds)
    windows = [file for file in files if ".swa_" in file.name]
    for n, file in enumerate(windows[:6]):
        DAMAGES[("gone", "flipped", "zeroed")[n // 2]](file)
    with start_engine(**sizes) as engine:
        found = [ask(engine, *each) for each in prompts]
    expected = [256] * 4 if family == "olmo3" else [0, 0, 0, 256]
    assert [each.get("storage", 0) for each in found] == expected, found
