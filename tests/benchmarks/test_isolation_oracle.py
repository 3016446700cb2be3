# SPDX-License-Identifier: Apache-2.0
"""The oracle of the isolation benchmark knows what a prefix-cache hit may have read, and nothing more."""

from __future__ import annotations

import pytest

from benchmarks.isolation.load import Answer
from benchmarks.isolation.oracle import NEAR_TIE, Alone, Oracle
from benchmarks.isolation.tenants import Prompt


def answer(ids, cached, retractions=0) -> Answer:
    meta = {"cached_tokens": cached, "num_retractions": retractions, "completion_tokens": len(ids)}
    return Answer(0, "plain", len(ids), {"output_ids": ids, "meta_info": meta})


@pytest.fixture
def oracle(monkeypatch):
    """An oracle of one prompt of 600 tokens that notes what it is asked; each history has an answer of its own."""
    oracle = Oracle("http://localhost", [Prompt(0, {"input_ids": [7] * 600}, "")], 2, True)
    oracle.asked = []

    def ask(prompt, history):
        oracle.asked.append(history)
        return Alone([sum(history), len(history)], [1.0, NEAR_TIE / 2])

    monkeypatch.setattr(oracle, "_ask", ask)
    return oracle


def test_histories_end_where_the_hit_ended(oracle):
    assert list(oracle.histories(answer([1], 0))) == [()]
    assert list(oracle.histories(answer([1], 128))) == [(128,)]
    found = set(oracle.histories(answer([1], 384)))
    assert found == {(384,), (128, 384), (256, 384), (128, 256, 384)}


def test_histories_of_a_retracted_request_end_anywhere_before(oracle):
    found = set(oracle.histories(answer([1], 256, retractions=1)))
    assert found == {(256,), (128, 256), (128,), ()}
    assert max(h[-1] for h in oracle.histories(answer([1], 5 * 384, retractions=4)) if h) == 512


def test_histories_of_a_cache_whose_hits_read_as_misses_are_empty():
    plain = Oracle("http://localhost", [Prompt(0, {"input_ids": [7] * 600}, "")], 2, False)
    assert list(plain.histories(answer([1], 384))) == [()]


def test_compare_takes_any_history_that_fits_and_asks_each_once(oracle):
    assert oracle.compare(answer([512, 2], 384)) == (None, 0.0)
    assert oracle.compare(answer([512, 2], 384)) == (None, 0.0)
    assert oracle.asked == [(384,), (128, 384)]


def test_compare_names_the_first_difference_of_the_history_that_fits_best(oracle):
    # the answer of a miss to a hit: wrong where the choice was clear
    assert oracle.compare(answer([0, 0], 128)) == (0, 1.0) and oracle.is_wrong(answer([0, 0], 128))
    # at a near tie
    assert oracle.compare(answer([128, 9], 128)) == (1, NEAR_TIE / 2) and not oracle.is_wrong(answer([128, 9], 128))
