# SPDX-License-Identifier: Apache-2.0
"""Models in which some layers have a sliding window: records for the others, SGLang's pool and attention for those."""

from __future__ import annotations

import functools

import hybrids
import pytest
import triton_attention_on_cpu
from kvarn_kernels import reference
from sglang_kvarn import compat

from benchmarks.common import tiny_model, tiny_step
from benchmarks.common.tiny_model import answers, flush, prompt

NEW, PRESET = 8, hybrids.PRESET
# by family, the arguments of its engine. SGLang would run experts of gpt-oss by kernels for GPUs; the least pool of
# sliding windows that is allowed holds those of a few prompts
FAMILIES = {"gpt_oss": {"moe_runner_backend": "triton"}, "laguna": {"swa_full_tokens_ratio": 0.09}, "mellum": {}}
# of Step 3.7 the text part; a folder without images has no processor for them
FAMILIES |= {"step3p5": {"swa_full_tokens_ratio": 0.09}, "step3p7": {"enable_multimodal": False}}
LONG = [pytest.param(family, marks=pytest.mark.long) for family in ("mellum", "step3p7")]
steady = functools.partial(hybrids.steady, new_tokens=NEW)


@pytest.fixture(scope="module", autouse=True)
def attention(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        triton_attention_on_cpu.prepare(patch, tmp_path_factory.mktemp("plugin"))
        # experts of gpt-oss compile their activation, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


def save(folder, family):
    """Write a model that the installed SGLang serves; return its folder."""
    if family in tiny_step.ARCHITECTURES and not compat.is_since("0.5.23"):
        pytest.skip("refused with this SGLang")
    return tiny_model.save(folder, family)


@pytest.fixture(scope="module", params=["gpt_oss", "laguna", "step3p5", *LONG])
def served(request, start_engine, tmp_path_factory):
    """Return (engine, folder of its model)."""
    folder = save(tmp_path_factory.mktemp(request.param), request.param)
    with start_engine(model_path=folder, kv_cache_dtype=PRESET, **FAMILIES[request.param]) as engine:
        yield engine, folder


@pytest.mark.parametrize("length", [127, 129, 300, 520])
def test_answer_of_a_model_with_windows_is_the_oracles(served, length):
    engine, folder = served
    tokens, expected = steady(folder, length)
    flush(engine)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected


def where_sinks_count(folder, change):
    """Return a prompt and the oracle's answer, which is another one with changed sinks of the layers in records.

    Among many keys a sink has next to no weight here, and the answer does not hang on it.

    Args:
        change: makes other sinks of some, [Hq]; may return None.
    """
    attend = reference.attention

    def changed(*args, sinks, **options):
        return attend(*args, sinks=change(sinks), **options)

    for length in range(3, 40):
        tokens, expected = steady(folder, length)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(reference, "attention", changed)
            found = tiny_model.expected(folder, tokens, PRESET, new_tokens=NEW)
        if found != expected:
            return tokens, expected
    raise AssertionError("no prompt whose answer hangs on the sinks")


def test_sinks_of_layers_in_records_count(served):
    engine, folder = served
    if "gpt_oss" not in folder:
        pytest.skip("has no sinks")
    tokens, expected = where_sinks_count(folder, lambda sinks: None)
    flush(engine)
    assert answers(engine, [tokens], NEW)[0]["tokens"] == expected


def test_a_hit_is_the_oracles_and_needs_its_window(served):
    engine, folder = served
    tokens = prompt(400, seed=400)
    longer, expected = steady(folder, 470, after=tokens, cached=384)
    flush(engine)
    answers(engine, [tokens], NEW)
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 384 and hit["tokens"] == expected


def test_a_second_turn_hits_what_was_decoded(served):
    engine, folder = served
    tokens, expected = steady(folder, 252)
    flush(engine)
    (first,) = answers(engine, [tokens], NEW)
    turn, continued = steady(folder, 300, after=tokens + expected, cached=256)
    (hit,) = answers(engine, [turn], NEW)
    assert first["tokens"] == expected and hit["cached"] == 256 and hit["tokens"] == continued


def test_more_requests_than_rows_are_all_answered_as_alone(served):
    engine, folder = served
    prompts, expected = zip(*[steady(folder, length) for length in (60, 130, 257, 140, 128, 90)], strict=True)
    flush(engine)
    together = answers(engine, list(prompts), NEW)
    assert [answer["tokens"] for answer in together] == list(expected)


def test_a_prompt_whose_windows_are_gone_is_computed_again(served):
    engine, folder = served
    tokens = prompt(520, seed=520)
    longer, expected = steady(folder, 560, after=tokens)
    flush(engine)
    answers(engine, [tokens], NEW)
    facts = engine.get_server_info()["internal_states"][0]["kvarn"]
    if facts["sliding_tokens"] > 2000:
        pytest.skip("the windows of this engine stay")
    for seed in range(5):
        answers(engine, [prompt(260, seed=seed)], NEW)
    (again,) = answers(engine, [longer], NEW)
    assert again["cached"] == 0 and again["tokens"] == expected
    (hit,) = answers(engine, [longer], NEW)
    assert hit["cached"] == 512 and hit["tokens"] == expected


@pytest.mark.parametrize(
    "family", ["gpt_oss", *(pytest.param(name, marks=pytest.mark.long) for name in ("laguna", "mellum", "step3p5"))]
)
def test_two_ranks_answer_as_the_oracle(family, start_engine, tmp_path, monkeypatch):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    folder = save(tmp_path, family)
    tokens, expected = steady(folder, 300)
    longer, continued = steady(folder, 390, after=tokens, cached=256)
    # the sinks of the other rank
    swapped = [where_sinks_count(folder, lambda sinks: sinks.roll(len(sinks) // 2))] if family == "gpt_oss" else []
    with start_engine(model_path=folder, kv_cache_dtype=PRESET, tp_size=2, **FAMILIES[family]) as engine:
        (miss,) = answers(engine, [tokens], NEW)
        (hit,) = answers(engine, [longer], NEW)
        short = answers(engine, [each for each, _ in swapped], NEW) if swapped else []
    assert miss["cached"] == 0 and miss["tokens"] == expected
    assert hit["cached"] == 256 and hit["tokens"] == continued
    assert [answer["tokens"] for answer in short] == [wanted for _, wanted in swapped]
