# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server of a model with sliding windows, in records or in SGLang's pool: answers are right.

As in `test_disaggregation`. SGLang counts every page of every step of both servers, those of windows too.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import draft_models
import drafts_on_cpu
import hybrids
import known_drafts
import pytest
import server_pair
from server_pair import CHECKED, OFTEN, Pair
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform
from transfer_engine_on_cpu import LOST

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import WINDOWS_IN_RECORDS, prompt

pytestmark = [
    pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
]

PRESET, NEW, PAGE, DRAFTS = "kvarn", 12, 128, 4
# who runs beside whom decides about last bits, and these about a token now and then
NEAR = 0.005
# with drafts a step sums in another order; a hit of this preset reads as a miss, and answers are by a wide margin
DRAFTED = hybrids.PRESET
# options of both servers; experts of gpt-oss compile their activation, which takes a minute
FAMILIES: dict[str, dict[str, Any]] = {family: {} for family in ("laguna", "mellum", "step3p5", *WINDOWS_IN_RECORDS)}
FAMILIES["gpt_oss"] = {"moe-runner-backend": "triton", "TORCH_COMPILE_DISABLE": "1"}
LONG = [pytest.param(family, marks=pytest.mark.long) for family in ("laguna", "mellum", "step3p5", *WINDOWS_IN_RECORDS)]
STAND_INS = ("triton_attention_on_cpu", "host_pools_on_cpu")


pools = functools.partial(server_pair.pool, preset=PRESET)


def start(folder: Path, model: str, family: str, **options: Any):
    """Run both servers, the decode server with two places."""
    chosen = {"prefill": pools(model, pages=40, rows=4), "decode": pools(model, pages=14, rows=2) | OFTEN} | options
    return server_pair.start(folder, model, **{"stand_ins": STAND_INS} | CHECKED | FAMILIES[family] | chosen)


