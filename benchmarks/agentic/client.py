# SPDX-License-Identifier: Apache-2.0
"""One request over HTTP: token ids in, a stream of token ids out, with its times."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Reply:
    """Hold a streamed answer.

    Attributes:
        output_ids: the generated tokens.
        meta: meta_info of the last event: prompt_tokens, cached_tokens, num_retractions.
        sent, first, last: time.perf_counter() when it was sent, and of the first and last token.
    """

    sent: float
    first: float = 0.0
    last: float = 0.0
    output_ids: list[int] = field(default_factory=list)
    meta: dict = field(default_factory=dict)

    @property
    def ttft(self) -> float:
        """Seconds to the first token."""
        return self.first - self.sent

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for one token."""
        decoded = len(self.output_ids) - 1
        return (self.last - self.first) / decoded if decoded > 0 else None


class RequestFailed(RuntimeError):
    """The server refused or aborted a request, or its stream ended early."""


def connect(url: str) -> aiohttp.ClientSession:
    """Return a client without limits on connections and time; the replay has its own limit."""
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    return aiohttp.ClientSession(url, connector=connector, timeout=timeout, read_bufsize=2**20)


async def generate(client: aiohttp.ClientSession, prompt: list[int], output_tokens: int) -> Reply:
    """Send a prompt and read its stream to the end.

    The server runs with --incremental-streaming-output: each event holds the tokens since the one before.

    Raises:
        RequestFailed: see there.
    """
    sampling = {"temperature": 0, "max_new_tokens": output_tokens, "ignore_eos": True}
    body = json.dumps({"input_ids": prompt, "sampling_params": sampling, "stream": True})
    reply = Reply(time.perf_counter())
    headers = {"Content-Type": "application/json"}
    async with client.post("/generate", data=body, headers=headers) as response:
        if response.status != 200:
            raise RequestFailed(f"HTTP {response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RequestFailed(str(event["error"])[:300])
            if event["output_ids"]:
                reply.last = time.perf_counter()
                reply.first = reply.first or reply.last
                reply.output_ids += event["output_ids"]
            reply.meta = event["meta_info"]
    if len(reply.output_ids) != output_tokens:
        reason = reply.meta.get("finish_reason")
        raise RequestFailed(f"expected {output_tokens} tokens, got {len(reply.output_ids)} ({reason})")
    return reply
