# SPDX-License-Identifier: Apache-2.0
"""32 tenants of a prefill and a decode server, while transfers fail or wait, and some of the tenants hang up.

Prompts share prefixes in a tree and carry secrets. The decode server has room for two requests at a time and takes
running ones back at every few steps; the prefill server has room for a few prefixes.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache, partial
from itertools import cycle
from pathlib import Path

import draft_models
import known_drafts
import pytest
import server_pair
import torch
from kvarn_kernels.config import KVarNConfig
from server_pair import OFTEN, Pair
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform
from transfer_engine_on_cpu import LATE, LOST

from benchmarks.common import tiny_model
from benchmarks.isolation.oracle import NEAR_TIE
from benchmarks.isolation.tenants import contains, token_prompts

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU"),
    pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang"),
]

# a hit reads what a miss does, so that an answer does not depend on who computed a prefix
PRESET = "kvarn_canonical"
TENANTS, PROMPTS_EACH, REQUESTS_EACH, NEW = 32, 3, 8, 24
# of the requests, those that are aborted within so many seconds
ABORTS, PATIENCE = 0.2, 4
RING, PAGE = KVarNConfig.from_preset(PRESET).ring_pages(64, 4), 128
POOL = {"max-total-tokens": (4 * RING + 24) * PAGE}
SMALL_POOL = {"max-total-tokens": (2 * RING + 14) * PAGE}


@dataclass
class Answer:
    """What became of a request.

    Attributes:
        prompt: its number; aborted: whether the tenant hung up; sent, received: what the servers answered.
    """

    prompt: int
    aborted: bool
    sent: dict
    received: dict

    @property
    def tokens(self) -> list[int]:
        return self.received.get("output_ids", [])


def hang_up(pair: Pair, rid: str, ends: Sequence[Future]) -> None:
    """Abort a request at both servers, as a router does, until both have ended it: an abort may overtake its request.

    Args:
        ends: what the prefill and the decode server will answer.
    """
    while waiting := [server for server, end in zip((pair.prefill, pair.decode), ends, strict=True) if not end.done()]:
        for server in waiting:
            server.abort(rid)
        wait(ends, timeout=0.5)


def live(pair: Pair, prompts: list, tenant: int) -> list[Answer]:
    """Send the requests of a tenant one after the other, and return their answers."""
    chance, found = random.Random(tenant), []
    mine = [n for n, each in enumerate(prompts) if each.tenant == tenant]
    for n in range(REQUESTS_EACH):
        number, rid, hangs_up = chance.choice(mine), f"tenant {tenant:02} {n:02}", chance.random() < ABORTS
        futures = pair.send(prompts[number].payload["input_ids"], NEW, rid=rid)
        if hangs_up:
            time.sleep(chance.random() * PATIENCE)
            hang_up(pair, rid, futures)
        found.append(Answer(number, hangs_up, *(each.result() for each in futures)))
    return found


def spoil(pair: Pair, ended: threading.Event) -> dict[str, int]:
    """Let transfers fail, and wait, now and then; return how often some did."""
    happened, names = {LOST: 0, LATE: 0}, cycle((LOST, LATE))
    while not ended.wait(4):
        with pair.fault(name := next(names)):
            ended.wait(1)
            happened[name] += (pair.folder / f"{name} happened").exists()
    return happened


def difference(model: str, tokens: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """Return by how much the oracle would rather have had another token anywhere in an answer, 0 for its own answer."""
    if not answer:
        return 0.0
    logits = tiny_model.logits(model, [*tokens, *answer[:-1]], PRESET)[len(tokens) - 1 :]
    return float((logits.max(-1).values - logits.gather(-1, torch.tensor(answer)[:, None])[:, 0]).max())


def judge(model: str, prompts: list, answers: list[Answer]) -> dict[str, int]:
    """Count what became of the requests, and who read another's tokens."""
    ask = cache(partial(difference, model))
    by_far = [ask(tuple(prompts[each.prompt].payload["input_ids"]), tuple(each.tokens)) for each in answers]
    secrets = {each.tenant: each.secret for each in prompts}
    complete = [each for each in answers if len(each.tokens) == NEW]
    failed = [json.dumps(each.received) for each in answers if len(each.tokens) < NEW and not each.aborted]
    facts = [each.received["meta_info"] for each in answers if each.tokens]
    return {
        "requests": len(answers),
        "complete": len(complete),
        "aborted": sum(each.aborted and len(each.tokens) < NEW for each in answers),
        "failed": len(failed),
        "unexplained": sum("transfer failed" not in each for each in failed),
        "tokens": sum(len(each.tokens) for each in answers),
        "prefix hits": sum(each["cached_tokens"] > 0 for each in facts),
        "retractions": sum(each["num_retractions"] for each in facts),
        "accepted drafts": sum(each.get("spec_num_correct_drafts", 0) for each in facts),
        "differing at a near tie": sum(0 < each < NEAR_TIE for each in by_far),
        "differing": sum(each >= NEAR_TIE for each in by_far),
        "leaked secrets": sum(
            contains({"output_ids": each.tokens}, secret)
            for each in answers
            for tenant, secret in secrets.items()
            if tenant != prompts[each.prompt].tenant
        ),
    }


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafts"])
def test_32_tenants_of_two_servers_read_only_their_own(tmp_path: Path, drafts: bool):
    model, prompts = tiny_model.save(tmp_path / "model"), token_prompts(TENANTS, PROMPTS_EACH)
    common = {"kv-cache-dtype": PRESET, "prefill": POOL, "decode": SMALL_POOL | OFTEN}
    if drafts:
        common |= draft_models.of_a_pair("EAGLE", tmp_path) | {"stand_ins": draft_models.STAND_INS}
        # of every other prompt the whole answer is drafted
        known = [each.payload["input_ids"] for each in prompts[::2]]
        texts = [tokens + tiny_model.expected(model, tokens, PRESET, new_tokens=NEW) for tokens in known]
        known_drafts.Texts(tmp_path / known_drafts.FILE).know(texts)
    with server_pair.start(tmp_path, model, **common) as pair, ThreadPoolExecutor(TENANTS + 1) as clients:
        ended, started = threading.Event(), time.monotonic()
        spoiler = clients.submit(spoil, pair, ended)
        try:
            lives = clients.map(partial(live, pair, prompts), range(TENANTS))
            answers = [answer for life in lives for answer in life]
        finally:
            ended.set()
        seconds = round(time.monotonic() - started)
        happened = spoiler.result()
        # whatever was left of requests, and then of prefixes
        pair.expect_empty()
        pair.prefill.flush()
        left = [pair.prefill.facts(), pair.decode.facts()]
    found = judge(model, prompts, answers)
    print(json.dumps(found | {"faults": happened, "seconds": seconds}, indent=1))
    assert [(each["pages_in_use"], each["rings_in_use"]) for each in left] == [(0, 0)] * 2
    assert (found["differing"], found["leaked secrets"], found["unexplained"]) == (0, 0, 0)
    assert found["differing at a near tie"] <= found["requests"] // 50
    assert found["complete"] > found["requests"] // 2 and found["aborted"] > 0 and found["failed"] > 0
    assert found["prefix hits"] > found["complete"] // 4 and found["retractions"] > 0
    assert min(happened.values()) > 0
    assert (found["accepted drafts"] > found["complete"] * NEW // 4) is drafts
