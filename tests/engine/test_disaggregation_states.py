# SPDX-License-Identifier: Apache-2.0
"""A prefill and a decode server of a model in which some layers keep states: the state of a request goes with it.

As in `test_disaggregation`, with torch in the place of SGLang's kernels for states. SGLang counts every page and every
state of every step of both servers.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from pathlib import Path

import draft_models
import drafts_on_cpu
import hybrids
import known_drafts
import pytest
import server_pair
from hybrids import DELTA, MAMBA2, TWO_RANKS
from server_pair import CHECKED, OFTEN, Pair
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform
from transfer_engine_on_cpu import LOST

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import prompt

pytestmark = [
    pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
]

PRESET, NEW, PAGE = "kvarn", 8, 128
FAMILIES = [DELTA, *(pytest.param(name, marks=pytest.mark.long) for name in (*MAMBA2, "qwen3_next"))]
# a layer of states sums in another order than the oracle's
NEAR = hybrids.MARGIN


pools = functools.partial(server_pair.pool, preset=PRESET)


def start(folder: Path, model: str, **options):
    """Run both servers, the decode server with two places."""
    chosen = {"prefill": pools(model, pages=40, rows=4), "decode": pools(model, pages=14, rows=2) | OFTEN} | options
    return server_pair.start(folder, model, **{"stand_ins": ["states_on_cpu"]} | CHECKED | chosen)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request, tmp_path_factory) -> str:
    return tiny_model.save(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def pair(model, tmp_path_factory) -> Iterator[Pair]:
    with start(tmp_path_factory.mktemp("pair"), model) as started:
        yield started


def check(model: str, tokens: list[int], answer: dict, new_tokens: int = NEW) -> int:
    return server_pair.check(model, tokens, answer, new_tokens, NEAR)


def works(pair: Pair, model: str) -> None:
    server_pair.works(pair, model, NEAR)


def test_answers_are_the_oracles_and_one_state_goes_over_the_wire(pair, model):
    # at the end of a page; in chunks; again, where a state was kept; on a cached prefix
    first = prompt(300, seed=1)
    prompts = [prompt(128, 4), first, first, first + prompt(60, 9)]
    found, pages, state = [], pair.prefill.facts()["bytes_per_token"] * PAGE, pair.prefill.facts()["bytes_per_state"]
    for tokens in prompts:
        pair.sent()
        found.append(check(model, tokens, pair.ask(tokens, NEW)))
        sizes = [sum(each.values()) for each in pair.sent()]
        # its pages, then its state, then its ring
        assert sizes.count(state) == 1, (sizes, state)
        assert sum(sizes[: sizes.index(state)]) == -(-len(tokens) // PAGE) * pages
    assert found == [0, 0, 256, 256]
    # a state for each of four running requests, and of twice as many that are received
    assert pair.decode.facts()["states"] == 12
    pair.expect_empty()


def test_tenants_share_two_places_and_are_retracted_and_each_keeps_its_state(pair, model):
    common = prompt(128, seed=50)
    prompts = [common + prompt(20 + 7 * n, seed=100 + n) for n in range(5)]
    server_pair.answers_together(pair, model, prompts, 24, NEAR)
    pair.expect_empty()


def test_an_aborted_request_leaves_no_state(pair, model):
    server_pair.leaves_nothing_where_it_is_aborted(pair, model, NEAR)


@pytest.mark.long
@pytest.mark.parametrize("family", [DELTA, "nemotron_h"])
def test_two_ranks_of_each_server_send_the_states_of_their_heads(tmp_path, family):
    model = tiny_model.save(tmp_path / "model", family, **TWO_RANKS.get(family, {}))
    first = prompt(300, seed=1)
    with start(tmp_path, model, **{"tp-size": 2}) as pair:
        prompts = [prompt(100, 4), first, first, first + prompt(60, 9)]
        assert [check(model, tokens, pair.ask(tokens, NEW)) for tokens in prompts] == [0, 0, 256, 256]
        together = [prompt(150 + 9 * n, seed=60 + n) for n in range(5)]
        server_pair.answers_together(pair, model, together, 24, NEAR)
        with pair.fault(LOST):
            sent, answer = pair.send(prompt(300, seed=22), NEW)
            assert "transfer failed" in json.dumps(sent.result()) and "transfer failed" in json.dumps(answer.result())
        server_pair.wait_for(lambda: "output_ids" in pair.ask(prompt(60, seed=23), 4), "transfers to go on")
        works(pair, model)


@pytest.mark.long
def test_servers_with_states_of_other_dtypes_live_and_say_so(tmp_path):
    model = tiny_model.save(tmp_path / "model", "nemotron_h")
    other = pools(model, pages=40, rows=4) | {"mamba-ssm-dtype": "bfloat16"}
    with start(tmp_path, model, prefill=other) as pair:
        server_pair.refuse_each_other(pair, "start both servers with the same --mamba-ssm-dtype")


@pytest.mark.long
@pytest.mark.parametrize("family", [DELTA, "nemotron_h"])
def test_a_prefix_and_its_state_from_host_memory_of_the_prefill_server_are_sent(tmp_path, family):
    model = tiny_model.save(tmp_path / "model", family)
    # room for a ring and 8 pages, of which a prompt takes 3
    hosted = pools(model, pages=8, rows=1) | {"enable-hierarchical-cache": True, "hicache-ratio": 3}
    hosted |= {"max-running-requests": 1, "max-mamba-cache-size": 40}
    prompts = [prompt(300, seed=200 + n) for n in range(4)]
    with start(tmp_path, model, prefill=hosted) as pair:
        found = []
        for _ in range(2):
            for tokens in prompts:
                answer = pair.ask(tokens, NEW)
                check(model, tokens, answer)
                found.append(answer["meta_info"]["cached_tokens_details"] or {})
        pair.expect_empty()
    assert [each.get("host", 0) for each in found].count(256) >= 3, found


@pytest.mark.long
@pytest.mark.parametrize(("family", "algorithm"), [(DELTA, "NEXTN"), (DELTA, "DFLASH"), ("nemotron_h", "DFLASH")])
def test_drafts_are_accepted_and_rejected_beside_states(tmp_path, family, algorithm):
    model = tiny_model.save(tmp_path / "model", family)
    drafts = draft_models.of_a_pair(algorithm, tmp_path) | {drafts_on_cpu.OVERLAP: "1"}
    first = hybrids.steady(model, 300, preset=PRESET, new_tokens=24)
    turn = hybrids.steady(model, 384, after=first[0], preset=PRESET, new_tokens=24, cached=256)
    common = {"stand_ins": ["states_on_cpu", *draft_models.STAND_INS]} | drafts
    with start(tmp_path, model, **common) as pair:
        known_drafts.Texts(tmp_path / known_drafts.FILE).know([tokens + answer for tokens, answer in (first, turn)])
        for tokens, wanted, cached in ((*first, 0), (*turn, 256)):
            answer = pair.ask(tokens, 24)
            assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (wanted, cached)
            assert answer["meta_info"]["spec_num_correct_drafts"] > 12
        prompts = [prompt(150 + 9 * n, seed=60 + n) for n in range(5)] + [first[0], turn[0]]
        server_pair.answers_together(pair, model, prompts, 24, NEAR)
        works(pair, model)
