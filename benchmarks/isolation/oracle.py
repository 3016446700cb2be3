# SPDX-License-Identifier: Apache-2.0
"""What a request must be answered: what a server says that is asked nothing else.

With an exact window a prefix-cache hit reads other values than a miss (README, "How a token travels"), so that the
answer depends on where the requests began that computed the cached prefix. A history is these starts, in tokens:
(128, 384) is a request that found 384 tokens in the cache, of which one request had computed the first 128 and another
one, which had found those, the next 256. The load server tells how much was found, not by whom it was computed, so an
answer is right if it is that of any history that fits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import httpx

from benchmarks.isolation.load import HANG_SECONDS, Answer, request_body
from benchmarks.isolation.tenants import Prompt

PAGE = 128
# matrix products round by batch; keys that differ by 1e-7 can get other codes, which moves a logit of the tiny
# model by up to 0.2 and the distance of its first two by up to 0.03 (28 runs of one prompt); a wrong read moves
# them by several units
NEAR_TIE = 0.1

History = tuple[int, ...]


def flush(client: httpx.Client) -> None:
    """Empty the prefix cache of a server; SGLang refuses while the last step of a request is in flight.

    Raises:
        httpx.HTTPStatusError: the server did not become idle within 10 s.
    """
    for _ in range(100):
        if (response := client.post("/flush_cache")).is_success:
            return
        time.sleep(0.1)
    response.raise_for_status()


@dataclass(frozen=True)
class Alone:
    """The answer to a prompt that had a server to itself, and how far ahead each token was of the second.

    Attributes:
        ids: the tokens; margins: log probability of each token minus that of the next likely one.
    """

    ids: list[int]
    margins: list[float]

    def first_difference(self, answer: Answer) -> int | None:
        """Return the index of the first token that differs from what was answered, None if none does."""
        if not answer.output:
            return None
        ids = answer.output_ids
        # a stream that is aborted in the queue ends with its last token alone
        start = answer.output["meta_info"]["completion_tokens"] - len(ids)
        pairs = enumerate(zip(ids, self.ids[start:], strict=False))
        return next((start + n for n, (got, alone) in pairs if got != alone), None)


class Oracle:
    """Ask a server, one request at a time, what each prompt is answered after each history.

    Args:
        url: of the server; with `hits_differ` it has a prefix cache, which is emptied before each answer.
        prompts: token ids in all of them if `hits_differ`; new_tokens: of an answer, the most that is compared.
        hits_differ: whether a hit reads other values than a miss.
    """

    def __init__(self, url: str, prompts: list[Prompt], new_tokens: int, hits_differ: bool) -> None:
        self.prompts, self.new_tokens, self._hits_differ = prompts, new_tokens, hits_differ
        self._client = httpx.Client(base_url=url, timeout=HANG_SECONDS, trust_env=False)
        self._known: dict[tuple[int, History], Alone] = {}

    def alone(self, prompt: int, history: History = ()) -> Alone:
        """Return the answer to a prompt after a history, () for an empty prefix cache."""
        if (prompt, history) not in self._known:
            self._known[prompt, history] = self._ask(prompt, history)
        return self._known[prompt, history]

    def histories(self, answer: Answer) -> Iterator[History]:
        """Yield the histories that an answer may have, the likelier ones first."""
        if not (self._hits_differ and answer.output_ids):
            yield ()
            return
        meta = answer.output["meta_info"]
        found, retractions = meta.get("cached_tokens"), meta.get("num_retractions", 0)
        if found is None or retractions:
            # what was aborted in the queue does not tell; a retracted request adds up what each of its rows found,
            # and the later ones may have found less
            longest = len(self.prompts[answer.prompt].payload["input_ids"]) - 1
            most = longest if found is None else min(found, longest)
            founds = range(most // PAGE * PAGE, -1, -PAGE)
        else:
            founds = range(found, found + 1)
        for end in founds:
            starts = range(PAGE, end, PAGE)
            for count in range(len(starts) + 1):
                yield from ((*earlier, end) if end else () for earlier in combinations(starts, count))

    def compare(self, answer: Answer) -> tuple[int | None, float]:
        """Return (first token that differs from the history that fits best, None if none does, its margin)."""
        best: tuple[int, float] | None = None
        for history in self.histories(answer):
            alone = self.alone(answer.prompt, history)
            first = alone.first_difference(answer)
            if first is None:
                return None, 0.0
            # a near tie explains a difference, whatever the other histories say
            seen = (first, alone.margins[first])
            if best is None or (seen[1] < NEAR_TIE, seen[0]) > (best[1] < NEAR_TIE, best[0]):
                best = seen
        assert best is not None, "an answer has at least one history"
        return best

    def is_wrong(self, answer: Answer) -> bool:
        """Whether an answer failed, or differs where the first choice was clear."""
        first, margin = self.compare(answer)
        return bool(answer.error) or (first is not None and margin >= NEAR_TIE)

    def _ask(self, prompt: int, history: History) -> Alone:
        payload = self.prompts[prompt].payload
        if self._hits_differ:
            flush(self._client)
            for start in history:
                self._generate(Prompt(-1, {"input_ids": payload["input_ids"][:start]}, ""), 1)
        output = self._generate(self.prompts[prompt], self.new_tokens, return_logprob=True, top_logprobs_num=2)
        meta = output["meta_info"]
        wanted = history[-1] if history else 0
        assert meta["cached_tokens"] == wanted, f"expected {wanted} cached tokens, got {meta['cached_tokens']}"
        return Alone(output["output_ids"], [best[0] - second[0] for best, second in meta["output_top_logprobs"]])

    def _generate(self, prompt: Prompt, new_tokens: int, **more: object) -> dict:
        response = self._client.post("/generate", json={**request_body(prompt, new_tokens), **more})
        response.raise_for_status()
        return response.json()
