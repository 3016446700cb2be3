# SPDX-License-Identifier: Apache-2.0
"""What a sequence of tokens feeds to a layer, and what every read of it must return.

Queries, keys and values of a token are a function of the whole prefix, as in a model: equal prefixes give
equal rows, and two different prefixes give rows that have nothing in common. So a wrong row, wherever it
comes from, changes the output. Nothing here knows a page id, a request row or a chunk.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from itertools import accumulate

import torch
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig

PAGE = 128
QO_HEADS, KV_HEADS, HEAD_DIM = 2, 2, 64
SM_SCALE = HEAD_DIM**-0.5
_MASK = (1 << 64) - 1
_CODES = 1 << 11


def _table(seed: int) -> torch.Tensor:
    # multiples of 1/64: every order of summation rotates them to the same float32
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_CODES, KV_HEADS, HEAD_DIM, generator=generator).mul(64).round().div(64)


_TABLES = {name: (_table(2 * n), _table(2 * n + 1)) for n, name in enumerate("qkv")}


def extend_hash(state: int, token: int) -> int:
    """Return the hash of a prefix and one more token."""
    state = (state ^ (token + 0x9E3779B97F4A7C15)) * 0xD6E8FEB86659FD93 & _MASK
    return state ^ (state >> 32)


def extend_hashes(state: int, tokens: Iterable[int]) -> list[int]:
    """Return the hashes of a prefix and the first of these tokens, and the second, up to all of them."""
    return list(accumulate(tokens, extend_hash, initial=state))[1:]


def rows_of(hashes: list[int], name: str) -> torch.Tensor:
    """Return the rows of q, k or v of the tokens that end the prefixes: float32 [T, H, D], not rotated."""
    low, high = _TABLES[name]
    index = torch.tensor([[h % _CODES, (h >> 20) % _CODES] for h in hashes]).view(-1, 2)
    return low[index[:, 0]] + high[index[:, 1]]


class Pages:
    """Remember records by the prefix that ends with the page; the only thing that two histories share."""

    def __init__(self, config: KVarNConfig, size: int = 1000) -> None:
        self.config, self._size = config, size
        self._known: OrderedDict[int, tuple[torch.Tensor, ...]] = OrderedDict()

    def get(self, key: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return (record uint8 [Hk, bytes], keys, values float32 [Hk, G, D]) of rotated rows [G, Hk, D]."""
        if key not in self._known:
            record = reference.encode_tile(k.transpose(0, 1), v.transpose(0, 1), self.config)
            self._known[key] = (record, *reference.decode_tile(record, self.config, HEAD_DIM))
            if len(self._known) > self._size:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        return self._known[key]

    def find(self, key: int) -> torch.Tensor | None:
        """Return the record of the page that ends a prefix if it was computed, and not too long ago."""
        return self._known[key][0] if key in self._known else None


class History:
    """Hold the tokens of one request, their rows and the records of their full pages; it only grows.

    Attributes:
        tokens: every token so far; hashes: of the prefix that ends with each.
        q: [T, Hq, D] not rotated; rotated_k, rotated_v: [T, Hk, D]; float32.
    """

    def __init__(self, tokens: list[int], pages: Pages) -> None:
        self._pages = pages
        self.tokens: list[int] = []
        self.hashes: list[int] = []
        self.q, self.k, self.v, self.rotated_k, self.rotated_v = (
            torch.empty(0, KV_HEADS, HEAD_DIM) for _ in range(5)
        )
        self._tiles: list[tuple[torch.Tensor, ...]] = []
        self.append(tokens)

    def append(self, tokens: list[int]) -> None:
        """Add tokens at the end."""
        fresh = extend_hashes(self.hashes[-1] if self.hashes else 0, tokens)
        self.tokens += tokens
        self.hashes += fresh
        rows = {name: rows_of(fresh, name) for name in "qkv"}
        self.q, self.k, self.v = (torch.cat([getattr(self, n), rows[n]]) for n in "qkv")
        self.rotated_k = torch.cat([self.rotated_k, reference.rotate(rows["k"])])
        self.rotated_v = torch.cat([self.rotated_v, reference.rotate(rows["v"])])
        for page in range(len(self._tiles), len(self.tokens) // PAGE):
            span = slice(page * PAGE, (page + 1) * PAGE)
            key = self.hashes[span.stop - 1]
            self._tiles.append(self._pages.get(key, self.rotated_k[span], self.rotated_v[span]))

    def next_token(self, salt: int) -> int:
        """Return the token that the request generates next; equal prefixes and salts continue alike."""
        return 1000 + extend_hash(self.hashes[-1], salt) % 50_000

    def records(self, count: int) -> torch.Tensor:
        """Return the records of the first full pages: uint8 [count, Hk, bytes]."""
        return torch.stack([tile[0] for tile in self._tiles[:count]])

    def output(self, start: int, end: int, exact_start: int, sliding_window: int = 0) -> torch.Tensor:
        """Return what attention of positions start .. end - 1 gives by the position rule: float64 [n, Hq, D].

        The rule is written down here once more, from the design: page(j) >= page(i) - window and
        j >= exact_start is read exactly, everything else from records; with a sliding window, of its tokens only.
        """
        config = self._pages.config
        full = len(self._tiles) * PAGE
        exact_k, exact_v = (x[:end].transpose(0, 1).double() for x in (self.rotated_k, self.rotated_v))
        record_k, record_v = exact_k.clone(), exact_v.clone()
        for n in range(min(full, end) // PAGE):
            record_k[:, n * PAGE : (n + 1) * PAGE] = self._tiles[n][1]
            record_v[:, n * PAGE : (n + 1) * PAGE] = self._tiles[n][2]
        i, j = torch.arange(start, end)[:, None], torch.arange(end)[None, :]
        exact = (j // PAGE >= i // PAGE - config.window_pages) & (j >= exact_start)
        q = reference.rotate(self.q[start:end]).double().transpose(0, 1) * SM_SCALE
        scores = torch.where(exact, q @ exact_k.transpose(1, 2), q @ record_k.transpose(1, 2))
        hidden = (j > i) | (j < i + 1 - (sliding_window or end))
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out = (weights * exact) @ exact_v + (weights * ~exact) @ record_v
        return reference.rotate(out.float()).transpose(0, 1).double()
