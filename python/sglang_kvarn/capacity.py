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

# shares of the KV memory. Rings may take GRAPH_RING_SHARE so that every batch with a decode graph of stock SGLang can
# run; beyond such batches they may take RING_SHARE
GRAPH_RING_SHARE, RING_SHARE = 0.2, 0.05
MIN_ROWS = 8
MAX_ROWS = 4096
# pages of the smallest pool: one for the prompt, one for the answer, one that SGLang keeps free
MIN_PAGES = 3
MIB = 1 << 20


@dataclass(frozen=True)
class ModelShape:
    """Describe the layers of one rank that have a KV cache.

    Example: Qwen3-8B on one GPU has 36 layers of 32 query heads and 8 KV heads of 128 channels in bfloat16;
    with ``kvarn`` a token costs 36 * 8 * 112 = 32,256 bytes (16 bit: 147,456), a ring row 37,748,736 bytes.
    """

    layers: int
    attention: AttentionShape

    def token_bytes(self, config: KVarNConfig) -> int:
        """Return the record bytes per token, all layers."""
        return self.layers * self.attention.num_kv_heads * config.bytes_per_token(self.attention.head_dim)

    def full_token_bytes(self, itemsize: int) -> int:
        """Return what a token costs unquantised, keys and values of `itemsize` bytes."""
        return self.layers * self.attention.full_token_bytes * itemsize // self.attention.dtype.itemsize

    def row_bytes(self, config: KVarNConfig) -> int:
        """Return the ring bytes of one request row, all layers, keys and values."""
        return config.ring_len * self.layers * self.attention.full_token_bytes


def rank_shape(model_config: Any, dtype: torch.dtype, tp_size: int, layers: int) -> ModelShape:
    """Return the shape of a rank from SGLang's ModelConfig; layers: of this rank that have a KV cache."""
    attention = AttentionShape(
        num_qo_heads=model_config.num_attention_heads // tp_size,
        num_kv_heads=model_config.get_num_kv_heads(tp_size),
        head_dim=model_config.head_dim,
        dtype=dtype,
    )
    return ModelShape(layers, attention)


@dataclass(frozen=True)
class Bounds:
    """Hold what the arguments of a server bound.

    Attributes:
        requests: ``--max-running-requests`` of a rank, None where it is left open.
        graph_batch: the largest batch of a decode CUDA graph, 0 without graphs.
        context_len: tokens of the longest request; chunk_len: its most new tokens in one extend step.
    """

    requests: int | None
    graph_batch: int
    context_len: int
    chunk_len: int

    def steps(self, rows: int, request_pages: int) -> Limits:
        """Return what bounds the steps of `rows` requests at a time.

        A decode batch is every row and the padding, or the largest CUDA graph if that is padded beyond them.

        Args:
            request_pages: pages of the longest request.
        """
        return Limits(
            decode_batch=max(rows + 1, self.graph_batch),
            request_pages=request_pages,
            extend_requests=rows + 1,
            chunk_pages=min(self.chunk_len, self.context_len) // PAGE_SIZE,
        )


@dataclass(frozen=True)
class Charge:
    """Hold what a cache takes before the first token.

    Attributes:
        rows: requests at a time; reason: why so many.
        ring, workspace: bytes of the rings and of the kernels' workspaces.
    """

    rows: int
    reason: str
    ring: int
    workspace: int


def choose_rows(available: int, row_bytes: int, requested: int | None, graph_batch: int = 0) -> tuple[int, str]:
    """Return the number of request rows that get a ring, and why.

    Without a wish of the user, as many requests run as stock SGLang captures decode graphs for, while their rings take
    at most a fifth of the memory. Fewer rows would let short requests wait beside an empty pool: Qwen3-8B on an H100
    ran 69 of 256 chats at a time when rings took 5 %, at 0.77 times the throughput of stock SGLang.

    Args:
        available: bytes for the KV cache, ring included.
        row_bytes: ring bytes of one row.
        requested: the user's ``--max-running-requests`` for this rank, None to derive it.
        graph_batch: the largest batch of a decode graph, 0 without graphs.

    Raises:
        Refused: the ring of these rows (and of the padding row) does not leave room for a cache.
    """
    if requested is not None:
        rows, reason = requested, "--max-running-requests"
    else:
        some, many = (int(available * share) // row_bytes - 1 for share in (RING_SHARE, GRAPH_RING_SHARE))
        rows = min(max(some, min(graph_batch, many), MIN_ROWS), MAX_ROWS)
        reason = (
            f"as many as decode graphs take while rings fit {GRAPH_RING_SHARE:.0%} of the KV memory, or more that fit "
            f"{RING_SHARE:.0%}; at least {MIN_ROWS}, at most {MAX_ROWS}"
        )
    if (rows + 1) * row_bytes >= available:
        raise Refused(
            f"a kvarn cache needs {(rows + 1) * row_bytes / MIB:,.1f} MiB for the newest tokens of {rows} requests at "
            f"a time, but {available / MIB:,.1f} MiB are left for it: lower --max-running-requests or raise "
            "--mem-fraction-static"
        )
    return rows, reason


def workspace_bytes(
    shape: ModelShape, config: KVarNConfig, device: torch.device, limits: Limits, gpu: Gpu | None = None
) -> int:
    """Return the bytes of the workspaces on a device, or on a GPU that is described."""
    # not with the module, which a server without a kvarn cache imports too
    from kvarn_kernels.attention import Attention, choose_kernels

    gpu = gpu_of(device) if gpu is None else gpu
    kernels = choose_kernels(shape.attention, config, device, gpu)
    return Attention(shape.attention, config, torch.device("meta"), limits, kernels, gpu).num_bytes


def charge(
    shape: ModelShape,
    config: KVarNConfig,
    available: int,
    bounds: Bounds,
    device: torch.device,
    gpu: Gpu | None = None,
) -> Charge:
    """Return what a cache takes of the KV memory before the first token.

    Args:
        available: bytes for the KV cache, all of it.

    Raises:
        Refused: what is left holds no pool that a request could use.
    """
    rows, reason = choose_rows(available, shape.row_bytes(config), bounds.requests, bounds.graph_batch)
    limits = bounds.steps(rows, -(-bounds.context_len // PAGE_SIZE) + 1)
    ring = (rows + 1) * shape.row_bytes(config)
    workspace = workspace_bytes(shape, config, device, limits, gpu)
    left, needed = available - ring - workspace, MIN_PAGES * PAGE_SIZE * shape.token_bytes(config)
    if left < needed:
        raise Refused(
            f"a kvarn cache needs {needed / MIB:,.1f} MiB for {MIN_PAGES} pages of tokens, but of "
            f"{available / MIB:,.1f} MiB the ring of {rows} requests and the workspace leave "
            f"{max(left, 0) / MIB:,.1f} MiB: lower --max-running-requests or raise --mem-fraction-static"
        )
    return Charge(rows, reason, ring, workspace)
