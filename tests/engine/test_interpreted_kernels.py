# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels, interpreted, behind a real engine: the path of a GPU but for the device."""

from __future__ import annotations

from benchmarks.common.tiny_model import answers, expected, prompt

PRESET = "kvarn_canonical"


def test_interpreted_kernels_give_the_oracles_tokens(start_engine, model, monkeypatch):
    monkeypatch.setenv("KVARN_CPU_FORM", "triton")
    # 126 and 5 new tokens: a page fills in a decode step and is read in the next
    tokens = prompt(126, seed=1)
    with start_engine(kv_cache_dtype=PRESET, max_running_requests=2, context_length=512) as engine:
        (answer,) = answers(engine, [tokens], 5)
        longer = tokens + answer["tokens"] + prompt(9, seed=2)
        (hit,) = answers(engine, [longer], 2)
    assert answer["tokens"] == expected(model, tokens, PRESET, new_tokens=5)
    assert hit["cached"] == 128
    assert hit["tokens"] == expected(model, longer, PRESET, new_tokens=2)
