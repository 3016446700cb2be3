# SPDX-License-Identifier: Apache-2.0
"""The server's own numbers: /metrics (Prometheus text) and /server_info."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections import defaultdict
from dataclasses import dataclass, field

import aiohttp

_LINE = re.compile(r"^(sglang:\w+)(?:\{[^}]*\})? (\S+)")
# name in the results -> counter of SGLang; its difference over a point is reported
COUNTERS = {
    "server_prompt_tokens": "sglang:prompt_tokens_total",
    "server_generated_tokens": "sglang:generation_tokens_total",
    "server_cached_tokens": "sglang:cached_tokens_total",
    "server_requests": "sglang:num_requests_total",
    "evicted_tokens": "sglang:evicted_tokens_total",
    "retracted_requests": "sglang:num_retracted_requests_total",
}
_USAGE = "sglang:token_usage"
SAMPLE_SECONDS = 1.0


def parse(text: str) -> dict[str, float]:
    """Return the sum over all labels of every SGLang metric of a /metrics page."""
    values: dict[str, float] = defaultdict(float)
    for line in text.splitlines():
        if match := _LINE.match(line):
            values[match[1]] += float(match[2])
    return dict(values)


def difference(before: dict[str, float], after: dict[str, float]) -> dict[str, int]:
    """Return what the counters grew by; SGLang shows a counter from its first increment on."""
    return {name: int(after.get(key, 0) - before.get(key, 0)) for name, key in COUNTERS.items()}


async def scrape(client: aiohttp.ClientSession) -> dict[str, float]:
    """Return the parsed /metrics of the server."""
    async with client.get("/metrics") as response:
        return parse(await response.text())


@dataclass
class UsageSampler:
    """Note the share of the pool that running requests use, once a second."""

    client: aiohttp.ClientSession
    samples: list[float] = field(default_factory=list)

    @contextlib.asynccontextmanager
    async def running(self):
        """Sample while the block runs."""
        task = asyncio.create_task(self._loop())
        try:
            yield self
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _loop(self) -> None:
        while True:
            # a scrape that fails is a sample less; the requests notice a dead server
            with contextlib.suppress(aiohttp.ClientError):
                self.samples.append((await scrape(self.client)).get(_USAGE, 0.0))
            await asyncio.sleep(SAMPLE_SECONDS)

    def summary(self) -> dict[str, float | None]:
        """Return mean and peak, shares from 0 to 1."""
        if not self.samples:
            return {"pool_usage_mean": None, "pool_usage_peak": None}
        mean = sum(self.samples) / len(self.samples)
        return {"pool_usage_mean": round(mean, 4), "pool_usage_peak": round(max(self.samples), 4)}


async def server_facts(client: aiohttp.ClientSession) -> dict:
    """Return the sizes that /server_info reports."""
    async with client.get("/server_info") as response:
        info = await response.json()
    state = info["internal_states"][0]
    return {
        "sglang": info["version"],
        "attention_backend": state.get("attention_backend", info.get("attention_backend")),
        "page_size": state.get("page_size") or info["page_size"] or 1,
        "pool_tokens": info["max_total_num_tokens"],
        "pool_gib": state["memory_usage"]["kvcache"],
        "max_running_requests": state["effective_max_running_requests_per_dp"],
        "chunked_prefill_size": state.get("chunked_prefill_size"),
        "mem_fraction_static": state.get("mem_fraction_static"),
    }
