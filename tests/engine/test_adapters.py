# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters beside a kvarn cache: a request is answered by its adapter, and hits prefixes of its adapter only.

The oracle of an adapter is that of the model with the adapter added to its weights. Adapters run in SGLang's backend
``torch_native``, since the others are kernels for GPUs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import lora_adapters
import pytest
from engine_plugin import add_to_engines

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import prompt

# a preset that answers a hit as it answers a miss
PRESET, NEW = "kvarn_canonical", 8
# the model alone, and two adapters
NAMES = (None, "a", "b")
# SGLang adds what an adapter puts out, the oracle adds weights: no answer may hang on a rounding
MARGIN = 0.02


@pytest.fixture(scope="module")
def folders(model, tmp_path_factory) -> dict[str, str]:
    """Return the folders of the adapters."""
    parent = tmp_path_factory.mktemp("adapters")
    return {name: lora_adapters.save(parent / name, model, seed) for seed, name in enumerate("ab")}


@pytest.fixture(scope="module")
def merged(model, folders, tmp_path_factory) -> dict[str | None, str]:
    """Return the models that the oracle computes with."""
    parent = tmp_path_factory.mktemp("merged")
    return {None: model} | {name: lora_adapters.merge(parent / name, model, folders[name]) for name in folders}


@pytest.fixture(scope="module")
def engine(start_engine, folders, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        add_to_engines(patch, tmp_path_factory.mktemp("plugin"), "unpinned:install")
        paths = [f"{name}={folder}" for name, folder in folders.items()]
        options = {"enable_lora": True, "lora_paths": paths, "lora_backend": "torch_native"}
        with start_engine(kv_cache_dtype=PRESET, **options) as engine:
            yield engine


def steady(
    merged: dict[str | None, str], length: int, names: Sequence[str | None] = NAMES, after: Sequence[int] = ()
) -> tuple[list[int], list[list[int]]]:
    """Return a prompt that begins with some tokens, and the oracle's answer of each adapter by a wide enough margin."""
    for seed in itertools.count(length):
        tokens = [*after, *prompt(length - len(after), seed)]
        found = [tiny_model.expected_with_margin(merged[name], tokens, PRESET, new_tokens=NEW) for name in names]
        if min(margin for _, margin in found) > MARGIN:
            return tokens, [answer for answer, _ in found]


def ask(engine: Any, tokens: list[int], names: Sequence[str | None]) -> tuple[list[list[int]], list[int]]:
    """Return greedy answers to a prompt, asked for at once, and how many tokens came from the prefix cache."""
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    outputs = engine.generate(input_ids=[tokens] * len(names), sampling_params=sampling, lora_path=list(names))
    return [each["output_ids"] for each in outputs], [each["meta_info"]["cached_tokens"] for each in outputs]


def test_a_prompt_is_answered_by_the_adapter_of_its_request(engine, merged):
    tokens, expected = steady(merged, 300)
    assert len({tuple(answer) for answer in expected}) == len(NAMES)
    for name, answer in zip(NAMES, expected, strict=True):
        for cached in (0, 256):
            assert ask(engine, tokens, [name]) == ([answer], [cached])


def test_requests_of_all_adapters_run_in_one_batch(engine, merged):
    tokens, expected = steady(merged, 290)
    names = ["b", None, "a", "b"]
    answers = [expected[NAMES.index(name)] for name in names]
    assert ask(engine, tokens, names)[0] == answers
    assert ask(engine, tokens, names) == (answers, [256] * 4)


def test_a_turn_hits_the_pages_of_an_answer_under_its_adapter_only(engine, merged):
    # the answer fills the second page
    begun, (answer,) = steady(merged, 252, ["a"])
    assert ask(engine, begun, ["a"]) == ([answer], [0])
    turn, expected = steady(merged, 300, after=(*begun, *answer))
    for name, continued, cached in zip(NAMES, expected, (0, 256, 0), strict=True):
        assert ask(engine, turn, [name]) == ([continued], [cached])


def test_an_adapter_that_takes_the_name_of_another_hits_none_of_its_pages(engine, folders, merged):
    tokens, expected = steady(merged, 310, ["a", "b"])
    for name, answer in zip(folders, expected, strict=True):
        assert engine.load_lora_adapter("changing", folders[name]).success
        for cached in (0, 256):
            assert ask(engine, tokens, ["changing"]) == ([answer], [cached])
        assert engine.unload_lora_adapter("changing").success
