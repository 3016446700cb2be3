# SPDX-License-Identifier: Apache-2.0
"""Drafts beside PD disaggregation, on the CPU: a draft model on a prefill and a decode server, answers as without.

What a head of random weights drafts is rejected. Texts that the decode server is told of are its drafts instead, and
are accepted where they are the oracle's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import draft_models
import drafts_on_cpu
import known_drafts
import pytest
import server_pair
from kvarn_kernels.config import KVarNConfig
from server_pair import OFTEN, Pair, check
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform
from test_disaggregation import HEAD_DIM, HEADS, PAGE

from benchmarks.common.tiny_model import expected, prompt

pytestmark = [
    pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
]

PRESET, NEW, DRAFTS = "kvarn", 20, 4
RING = KVarNConfig.from_preset(PRESET).ring_pages(HEAD_DIM, 4, DRAFTS)
# a page of the head's layer, keys or values, in 32 bits
DRAFT_PAGE_BYTES = PAGE * HEADS * HEAD_DIM * 4
MODES = {"overlap": {drafts_on_cpu.OVERLAP: "1"}, "no overlap": {"disable-overlap-schedule": True}}


class Drafting(NamedTuple):
    """A pair of servers, and the texts that its decode server drafts."""

    pair: Pair
    texts: known_drafts.Texts


def pools(preset: str = PRESET, drafts: int = DRAFTS) -> dict[str, dict[str, Any]]:
    """Return the options of both servers: room for four requests, and for two that are retracted at every few steps."""
    ring = KVarNConfig.from_preset(preset).ring_pages(HEAD_DIM, 4, drafts)
    sizes = {"prefill": (4 * ring + 40) * PAGE, "decode": (2 * ring + 14) * PAGE}
    options = {server: {"max-total-tokens": size, "kv-cache-dtype": preset} for server, size in sizes.items()}
    options["decode"] |= OFTEN
    return options


@pytest.fixture(scope="module")
def eagle(model, tmp_path_factory) -> Iterator[Drafting]:
    folder = tmp_path_factory.mktemp("pair")
    texts = known_drafts.Texts(folder / known_drafts.FILE)
    options = draft_models.of_a_pair("EAGLE", folder) | MODES["overlap"]
    with server_pair.start(folder, model, stand_ins=draft_models.STAND_INS, **pools(), **options) as pair:
        yield Drafting(pair, texts)


def accepted(answer: dict) -> int:
    return answer["meta_info"]["spec_num_correct_drafts"]


def test_answers_are_the_oracles_whether_drafts_are_rejected_or_accepted(eagle, model):
    pair, texts = eagle
    # within the first page; at the end of one; in chunks; on a cached prefix
    first = prompt(300, seed=1)
    prompts = [prompt(100, 4), prompt(256, 2), prompt(640, 3), first, first + prompt(84, 9)]
    found = []
    for tokens in prompts:
        texts.know([])
        pair.sent()
        rejected = pair.ask(tokens, NEW)
        found.append(check(model, tokens, rejected, NEW))
        assert accepted(rejected) < NEW // 4
        # pages of the head travel beside those of records, keys and values; by the size of the memory they are in
        sent = Counter()
        for each in pair.sent():
            sent.update(each)
        assert -(-len(tokens) // PAGE) * 2 * DRAFT_PAGE_BYTES in sent.values()
        wanted = expected(model, tokens, PRESET, cached=(len(tokens) - 1) // PAGE * PAGE, new_tokens=NEW)
        texts.know([tokens + wanted])
        answer = pair.ask(tokens, NEW)
        check(model, tokens, answer, NEW)
        assert answer["output_ids"] == wanted and accepted(answer) > NEW // 2
    assert found == [0, 0, 0, 0, 256]
    pair.expect_empty()


def test_tenants_are_retracted_while_drafts_of_some_are_accepted_and_of_others_rejected(eagle, model):
    pair, texts = eagle
    # keys of the prefix cache are pairs of tokens
    common = prompt(PAGE + 1, seed=50)
    pair.ask(common, 1)
    # steps fill a page of most answers; so many that two run at a time, whatever else the machine does
    prompts = [common + prompt(83 + 7 * n, seed=100 + n) for n in range(8)]
    known = prompts[::2]
    wanted = [expected(model, tokens, PRESET, cached=PAGE, new_tokens=40) for tokens in known]
    texts.know([tokens + answer for tokens, answer in zip(known, wanted, strict=True)])
    answers = [answer for _, answer in [pair.send(tokens, 40) for tokens in prompts]]
    found = [answer.result() for answer in answers]
    # as in test_disaggregation
    hits = [check(model, tokens, each, 40, near=0.005) for tokens, each in zip(prompts, found, strict=True)]
    assert sum(each["meta_info"]["num_retractions"] for each in found) > 0
    assert hits == [PAGE] * len(prompts)
    assert min(map(accepted, found[::2])) > 20 > 10 > max(map(accepted, found[1::2]))
    pair.expect_empty()


def test_a_prompt_that_never_fits_beside_a_ring_and_drafts_is_refused(eagle, model):
    pair, texts = eagle
    # as in test_disaggregation, for a pool of two rings and 14 pages
    tokens = prompt((pools()["decode"]["max-total-tokens"] // PAGE - RING - 2) * PAGE, seed=24)
    sent, answer = pair.send(tokens, NEW, rid="too long", in_turn=True)
    assert "exceeds the maximum allowed length" in json.dumps(answer.result())
    pair.prefill.abort("too long")
    sent.result()
    texts.know([])
    # the longest that is taken is answered
    longest = tokens[: -PAGE]
    check(model, longest, pair.ask(longest, NEW), NEW)
    pair.expect_empty()


@pytest.mark.long
@pytest.mark.parametrize("without", ["prefill", "decode"])
def test_a_server_that_drafts_and_one_that_does_not_say_so(model, tmp_path, without):
    options, own = pools(), draft_models.of_a_pair("EAGLE", tmp_path)
    for server, chosen in options.items():
        chosen |= {key: value for key, value in own.items() if key.isupper() or server != without}
    with server_pair.start(tmp_path, model, stand_ins=draft_models.STAND_INS, **options) as pair:
        server_pair.refuse_each_other(pair, "start both servers with the same --speculative-algorithm")


@pytest.mark.long
@pytest.mark.parametrize(
    ("algorithm", "preset", "mode", "more"),
    [
        ("EAGLE", "kvarn_canonical", "no overlap", {}),
        ("EAGLE3", "kvarn", "overlap", {}),
        ("DFLASH", "kvarn", "overlap", {}),
        ("DFLASH", "kvarn_canonical", "no overlap", {}),
        ("EAGLE", "kvarn", "overlap", {"speculative-adaptive": True}),
        # a ring has a page more
        ("EAGLE", "kvarn", "overlap", {"speculative-num-steps": 11, "speculative-num-draft-tokens": 12}),
    ],
)
def test_other_drafts_answer_as_the_oracle(model, tmp_path, algorithm, preset, mode, more):
    texts = known_drafts.Texts(tmp_path / known_drafts.FILE)
    drafts = more.get("speculative-num-draft-tokens", DRAFTS)
    options = pools(preset, drafts) | draft_models.of_a_pair(algorithm, tmp_path) | MODES[mode] | more
    first = prompt(300, seed=1)
    # two of which a page ends while drafts are verified
    prompts = [prompt(117, 4), prompt(640, 3), first, first + prompt(74, 9)]
    with server_pair.start(tmp_path, model, stand_ins=draft_models.STAND_INS, **options) as pair:
        for cached in (False, True):
            for tokens in prompts:
                hit = (len(tokens) - 1) // PAGE * PAGE if cached else PAGE * 2 if tokens == prompts[3] else 0
                wanted = expected(model, tokens, preset, cached=hit, new_tokens=NEW)
                texts.know([tokens + wanted] if cached else [])
                answer = pair.ask(tokens, NEW)
                assert (answer["output_ids"], answer["meta_info"]["cached_tokens"]) == (wanted, hit)
                assert (accepted(answer) > NEW // 2) is cached
        answers = [answer for _, answer in [pair.send(tokens, 60) for tokens in prompts * 2]]
        found = [answer.result() for answer in answers]
        pair.expect_empty()
    for tokens, each in zip(prompts * 2, found, strict=True):
        check(model, tokens, each, 60, near=0.005, preset=preset)
    assert sum(each["meta_info"]["num_retractions"] for each in found) > 0
