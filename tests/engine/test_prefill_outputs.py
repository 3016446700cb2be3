# SPDX-License-Identifier: Apache-2.0
"""Outputs of attention where SGLang's prefill graphs want them; the graphs themselves need a GPU."""

import pytest
from engine_plugin import add_to_engines

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers, prompt

NEW = 4


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_outputs_are_written_where_the_next_part_of_a_graph_reads(start_engine, model, tmp_path, monkeypatch, preset):
    add_to_engines(monkeypatch, tmp_path / "plugin", "prefill_outputs:install")
    # in several chunks, and a second turn that hits the first
    tokens = prompt(600, seed=1)
    expected = tiny_model.expected(model, tokens, preset, new_tokens=NEW)
    turn = tokens + expected + prompt(40, seed=2)
    with start_engine(kv_cache_dtype=preset) as engine:
        (first,) = answers(engine, [tokens], NEW)
        (hit,) = answers(engine, [turn], NEW)
    assert first["tokens"] == expected and hit["cached"] == 512
    assert hit["tokens"] == tiny_model.expected(model, turn, preset, cached=512, new_tokens=NEW)
