# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server on two GPUs, between which mooncake moves requests: answers are the oracle's."""

from __future__ import annotations

import importlib.util

import pytest
import server_pair
import tiny_engines
import torch
from near_ties import Tally
from sglang_kvarn import compat

from benchmarks.common.tiny_model import prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
    pytest.mark.skipif(importlib.util.find_spec("mooncake") is None, reason="needs mooncake"),
]

PRESET, NEW = "kvarn", 20
LENGTHS = (60, 117, 128, 250, 380, 700)
# requests leave their rows and come back to others
OFTEN = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "7"}


def test_a_pair_of_gpus_answers_as_the_oracle(tmp_path):
    model = tiny_engines.save(tmp_path / "model")
    tally = Tally(model, PRESET, tiny_engines.DTYPE)
    prompts = [prompt(length, seed=length) for length in LENGTHS]

    def ask(pair: server_pair.Pair, tokens: list[list[int]]) -> list[dict]:
        sent = [pair.send(own, NEW) for own in tokens]
        answers = [answer.result() for _, answer in sent]
        for own, answer in zip(tokens, answers, strict=True):
            tally.judge(own, answer["output_ids"], answer["meta_info"]["cached_tokens"])
        return answers

    with server_pair.start(tmp_path, model, decode=OFTEN) as pair:
        first = ask(pair, prompts)
        again = ask(pair, prompts)
        turns = [own + answer["output_ids"] + prompt(30, seed=1) for own, answer in zip(prompts, first, strict=True)]
        hits = ask(pair, turns)
        pair.expect_empty()
        log = pair.decode.log.read_text()
    # a prefill server keeps the pages of a prompt, not those of its answer
    assert [answer["meta_info"]["cached_tokens"] for answer in again] == [0, 0, 0, 128, 256, 640]
    assert sum(answer["meta_info"]["cached_tokens"] for answer in hits) >= 1024
    assert "etract" in log
    tiny_engines.check_graphs(log)
    tally.close()
