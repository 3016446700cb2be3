# SPDX-License-Identifier: Apache-2.0
"""What a server must survive, and how it must end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from dataclasses import dataclass

import httpx

from benchmarks.isolation.load import HANG_SECONDS, Answer, request_body, send
from benchmarks.isolation.oracle import Oracle
from benchmarks.isolation.tenants import Prompt

# seconds that a server may take to end after SIGTERM: SGLang answers what is in flight first, and 24 requests of 160
# tokens took it 71 s on two cores with four other jobs
TERM_SECONDS = 300


@dataclass
class Fault:
    """The outcome of one fault: whether it was as it should be, and what was seen."""

    name: str
    passed: bool
    seen: str


def _client(url: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=url, timeout=HANG_SECONDS, limits=httpx.Limits(max_connections=None), trust_env=False
    )


async def oversized_prompt(url: str, prompts: list[Prompt], oracle: Oracle, pool_tokens: int) -> Fault:
    """A prompt longer than the pool is refused; the answers that run beside it are those alone."""
    prompt = prompts[0].payload
    if "input_ids" in prompt:
        ids = prompt["input_ids"]
        longer = {"input_ids": (ids * (pool_tokens // len(ids) + 2))[: pool_tokens + 500]}
    else:
        longer = {"text": prompt["text"] * (pool_tokens // 40)}
    async with _client(url) as client:
        mine = [Answer(n, "plain", oracle.new_tokens) for n in range(4)]
        others = [send(client, prompts[a.prompt], a, f"beside-{a.prompt}") for a in mine]
        body = request_body(Prompt(-1, longer, ""), 4)
        refused, *_ = await asyncio.gather(client.post("/generate", json=body), *others)
    wrong = [a.prompt for a in mine if oracle.is_wrong(a)]
    seen = f"HTTP {refused.status_code}: {refused.text[:160]}; {len(wrong)} of 4 other answers differ"
    return Fault("oversized prompt", refused.status_code == 400 and not wrong, seen)


async def more_requests_than_rows(url: str, prompts: list[Prompt], oracle: Oracle, rows: int) -> Fault:
    """Eight times as many requests at once as rows are all answered, as alone."""
    mine = [Answer(n % len(prompts), "plain", 8) for n in range(8 * rows)]
    started = time.monotonic()
    async with _client(url) as client:
        await asyncio.gather(*(send(client, prompts[a.prompt], a, f"crowd-{n}") for n, a in enumerate(mine)))
    wrong = [a for a in mine if oracle.is_wrong(a)]
    seen = f"{len(mine)} at once on {rows} rows in {time.monotonic() - started:.0f} s, {len(wrong)} differ"
    return Fault("more requests than rows", not wrong, seen)


async def disconnects_in_prefill(url: str, prompts: list[Prompt], oracle: Oracle, rows: int) -> Fault:
    """Clients that leave before their first token give their rows back at once."""
    async with _client(url) as client:

        async def leave(n: int) -> None:
            body = {**request_body(prompts[n % len(prompts)], 500), "stream": True, "rid": f"gone-{n}"}
            try:
                async with client.stream("POST", "/generate", json=body, timeout=0.05 * (1 + n % 3)) as response:
                    await response.aread()
            except httpx.TimeoutException:
                pass

        await asyncio.gather(*(leave(n) for n in range(4 * rows)))
        started = time.monotonic()
        answer = Answer(0, "plain", oracle.new_tokens)
        await send(client, prompts[0], answer, "after-disconnects")
    seconds = time.monotonic() - started
    right = not oracle.is_wrong(answer)
    seen = f"{4 * rows} left, the next answer came after {seconds:.1f} s and is {'right' if right else 'wrong'}"
    return Fault("disconnects in prefill", right, seen)


async def terminate_under_load(url: str, prompts: list[Prompt], oracle: Oracle, server) -> Fault:
    """SIGTERM with requests in flight: the server ends with its processes, and no client hangs."""
    mine = [Answer(n % len(prompts), "plain", oracle.new_tokens) for n in range(24)]
    async with _client(url) as client:
        tasks = [asyncio.ensure_future(send(client, prompts[a.prompt], a, f"late-{n}")) for n, a in enumerate(mine)]
        await asyncio.sleep(2)
        in_flight = sum(not task.done() for task in tasks)
        started = time.monotonic()
        os.kill(server.process.pid, signal.SIGTERM)
        await asyncio.wait(tasks, timeout=TERM_SECONDS)
    hung = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    try:
        code = await asyncio.to_thread(server.process.wait, TERM_SECONDS)
    except subprocess.TimeoutExpired:
        code = None
    seconds = time.monotonic() - started
    left = await asyncio.to_thread(_processes_of, server.process.pid)
    full = [a for a in mine if not a.error and a.output and len(a.output_ids) == a.new_tokens]
    wrong = [a for a in full if oracle.is_wrong(a)]
    errors = sorted({a.error for a in mine if a.error})
    seen = (
        f"with {in_flight} requests in flight ended with code {code} after {seconds:.1f} s, {len(full)} of {len(mine)} "
        f"requests were answered, {len(wrong)} of them wrongly, {hung} hung, {left} processes left; errors: {errors}"
    )
    return Fault("SIGTERM under load", in_flight and code is not None and not (hung or wrong or left), seen)


def _processes_of(group: int) -> int:
    """Return how many processes of a process group still run, waiting a little for them to end."""
    for _ in range(50):
        done = subprocess.run(["ps", "-o", "stat=", "-g", str(group)], capture_output=True, text=True)
        running = [line for line in done.stdout.split() if not line.startswith("Z")]
        if not running:
            return 0
        time.sleep(0.2)
    return len(running)


def out_of_memory_at_start(command: list[str]) -> Fault:
    """A ring that does not fit ends the start with one sentence that names the flag to change."""
    command = [*command, "--max-running-requests", "500000"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS)
    lines = (done.stdout + done.stderr).splitlines()
    said = [line.strip() for line in lines if "lower --max-running-requests" in line]
    seconds = time.monotonic() - started
    seen = f"exit code {done.returncode} after {seconds:.0f} s: {said[-1] if said else lines[-3:]}"
    return Fault("out of memory at start", done.returncode != 0 and bool(said), seen)
