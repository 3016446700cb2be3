# SPDX-License-Identifier: Apache-2.0
"""Many tenants at once: plain answers, streams that are dropped half-way, and aborts."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field

import httpx

from benchmarks.isolation.tenants import Prompt

# seconds until a request that gets no answer counts as hung
HANG_SECONDS = 300


@dataclass
class Answer:
    """What one request got: the whole answer, or the part of it that was read before it was dropped.

    Attributes:
        prompt: index of the prompt; kind: "plain", "disconnect" or "abort"; new_tokens: what was asked for.
        output: the last JSON object of /generate; None if nothing came; seconds: until the last byte.
        error: what went wrong; a dropped or aborted request that ends early is no error.
    """

    prompt: int
    kind: str
    new_tokens: int
    output: dict | None = None
    seconds: float = 0.0
    error: str | None = None

    @property
    def output_ids(self) -> list[int]:
        return self.output["output_ids"] if self.output else []


@dataclass
class Load:
    """Describe the requests of a run; deterministic but for timing.

    Attributes:
        requests: how many in all; tenants send theirs one after the other, all tenants at once.
        disconnects, aborts: shares of the requests that the client drops, or aborts by id.
    """

    prompts: list[Prompt]
    requests: int
    new_tokens: tuple[int, ...] = (8, 24, 40, 64)
    disconnects: float = 0.08
    aborts: float = 0.07
    seed: int = 0
    answers: list[Answer] = field(default_factory=list)

    def plan(self) -> dict[int, list[Answer]]:
        """Return the requests of each tenant, in order."""
        generator = random.Random(self.seed)
        plan: dict[int, list[Answer]] = {}
        for n in range(self.requests):
            tenants = sorted({p.tenant for p in self.prompts})
            tenant = tenants[n % len(tenants)]
            index = generator.choice([i for i, p in enumerate(self.prompts) if p.tenant == tenant])
            chance = generator.random()
            kind = "disconnect" if chance < self.disconnects else "plain"
            if self.disconnects <= chance < self.disconnects + self.aborts:
                kind = "abort"
            plan.setdefault(tenant, []).append(Answer(index, kind, generator.choice(self.new_tokens)))
        return plan


def request_body(prompt: Prompt, new_tokens: int) -> dict:
    """Return the body of a greedy request of exactly new_tokens tokens."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    return {**prompt.payload, "sampling_params": sampling}


async def _stream(client: httpx.AsyncClient, body: dict, answer: Answer, drop_after: int) -> None:
    """Read a stream; leave it after some events, by closing the connection or by aborting the request."""
    events = 0
    async with client.stream("POST", "/generate", json={**body, "stream": True}) as response:
        async for line in response.aiter_lines():
            if not line.startswith("data:") or line.endswith("[DONE]"):
                continue
            event = json.loads(line[5:])
            if "output_ids" in event:
                answer.output = event
            events += 1
            if events == drop_after:
                if answer.kind == "disconnect":
                    return
                await client.post("/abort_request", json={"rid": body["rid"]})


async def send(client: httpx.AsyncClient, prompt: Prompt, answer: Answer, rid: str) -> None:
    """Send one request and note what came back."""
    body = {**request_body(prompt, answer.new_tokens), "rid": rid}
    started = time.monotonic()
    try:
        if answer.kind == "plain":
            response = await client.post("/generate", json=body)
            if response.status_code == 200:
                answer.output = response.json()
            else:
                answer.error = f"HTTP {response.status_code}: {response.text[:200]}"
        else:
            await _stream(client, body, answer, drop_after=random.Random(rid).randrange(1, 12))
    except httpx.HTTPError as error:
        answer.error = f"{type(error).__name__}: {error}"
    answer.seconds = time.monotonic() - started


async def run(url: str, load: Load, seconds: float = float("inf")) -> list[Answer]:
    """Run a load; return its answers. After so many seconds no request is sent any more."""
    plan = load.plan()
    sent: list[Answer] = []
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)

    async def tenant(number: int, mine: list[Answer], client: httpx.AsyncClient) -> None:
        for n, answer in enumerate(mine):
            if time.monotonic() > end:
                return
            sent.append(answer)
            await send(client, load.prompts[answer.prompt], answer, f"tenant-{number}-{load.seed}-{n}")

    async with httpx.AsyncClient(base_url=url, timeout=HANG_SECONDS, limits=limits, trust_env=False) as client:
        await asyncio.gather(*(tenant(number, mine, client) for number, mine in plan.items()))
    return sent
