# SPDX-License-Identifier: Apache-2.0
"""Models with sliding windows whose layers SGLang all gives one pool: windows are read from records."""

from __future__ import annotations

import functools

import hybrids
import pytest
from sglang_kvarn import compat

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers, flush

NEW, ROWS = 4, 2
steady = functools.partial(hybrids.steady, new_tokens=NEW)


@pytest.fixture(scope="module", autouse=True)
def plain_torch():
    with pytest.MonkeyPatch.context() as patch:
        # Gemma 3 of SGLang compiles a function of a few lines, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        yield


@pytest.fixture(scope="module", params=[("gemma3_text", "kvarn_canonical"), ("olmo3", "kvarn")], ids="-".join)
def served(request, start_engine, tmp_path_factory):
    """Return (engine, folder of its model, preset)."""
    family, preset = request.param
    if not compat.is_since("0.5.23"):
        pytest.skip("refused with this SGLang")
    folder = tiny_model.save(tmp_path_factory.mktemp(family), family)
    options = {"max_running_requests": ROWS, "max_total_tokens": 16_384}
    with start_engine(model_path=folder, kv_cache_dtype=preset, **options) as engine:
        yield engine, folder, preset


@pytest.mark.parametrize("length", [201, 520])
def test_answer_is_the_oracles(served, length):
    engine, folder, preset = served
    tokens, expected = steady(folder, length, preset=preset)
    flush(engine)
    (miss,) = answers(engine, [tokens], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected


def test_a_second_turn_hits_what_was_decoded(served):
    engine, folder, preset = served
    # the last token of an answer is not fed
    tokens, expected = steady(folder, 382, preset=preset)
    flush(engine)
    (first,) = answers(engine, [tokens], NEW)
    turn, continued = steady(folder, 450, after=tokens + expected, cached=384, preset=preset)
    (hit,) = answers(engine, [turn], NEW)
    assert first["tokens"] == expected and hit["cached"] == 384 and hit["tokens"] == continued


def test_more_requests_than_rows_are_all_answered_as_alone(served):
    engine, folder, preset = served
    lengths = (330, 257, 126)
    assert len(lengths) > ROWS
    prompts, expected = zip(*[steady(folder, length, preset=preset) for length in lengths], strict=True)
    flush(engine)
    together = answers(engine, list(prompts), NEW)
    assert [answer["tokens"] for answer in together] == list(expected)


@pytest.mark.skipif(not compat.is_since("0.5.23"), reason="refused with this SGLang")
def test_a_model_with_windows_and_large_key_channels_answers_as_one_without(start_engine, tmp_path):
    folder, preset = tiny_model.save(tmp_path / "plain", "gemma3_text"), "kvarn_k2v2_g128_canonical"
    # two RoPE pairs, in the layer with a window as in the other one
    hard = hybrids.with_large_keys(folder, tmp_path / "hard", [3, 131, 40, 168])
    tokens, expected = steady(folder, 300, preset=preset)
    # what two bits make of the answer where nobody balances the channels
    assert tiny_model.expected(hard, tokens, preset, new_tokens=NEW) != expected
    with start_engine(model_path=hard, kv_cache_dtype=preset, max_running_requests=ROWS) as engine:
        (miss,) = answers(engine, [tokens], NEW)
    assert miss["tokens"] == expected


HEADS = {
    # of Gemma 3 SGLang's ranks have norms of a head each, of Olmo 3 norms of the heads of all ranks
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "olmo3": {},
}


@pytest.mark.skipif(not compat.is_since("0.5.23"), reason="refused with this SGLang")
@pytest.mark.parametrize("family", [pytest.param("gemma3_text", marks=pytest.mark.long), "olmo3"])
def test_two_ranks_answer_as_the_oracle(family, start_engine, tmp_path, monkeypatch):
    # the plugin sets it for this number of ranks; the next engine of this process has another
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    folder, preset = tiny_model.save(tmp_path, family, **HEADS[family]), "kvarn"
    tokens, expected = steady(folder, 330, preset=preset)
    longer, continued = steady(folder, 450, after=tokens, cached=256, preset=preset)
    with start_engine(model_path=folder, kv_cache_dtype=preset, max_running_requests=ROWS, tp_size=2) as engine:
        (miss,) = answers(engine, [tokens], NEW)
        (hit,) = answers(engine, [longer], NEW)
    assert miss["cached"] == 0 and miss["tokens"] == expected
    assert hit["cached"] == 256 and hit["tokens"] == continued
