# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server of a model whose sliding windows are read from records: answers are the oracle's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import server_pair
import tiny_engines
from server_pair import Pair, check
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import prompt

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
]

PRESET, NEW, PAGE = "kvarn", 12, 128
# who runs beside whom decides about last bits, and these about a token now and then
NEAR = 0.005


@pytest.fixture(scope="module", params=["olmo3", "gemma3_text"])
def model(request, tmp_path_factory) -> str:
    return tiny_model.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory) -> Iterator[Pair]:
    ring = tiny_engines.ring_pages(model, PRESET, 4, 1)
    prefill, decode = ({"max-total-tokens": (rows * ring + pages) * PAGE} for rows, pages in ((4, 40), (2, 14)))
    often = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
    with server_pair.start(tmp_path_factory.mktemp("pair"), model, prefill=prefill, decode=decode | often) as started:
        yield started


def test_answers_of_windows_in_records_are_the_oracles(pair, model):
    # less than a window of 200 tokens; within a page; at the end of one; again, which finds it; on a cached prefix
    first = prompt(500, seed=1)
    prompts = [prompt(150, 4), first, prompt(256, 2), first, first + prompt(84, 9)]
    assert [check(model, tokens, pair.ask(tokens, NEW), NEW, NEAR) for tokens in prompts] == [0, 0, 0, 384, 384]
    pair.expect_empty()


def test_tenants_whose_windows_are_in_records_are_retracted_and_none_reads_another(pair, model):
    common = prompt(256, seed=50)
    prompts = [common + prompt(20 + 7 * n, seed=100 + n) for n in range(6)]
    found = [answer.result() for _, answer in [pair.send(tokens, 40) for tokens in prompts]]
    for tokens, answer in zip(prompts, found, strict=True):
        check(model, tokens, answer, 40, NEAR)
    assert sum(answer["meta_info"]["num_retractions"] for answer in found) > 0
    pair.expect_empty()
