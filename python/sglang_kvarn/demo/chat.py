# SPDX-License-Identifier: Apache-2.0
"""Two turns of a chat over the OpenAI API; the second turn's prompt begins with the whole first turn."""

from __future__ import annotations

from dataclasses import dataclass
from time import monotonic
from typing import Any

from sglang_kvarn.demo.server import Server

# about 260 tokens: more than one page of 128, so that the second turn finds full pages in the prefix cache
SYSTEM = (
    "You are a helpful assistant. Answer in one or two short sentences, using these notes about the island "
    "of Arran Bay. The island lies twelve kilometres off the coast and has about nine hundred inhabitants, "
    "most of whom live in the village of Northport on the eastern shore. A ferry sails from the mainland "
    "every morning at eight and returns at six in the evening; in winter it sails only on Mondays and "
    "Thursdays. The lighthouse on the western cliff was built in 1874 by the engineer Margaret Hale and is "
    "painted red and white, so that it can be seen against the grey rock. Since 1998 it has worked without "
    "a keeper, and the keeper's house is now a small museum of shipwrecks, open from April to October. In "
    "the middle of the island there is a lake called Mirror Lake, where grey geese rest in spring and "
    "autumn. The islanders keep sheep, catch crabs and lobsters, and bake a dark bread with seaweed that "
    "visitors like to take home. There is one school with forty pupils, a doctor who comes twice a week, "
    "and a library in the old chapel."
)
QUESTIONS = (
    "Who built the lighthouse, and in which year?",
    "What can visitors see in the keeper's house today?",
)


@dataclass(frozen=True)
class Turn:
    """One answered question.

    Attributes:
        answer: the text that came back.
        prompt_tokens, cached_tokens, completion_tokens: as the server counted them; cached_tokens of
            prompt_tokens were read from the prefix cache.
        first_token_seconds, seconds: from the request to its first and to its last token.
    """

    answer: str
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    first_token_seconds: float
    seconds: float


def _ask(client: Any, messages: list[dict[str, str]], max_tokens: int) -> Turn:
    """Send messages, print the answer while it streams, and return it with the server's counts."""
    started = monotonic()
    first_token = 0.0
    answer, usage = "", None
    stream = client.chat.completions.create(
        model="default",
        messages=messages,
        max_tokens=max_tokens,
        temperature=0.0,
        stream=True,
        stream_options={"include_usage": True},
    )
    for chunk in stream:
        usage = chunk.usage or usage
        text = chunk.choices[0].delta.content if chunk.choices else None
        if text:
            first_token = first_token or monotonic() - started
            answer += text
            print(text, end="", flush=True)
    print(flush=True)
    if usage is None:
        raise RuntimeError("expected the server to report its token counts in the stream, it sent none")
    cached = usage.prompt_tokens_details.cached_tokens if usage.prompt_tokens_details else 0
    return Turn(
        answer=answer,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=cached or 0,
        completion_tokens=usage.completion_tokens,
        first_token_seconds=first_token,
        seconds=monotonic() - started,
    )


def hold(server: Server, max_tokens: int) -> list[Turn]:
    """Ask `QUESTIONS` one after the other in one conversation, greedily, and print what is said.

    Args:
        server: a healthy server.
        max_tokens: most tokens of an answer.

    Raises:
        RuntimeError: the server did not answer; with the end of its log.
    """
    import httpx
    from openai import OpenAI, OpenAIError

    # without the proxies of the environment, which know nothing of this machine's loopback interface
    http_client = httpx.Client(trust_env=False, timeout=600)
    client = OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http_client, max_retries=0)
    messages = [{"role": "system", "content": SYSTEM}]
    turns = []
    for question in QUESTIONS:
        print(f"\n> {question}", flush=True)
        messages.append({"role": "user", "content": question})
        try:
            turns.append(_ask(client, messages, max_tokens))
        except (OpenAIError, httpx.HTTPError) as error:
            raise RuntimeError(f"the server did not answer ({error}): {server.where()}") from error
        messages.append({"role": "assistant", "content": turns[-1].answer})
    return turns
