# SPDX-License-Identifier: Apache-2.0
"""How far memory goes: bytes per token and per request, requests at a time, tokens of the pool. Knows no server."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kvarn_kernels.batch import Limits
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import Gpu, gpu_of
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn.refused import Refused
from sglang_kvarn.settings import PAGE_SIZE

# requests at a time that stock SGLang has rows for at most, and the share of the KV memory that workspaces may take
MAX_ROWS, WORKSPACE_SHARE = 4096, 0.02
# Of a hybrid model. A session that waits for its next turn keeps, in the order in which SGLang evicts states, the one
# that its last turn started from and those at the end of the prompt and of the answer.
STATES_PER_SESSION = 3
# of the memory for states and tokens, the most that SGLang is told to take for states
MOST_STATES = 0.9
# tokens of the sessions for which memory is split between states and tokens
TYPICAL_SESSION = 32_768
# lengths for which a server says how many sessions stay
SESSIONS = (8192, 32_768, 102_400)
# pages of the smallest pool: one for the prompt, one for the answer, one that SGLang keeps free
MIN_PAGES = 3
MIB, GIB = 1 << 20, 1 << 30


@dataclass(frozen=True)
class ModelShape:
    """Describe the layers of one rank that have a KV cache.

    Example: Qwen3-8B on one GPU has 36 layers of 32 query heads and 8 KV heads of 128 channels in bfloat16;
    with ``kvarn`` a token costs 36 * 8 * 112 = 32,256 bytes (16 bit: 147,456), a ring 10 pages of 128 tokens.

    Attributes:
        sliding_windows: that some of the layers have, in tokens.
    """

    layers: int
    attention: AttentionShape
    sliding_windows: tuple[int, ...] = ()

    def token_bytes(self, config: KVarNConfig) -> int:
        """Return the record bytes per token, all layers."""
        return self.layers * self.attention.num_kv_heads * config.bytes_per_token(self.attention.head_dim)

    def full_token_bytes(self, itemsize: int) -> int:
        """Return what a token costs unquantised, keys and values of `itemsize` bytes."""
        return self.layers * self.attention.full_token_bytes * itemsize // self.attention.dtype.itemsize


@dataclass(frozen=True)
class States:
    """Describe what the layers of a hybrid model that have no keys and values keep of a sequence.

    Attributes:
        number: states that a server has room for; nbytes: of one, all layers of a rank.
        per_request: that a running request takes.
        per_session: that a session takes which waits in the prefix cache; 0 without a prefix cache.
        format: what the bytes of one mean (`compat.state_format`); empty where none will be kept.
    """

    number: int
    nbytes: int
    per_request: int
    per_session: int
    format: str = ""

    @property
    def requests(self) -> int:
        """Requests at a time that have all the states they take."""
        return self.number // self.per_request

    def sessions(self, pool_tokens: int, tokens: int) -> tuple[int, str]:
        """Return how many sessions of so many tokens stay in the prefix cache, and what runs out: states or tokens."""
        by_tokens = max(pool_tokens - PAGE_SIZE, 0) // whole_pages(tokens)
        by_states = self.number // self.per_session
        return (by_states, "states") if by_states < by_tokens else (by_tokens, "tokens")


@dataclass(frozen=True)
class SlidingShare:
    """Share memory between records and sliding windows, whose tokens stay in 16 bits.

    Attributes:
        token: bytes of a token in records, all layers, and in a draft model's cache; plain_token: what it takes in 16
            bits.
        sliding_token: bytes of a token in all layers with a sliding window.
        ratio: tokens of sliding windows for each other token; is_chosen: by the user, who takes it as it is. Else the
            sliding windows get the bytes that they have with this ratio beside a 16-bit cache.
        least: tokens with which a request can run; fewer would let it wait without end.
        most: that requests can use, None where the prefix cache keeps sliding windows too.

    Example: 12 layers of each kind with 8 KV heads of 64 channels (gpt-oss-20b), ``kvarn``, SGLang's ratio of 0.8 and
    40 GiB: 970,880 tokens and 776,704 of sliding windows in 16 bits, here 4,212,736 and as many of sliding windows.
    """

    token: int
    plain_token: int
    sliding_token: int
    ratio: float
    is_chosen: bool
    least: int
    most: int | None = None

    def of_memory(self, available: int) -> tuple[int, int]:
        """Return tokens, and tokens of sliding windows, that take so many bytes.

        Raises:
            Refused: the bytes do not suffice for one request.
        """
        of_token = self.token if self.is_chosen else self.plain_token
        sliding = self._bounded(self.ratio * available / (of_token + self.ratio * self.sliding_token))
        left = available - sliding * self.sliding_token
        if left < self.token * PAGE_SIZE:
            raise Refused(
                f"a kvarn cache of this model needs {sliding * self.sliding_token / MIB:,.1f} MiB for sliding windows "
                f"and more for the rest, but there are {max(available, 0) / MIB:,.1f} MiB: raise "
                "--mem-fraction-static, or lower --chunked-prefill-size where prompts are computed"
            )
        return left // self.token // PAGE_SIZE * PAGE_SIZE, sliding

    def of_tokens(self, tokens: int, most: int | None) -> int:
        """Return the tokens of sliding windows beside so many others; most: that there is memory for."""
        sliding = self._bounded(self.ratio * tokens)
        return sliding if most is None else min(sliding, most)

    def _bounded(self, sliding: float) -> int:
        found = int(sliding) // PAGE_SIZE * PAGE_SIZE
        if not self.is_chosen:
            return whole_pages(max(found if self.most is None else min(found, self.most), self.least))
        if found < self.least:
            raise Refused(
                f"--swa-full-tokens-ratio {self.ratio} leaves {found:,} tokens for sliding windows, and a request may "
                f"need {self.least:,}: drop --swa-full-tokens-ratio, or raise it"
            )
        return found


def sliding_tokens_of_request(window: int, eviction_interval: int, draft_tokens: int = 1) -> int:
    """Return the tokens of sliding windows that a running request keeps at most, its next pages included.

    With drafts SGLang has slots for the drafts of two steps ahead, as one may still run.
    """
    ahead = 2 * draft_tokens if draft_tokens > 1 else 0
    return window + eviction_interval + 2 * PAGE_SIZE + ahead


def state_ratio(state_bytes: int, per_session: int, token_bytes: int) -> float:
    """Return bytes of states for each byte of tokens with which both run out at the same number of typical sessions."""
    return per_session * state_bytes / (TYPICAL_SESSION * token_bytes)


def state_ratio_with_drafts(share: float, available: float, drafts_per_state: float, running: float) -> float:
    """Return the ratio at which SGLang keeps as many bytes of states for each byte of tokens as `share` says.

    In a verify step a running request has a state after each of its drafts besides. SGLang takes these out of the bytes
    of states, as if all states were those of running requests, and returns to the tokens what it does not need.

    Args:
        share: as `state_ratio` returns it; available: bytes for states and tokens.
        drafts_per_state: drafts of a request, for each state that it takes.
        running: bytes of the states after the drafts of all requests that may run at a time.

    Example: with 4 drafts, and 5 states of a request, SGLang takes 1.8 states for one that it keeps, so that 1.0
    becomes 1.8. Where requests take a tenth of the memory for their drafts at most, (1 - 0.1) / 2 of the memory is for
    states that are kept, SGLang takes 1.8 times as much, and 1.0 becomes 4.26.
    """
    taken = 1 + drafts_per_state
    # either all states are of running requests, or no more requests may run
    kept = max(available / (taken + 1 / share), (available - running) / (1 + 1 / share))
    states = min(kept * taken, MOST_STATES * available)
    return states / (available - states)


def describe_sessions(states: States, pool_tokens: int) -> str:
    """Return in words how many sessions stay cached, e.g. ", 3 for a session ...: 85 of 32,768 tokens (...)"."""
    if not states.per_session:
        return ""
    found = {tokens: states.sessions(pool_tokens, tokens) for tokens in SESSIONS}
    kept = ", ".join(f"{n:,} of {tokens:,} tokens ({what} run out first)" for tokens, (n, what) in found.items())
    return f" and {states.per_session} for a session that waits in the prefix cache, which keeps {kept}"


def whole_pages(tokens: int) -> int:
    """Return the tokens of the pages that so many tokens take."""
    return -(-tokens // PAGE_SIZE) * PAGE_SIZE


def rank_shape(
    model_config: Any,
    dtype: torch.dtype,
    tp_size: int,
    layers: int,
    num_qo_heads: int | None = None,
    sliding_windows: tuple[int, ...] = (),
) -> ModelShape:
    """Return the shape of a rank from SGLang's ModelConfig.

    Args:
        layers: of this rank that have a KV cache; num_qo_heads: of the model in these layers, where others differ.
        sliding_windows: that some of these layers have, in tokens.
    """
    attention = AttentionShape(
        num_qo_heads=(num_qo_heads or model_config.num_attention_heads) // tp_size,
        num_kv_heads=model_config.get_num_kv_heads(tp_size),
        head_dim=model_config.head_dim,
        dtype=dtype,
    )
    return ModelShape(layers, attention, sliding_windows)


@dataclass(frozen=True)
class Bounds:
    """Hold what the arguments of a server bound.

    Attributes:
        requests: ``--max-running-requests`` of a rank, None where it is left open.
        graph_batch: the largest batch of a decode CUDA graph, 0 without graphs.
        context_len: tokens of the longest request; chunk_len: its most new tokens in one extend step.
        states: requests at a time that the states of a hybrid model allow, None without states.
        draft_tokens: new tokens of a request in a verify step, 1 without speculative decoding.
        padding: a decode step may be padded to a multiple of so many requests, as ranks that share heads are with DP
            attention.
        backends: attention backends, each with workspaces of its own; several where the number of drafts changes.
    """

    requests: int | None
    graph_batch: int
    context_len: int
    chunk_len: int
    states: int | None = None
    draft_tokens: int = 1
    padding: int = 1
    backends: int = 1

    def steps(self, rows: int, request_pages: int) -> Limits:
        """Return what bounds the steps of `rows` requests at a time.

        A decode batch is every row and a padding row, or what the step or the largest CUDA graph is padded to beyond.

        Args:
            request_pages: pages of the longest request.
        """
        padded = -(-rows // self.padding) * self.padding
        return Limits(
            decode_batch=max(rows + 1, padded, self.graph_batch) * self.draft_tokens,
            request_pages=request_pages,
            extend_requests=rows + 1,
            chunk_pages=min(self.chunk_len, self.context_len) // PAGE_SIZE,
            draft_tokens=self.draft_tokens,
        )


@dataclass(frozen=True)
class Charge:
    """Hold what a cache takes before the first token.

    Attributes:
        rows: requests at a time at most; workspace: bytes of the kernels' workspaces for them.
    """

    rows: int
    workspace: int


def ring_pages(shape: AttentionShape, config: KVarNConfig, draft_tokens: int = 1) -> int:
    """Return the pages that the newest tokens of a running request take, exact, beside its records."""
    return config.ring_pages(shape.head_dim, shape.dtype.itemsize, draft_tokens)


def requests_of(pool_tokens: int, ring_tokens: int, tokens: int, rows: int) -> int:
    """Return how many requests of so many tokens fit a pool at a time, nothing shared."""
    each = whole_pages(tokens) + ring_tokens
    return min(max(pool_tokens - PAGE_SIZE, 0) // each, rows)


def describe_requests(pool_tokens: int, ring_tokens: int, rows: int) -> str:
    """Return in words how many requests run at a time, e.g. "609 requests of 1,024 tokens run at a time, ..."."""
    short, middle, long = (requests_of(pool_tokens, ring_tokens, tokens, rows) for tokens in (1024, 8192, 32768))
    return f"{short:,} requests of 1,024 tokens run at a time, or {middle:,} of 8,192, or {long:,} of 32,768"


def workspace_bytes(
    shape: ModelShape, config: KVarNConfig, device: torch.device, limits: Limits, gpu: Gpu | None = None
) -> int:
    """Return the bytes of the workspaces on a device, or on a GPU that is described."""
    # not with the module, which a server without a kvarn cache imports too
    from kvarn_kernels.attention import Attention, choose_kernels

    gpu = gpu_of(device) if gpu is None else gpu
    kernels, meta = choose_kernels(shape.attention, config, device, gpu), torch.device("meta")
    return Attention(shape.attention, config, meta, limits, kernels, gpu, shape.sliding_windows).num_bytes


def charge(
    shape: ModelShape,
    config: KVarNConfig,
    available: int,
    bounds: Bounds,
    device: torch.device,
    gpu: Gpu | None = None,
) -> Charge:
    """Return what a cache takes of the KV memory before the first token.

    Requests take their rings from the pool when they run, so their number costs workspaces only. Without a wish of the
    user it is what stock SGLang has at most, halved until the workspaces take a small share.

    Args:
        available: bytes for the KV cache, all of it.

    Raises:
        Refused: what is left holds no pool that a request could use.
    """
    pages, rows = -(-bounds.context_len // PAGE_SIZE) + 1, min(bounds.requests or MAX_ROWS, bounds.states or MAX_ROWS)
    while True:
        workspace = bounds.backends * workspace_bytes(shape, config, device, bounds.steps(rows, pages), gpu)
        if bounds.requests or rows <= max(bounds.graph_batch, 1) or workspace <= WORKSPACE_SHARE * available:
            break
        rows //= 2
    left, least = available - workspace, ring_pages(shape.attention, config, bounds.draft_tokens) + MIN_PAGES
    needed = least * PAGE_SIZE * shape.token_bytes(config)
    if left < needed:
        raise Refused(
            f"a kvarn cache needs {needed / MIB:,.1f} MiB for a pool of {least} pages, but of {available / MIB:,.1f} "
            f"MiB the workspaces for {rows} requests at a time leave {max(left, 0) / MIB:,.1f} MiB: lower "
            "--max-running-requests or raise --mem-fraction-static"
        )
    return Charge(rows, workspace)


def check_pool(pool_tokens: int, shape: ModelShape, config: KVarNConfig, draft_tokens: int) -> None:
    """Refuse a pool that does not hold a request and its ring.

    Raises:
        Refused: its tokens, and how many it takes.
    """
    needed = (ring_pages(shape.attention, config, draft_tokens) + MIN_PAGES) * PAGE_SIZE
    if pool_tokens < needed:
        raise Refused(
            f"a kvarn cache of this model needs a pool of at least {needed:,} tokens, not {pool_tokens:,}, because a "
            f"running request keeps its newest tokens in 16 bits, in {needed // PAGE_SIZE - MIN_PAGES} pages of the "
            "pool: raise --max-total-tokens or --mem-fraction-static"
        )
