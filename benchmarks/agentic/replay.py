# SPDX-License-Identifier: Apache-2.0
"""Run sessions in a closed loop: each client waits for its answer, thinks, and sends its next turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp

from benchmarks.agentic import client as http
from benchmarks.agentic import counters
from benchmarks.agentic.theory import theoretical_hit
from benchmarks.agentic.workload import History, Turn, Workload

# times that the server is asked to empty its cache, a tenth of a second apart
FLUSH_TRIES = 300


@dataclass
class Run:
    """Hold what happened at one number of sessions.

    Attributes:
        rows: one dict per finished turn.
        seconds: from the first request to the end of the last finished turn, or to the limit.
        errors: messages of requests that failed; their sessions ended there.
        cut_turns: turns that had not ended, or not begun, when the time limit came.
        server: differences of the server's counters and its pool usage.
    """

    rows: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    cut_turns: int = 0
    server: dict = field(default_factory=dict)


async def flush(client: aiohttp.ClientSession) -> None:
    """Empty the prefix cache; SGLang refuses while a request is in flight.

    Raises:
        RuntimeError: the server did not become idle.
    """
    for _ in range(FLUSH_TRIES):
        async with client.post("/flush_cache") as response:
            if response.status == 200:
                return
        await asyncio.sleep(0.1)
    raise RuntimeError(f"expected the server to become idle, got {FLUSH_TRIES} refusals of /flush_cache")


@dataclass(frozen=True)
class Pace:
    """Describe how sessions run.

    Attributes:
        clients: sessions at a time; client n runs sessions n, n + clients, ... one after the other.
        stagger: seconds between the first starts of two clients.
        limit: seconds from the start; turns that have not ended by then are dropped and counted.
    """

    clients: int
    stagger: float = 0.0
    limit: float = 900.0


async def _session(
    client: aiohttp.ClientSession,
    number: int,
    turns: list[Turn],
    shared: list[int],
    page_size: int,
    run: Run,
    start: float,
    advance: Callable[[], None],
) -> None:
    history = History(shared)
    for index, turn in enumerate(turns):
        await asyncio.sleep(turn.think_seconds)
        prompt = turn.prompt(history.tokens)
        theory = theoretical_hit(prompt, history.computed, page_size)
        try:
            reply = await http.generate(client, prompt, turn.output_tokens)
        except (http.RequestFailed, aiohttp.ClientError) as error:
            run.errors.append(f"session {number} turn {index}: {error}")
            return
        history.add(prompt, reply.output_ids)
        run.rows.append(
            {
                "session": number,
                "turn": index,
                "sent": round(reply.sent - start, 4),
                "prompt_tokens": reply.meta["prompt_tokens"],
                "output_tokens": len(reply.output_ids),
                "cached_tokens": reply.meta["cached_tokens"],
                "theory_tokens": theory,
                "ttft": reply.ttft,
                "tpot": reply.tpot,
                "seconds": reply.last - reply.sent,
                "retractions": reply.meta.get("num_retractions", 0),
            }
        )
        advance()


async def replay(
    url: str, workload: Workload, page_size: int, pace: Pace, advance: Callable[[], None] = lambda: None
) -> Run:
    """Run all sessions of a workload on an emptied cache.

    The shared prompt is computed first, so that also the first turn of every session has a known theoretical
    hit.

    Args:
        url: address of the server.
        page_size: tokens in a page of the server's pool.
        advance: called after every finished turn.
    """
    run = Run()
    async with http.connect(url) as client:
        await flush(client)
        if workload.shared:
            await http.generate(client, workload.shared, 1)
        before = await counters.scrape(client)
        start = time.perf_counter()

        async def run_client(number: int) -> None:
            await asyncio.sleep(number * pace.stagger)
            for n in range(number, len(workload.sessions), pace.clients):
                turns = workload.sessions[n]
                await _session(client, n, turns, workload.shared, page_size, run, start, advance)

        async with counters.UsageSampler(client).running() as sampler:
            tasks = [asyncio.create_task(run_client(number)) for number in range(pace.clients)]
            try:
                done, late = await asyncio.wait(tasks, timeout=pace.limit)
                run.seconds = time.perf_counter() - start
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            # what is no error of a request is an error of this program
            task.result()
        run.cut_turns = sum(map(len, workload.sessions)) - len(run.rows) if late else 0
        run.server = counters.difference(before, await counters.scrape(client)) | sampler.summary()
    return run