@pytest.fixture(scope="module", params=["gpt_oss", *LONG])
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family, tmp_path_factory) -> str:
    return tiny_model.save(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def pair(family, model, tmp_path_factory) -> Iterator[Pair]:
    with start(tmp_path_factory.mktemp("pair"), model, family) as started:
        yield started


def check(model: str, tokens: list[int], answer: dict, new_tokens: int = NEW) -> int:
    return server_pair.check(model, tokens, answer, new_tokens, NEAR)


def windows_sent(pair: Pair, model: str) -> int:
    """Return how many pages of each layer in SGLang's pool of windows were sent."""
    config = json.loads((Path(model) / "config.json").read_text())
    # groups are the KV heads of Step
    heads = config.get("num_key_value_heads") or config["num_attention_groups"]
    token = heads * config["head_dim"] * 4
    # of keys, or of values, with a page for padding
    region = (pair.prefill.facts()["sliding_tokens"] + PAGE) * token
    # behind those of the model Step lists layers that draft
    buffers = 2 * config["layer_types"][: config["num_hidden_layers"]].count("sliding_attention")
    pages, rest = divmod(sum(each.get(region, 0) for each in pair.sent()), buffers * PAGE * token)
    assert rest == 0
    return pages


def test_answers_are_the_oracles_and_windows_go_over_the_wire(pair, model, family):
    # less than a window; within a page; at the end of one; again, which finds it; in chunks, on a cached prefix
    first = prompt(500, seed=1)
    prompts = [prompt(100, 4), first, prompt(256, 2), first, first + prompt(84, 9)]
    found, sent = [], []
    for tokens in prompts:
        pair.sent()
        found.append(check(model, tokens, pair.ask(tokens, NEW)))
        sent += [] if family in WINDOWS_IN_RECORDS else [windows_sent(pair, model)]
    assert found == [0, 0, 0, 384, 384]
    # the pages of the last 127 tokens, which the next one sees
    assert sent == ([] if family in WINDOWS_IN_RECORDS else [1, 2, 1, 2, 2])
    pair.expect_empty()


@pytest.mark.long
@pytest.mark.parametrize("length", [60, 300])
def test_windows_that_were_received_are_left_behind_and_requests_retracted_amid_it(pair, model, length):
    # answers of more than a window and a page
    prompts = [prompt(length + 9 * n, seed=70 + n) for n in range(3)]
    found = server_pair.answers_together(pair, model, prompts, 270, NEAR)
    assert sum(answer["meta_info"]["num_retractions"] for answer in found) > 3
    pair.expect_empty()


def test_tenants_are_retracted_and_none_reads_the_windows_of_another(pair, model):
    common = prompt(256, seed=50)
    prompts = [common + prompt(20 + 7 * n, seed=100 + n) for n in range(6)]
    server_pair.answers_together(pair, model, prompts, 40, NEAR)
    pair.expect_empty()


def test_an_aborted_request_leaves_no_window(pair, model):
    server_pair.leaves_nothing_where_it_is_aborted(pair, model, NEAR)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_oss", "laguna"])
def test_more_requests_than_have_windows_wait_for_them(tmp_path, family):
    model = tiny_model.save(tmp_path / "model", family)
    # records for all, and windows for two or three of them
    few = pools(model, pages=100, rows=8) | {"swa-full-tokens-ratio": 0.03, "max-running-requests": 8}
    few["SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION"] = "200"
    prompts = [prompt(300 + 9 * n, seed=100 + n) for n in range(8)]
    with start(tmp_path, model, family, decode=few) as pair:
        assert pair.decode.facts()["sliding_tokens"] < 8 * PAGE
        found = [answer.result() for _, answer in [pair.send(tokens, 200) for tokens in prompts]]
        for tokens, answer in zip(prompts, found, strict=True):
            check(model, tokens, answer, 200)
        pair.expect_empty()


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_oss", "laguna"])
def test_two_ranks_of_each_server_send_the_windows_of_their_heads(tmp_path, family):
    model = tiny_model.save(tmp_path / "model", family)
    first = prompt(300, seed=1)
    with start(tmp_path, model, family, **{"tp-size": 2}) as pair:
        prompts = [prompt(100, 4), first, first, first + prompt(60, 9)]
        assert [check(model, tokens, pair.ask(tokens, NEW)) for tokens in prompts] == [0, 0, 256, 256]
        together = [prompt(150 + 9 * n, seed=60 + n) for n in range(5)]
        server_pair.answers_together(pair, model, together, 24, NEAR)
        with pair.fault(LOST):
            sent, answer = pair.send(prompt(300, seed=22), NEW)
            assert "transfer failed" in json.dumps(sent.result()) and "transfer failed" in json.dumps(answer.result())
        server_pair.wait_for(lambda: "output_ids" in pair.ask(prompt(60, seed=23), 4), "transfers to go on")
        server_pair.works(pair, model, NEAR)


@pytest.mark.long
@pytest.mark.parametrize("family", ["gpt_oss", "laguna"])
def test_a_prefix_and_its_windows_from_host_memory_of_the_prefill_server_are_sent(tmp_path, family):
    model = tiny_model.save(tmp_path / "model", family)
    # room for a ring and 8 pages, of which a prompt takes 3
    hosted = pools(model, pages=8, rows=1) | {"enable-hierarchical-cache": True, "hicache-ratio": 3}
    prompts = [prompt(300, seed=200 + n) for n in range(4)]
    with start(tmp_path, model, family, prefill=hosted | {"max-running-requests": 1}) as pair:
        found = []
        for _ in range(2):
            for tokens in prompts:
                answer = pair.ask(tokens, NEW)
                check(model, tokens, answer)
                found.append(answer["meta_info"]["cached_tokens_details"] or {})
        pair.expect_empty()
    assert [each.get("host", 0) for each in found].count(256) >= 3, found


@pytest.mark.long
@pytest.mark.parametrize(("family", "algorithm"), [("gpt_oss", "EAGLE3"), ("laguna", "EAGLE")])
def test_drafts_are_verified_in_windows_that_were_received(tmp_path, family, algorithm):
    model = tiny_model.save(tmp_path / "model", family)
    texts = known_drafts.Texts(tmp_path / known_drafts.FILE)
    options = draft_models.of_a_pair(algorithm, tmp_path) | {drafts_on_cpu.OVERLAP: "1", "kv-cache-dtype": DRAFTED}
    options["prefill"] = pools(model, pages=40, rows=4, drafts=DRAFTS)
    options["decode"] = pools(model, pages=14, rows=2, drafts=DRAFTS) | OFTEN
    steady = functools.partial(hybrids.steady, model, preset=DRAFTED, new_tokens=NEW)
    # longer than a window, and a page ends amid the answer; on a cached prefix
    tokens, wanted = steady(380)
    turn, continued = steady(450, after=tokens + wanted, cached=256)
    tenants = [steady(length) for length in (60, 250, 120, 330, 90)]
    with start(tmp_path, model, family, stand_ins=draft_models.STAND_INS, **options) as pair:
        for texts_known in ([], [tokens + wanted, turn + continued]):
            pair.prefill.flush()
            texts.know(texts_known)
            first, second = (pair.ask(each, NEW) for each in (tokens, turn))
            assert (first["output_ids"], first["meta_info"]["cached_tokens"]) == (wanted, 0)
            assert (second["output_ids"], second["meta_info"]["cached_tokens"]) == (continued, 256)
            for answer in (first, second):
                assert (answer["meta_info"]["spec_num_correct_drafts"] > NEW // 2) is bool(texts_known)
        together = [answer for _, answer in [pair.send(each, NEW) for each, _ in tenants]]
        found = [answer.result() for answer in together]
        pair.expect_empty()
    assert [answer["output_ids"] for answer in found] == [wanted for _, wanted in tenants]
    assert sum(answer["meta_info"]["num_retractions"] for answer in found) > 0
