# SPDX-License-Identifier: Apache-2.0
"""What the user's choice costs in bytes: per token, per request row, and how many rows that buys."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig

from sglang_kvarn import compat, settings
from sglang_kvarn.refused import Refused

logger = logging.getLogger(__name__)

# shares of the KV memory: what rings take at most so that every batch that stock SGLang captures a decode graph for can
# run, and what they may take beyond that
GRAPH_RING_SHARE, RING_SHARE = 0.2, 0.05
MIN_ROWS = 8
MAX_ROWS = 4096
# the prompt, the answer, and the page that SGLang keeps free: a pool of one page starts no request, of two answers none
MIN_PAGES = 3
MIB = 1 << 20


@dataclass(frozen=True)
class ModelShape:
    """Describe the attention of one rank.

    Example: Qwen3-8B on one GPU has 36 layers, 8 KV heads and 32 query heads of 128 channels, 2 bytes each;
    with ``kvarn`` a token costs 36 * 8 * 112 = 32,256 bytes (16 bit: 147,456), a ring row 37,748,736 bytes.
    """

    layers: int
    kv_heads: int
    qo_heads: int
    head_dim: int
    itemsize: int

    def token_bytes(self, config: KVarNConfig) -> int:
        """Return the record bytes per token, all layers."""
        return self.layers * self.kv_heads * config.bytes_per_token(self.head_dim)

    def full_token_bytes(self, itemsize: int) -> int:
        """Return what a token costs unquantised, keys and values of `itemsize` bytes."""
        return self.layers * self.kv_heads * 2 * self.head_dim * itemsize

    def row_bytes(self, config: KVarNConfig) -> int:
        """Return the ring bytes of one request row, all layers, keys and values."""
        return config.ring_len * self.full_token_bytes(self.itemsize)


def model_shape(configurator: Any) -> ModelShape:
    """Read the shape of the rank's model from SGLang's KVCacheConfigurator."""
    model = configurator.model_config
    tp_size = compat.get_parallel().attn_tp_size
    return ModelShape(
        layers=configurator.layer_info.num_effective_layers,
        kv_heads=model.get_num_kv_heads(tp_size),
        qo_heads=model.num_attention_heads // tp_size,
        head_dim=model.head_dim,
        itemsize=configurator.model_dtype.itemsize,
    )


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


def cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Return the bytes per token. Hook around ``DefaultPoolConfigurator._compute_cell_size``."""
    config = settings.target_preset(kvc)
    if config is None:
        return original(self, kvc, num_layers)
    return model_shape(kvc).token_bytes(config)


def charge_fixed_bytes(result: int, configurator: Any, *args: Any, **kwargs: Any) -> int | None:
    """Take ring and workspace out of the KV memory. Hook after ``_profile_available_bytes``.

    The rows are fixed here, before tokens are counted, and passed on as ``max_running_requests``: a larger
    pool would otherwise ask for more rows, which would shrink the pool.

    Raises:
        Refused: what is left holds no pool that a request could use.
    """
    config = settings.target_preset(configurator)
    if config is None:
        return None
    shape, server_args = model_shape(configurator), configurator.server_args
    requested = compat.max_running_requests(server_args)
    rows, reason = choose_rows(result, shape.row_bytes(config), requested, graph_batch_size(server_args))
    if requested is None:
        compat.set_max_running_requests(server_args, rows)
    ring = (rows + 1) * shape.row_bytes(config)
    workspace = workspace_bytes(
        shape,
        config,
        torch.device(configurator.device),
        configurator.model_dtype,
        decode_batch_size(server_args, rows),
        rows,
        configurator.model_config.context_len,
        chunk_tokens(server_args, configurator.model_config.context_len),
    )
    logger.info(
        "KVarN: %d requests at a time (%s), ring %.1f MiB, workspace %.1f MiB of %.1f MiB KV memory;"
        " a request less at a time (--max-running-requests) makes room for %s tokens more",
        rows,
        reason,
        ring / MIB,
        workspace / MIB,
        result / MIB,
        f"{shape.row_bytes(config) // shape.token_bytes(config):,}",
    )
    left, needed = result - ring - workspace, MIN_PAGES * settings.PAGE_SIZE * shape.token_bytes(config)
    if left < needed:
        raise Refused(
            f"a kvarn cache needs {needed / MIB:,.1f} MiB for {MIN_PAGES} pages of tokens, but of {result / MIB:,.1f} "
            f"MiB the ring of {rows} requests and the workspace leave {max(left, 0) / MIB:,.1f} MiB: lower "
            "--max-running-requests or raise --mem-fraction-static"
        )
    return left


def cap_rows(result: int, configurator: Any, token_capacity: int) -> int | None:
    """Keep the rows within what the ring was charged for. Hook after ``resolve_max_num_reqs``."""
    if settings.target_preset(configurator) is None:
        return None
    rows = compat.max_running_requests(configurator.server_args)
    assert rows is not None, "charge_fixed_bytes comes first"
    return min(result, rows)


def decode_batch_size(server_args: Any, rows: int) -> int:
    """Return the largest decode batch: every row, or the largest CUDA graph if that is padded beyond them."""
    return max(rows + 1, graph_batch_size(server_args))


def graph_batch_size(server_args: Any) -> int:
    """Return the largest batch that a decode CUDA graph is captured for, 0 where there are none."""
    graph = compat.resolved_arguments(server_args).cuda_graph_config.decode
    return (graph.max_bs or 0) if graph.backend != "disabled" else 0


def step_pages(rows: int, context_pages: int) -> int:
    """Return the most pages that an extend step reads: all of every request, exact and as records."""
    return rows * 2 * context_pages


def chunk_tokens(server_args: Any, context_len: int) -> int:
    """Return the most new tokens of a request in one extend step."""
    size = compat.resolved_arguments(server_args).chunked_prefill_size
    return min(size, context_len) if size and size > 0 else context_len


def workspace_bytes(
    shape: ModelShape,
    config: KVarNConfig,
    device: torch.device,
    dtype: torch.dtype,
    decode_batch: int,
    rows: int,
    context_len: int,
    chunk_len: int,
) -> int:
    """Return the bytes of the workspaces of decode and prefill; 0 where the torch form runs.

    Args:
        dtype: the model's; decode_batch: the largest; rows: requests at a time; context_len: of the longest, in tokens;
            chunk_len: the most new tokens of a request in a step.
    """
    # not with the module, which a server without a kvarn cache imports too
    from kvarn_kernels import ops

    total, heads, pages = 0, (shape.kv_heads, shape.head_dim), -(-context_len // config.tile_size) + 1
    if ops.attention_form(device) == "triton":
        from kvarn_kernels.decode import make_workspace

        workspace = make_workspace(decode_batch, shape.qo_heads, *heads, pages, config, torch.device("meta"))
        total += workspace.num_bytes
    if ops.extend_form(device, dtype, shape.head_dim, config) == "flashinfer":
        from kvarn_kernels import prefill

        # the pages of a chunk and of its window count twice: exact, and as records for the pages after them
        request_pages = pages + chunk_len // config.tile_size + 2
        total += prefill.workspace_bytes(*heads, dtype.itemsize, step_pages(rows + 1, pages), request_pages)
    return total
