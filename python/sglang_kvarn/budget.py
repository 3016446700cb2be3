# SPDX-License-Identifier: Apache-2.0
"""What a kvarn cache takes of SGLang's memory: hooks that charge it, by the arithmetic of `capacity`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang_kvarn import capacity, compat, settings
from sglang_kvarn.capacity import MIB, Bounds, ModelShape

logger = logging.getLogger(__name__)


def model_shape(configurator: Any) -> ModelShape:
    """Read the shape of the rank's model from SGLang's KVCacheConfigurator."""
    layers = configurator.layer_info.num_effective_layers
    tp_size = compat.get_parallel().attn_tp_size
    return capacity.rank_shape(configurator.model_config, configurator.model_dtype, tp_size, layers)


def bounds(server_args: Any, context_len: int) -> Bounds:
    """Return what a server's arguments bound, in a scheduler; context_len: of the model, in tokens."""
    args = compat.resolved_arguments(server_args)
    size, graph = args.chunked_prefill_size, args.cuda_graph_config.decode
    return Bounds(
        requests=compat.max_running_requests(server_args),
        graph_batch=(graph.max_bs or 0) if graph.backend != "disabled" else 0,
        context_len=context_len,
        chunk_len=size if size and size > 0 else context_len,
    )


def cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Return the bytes per token. Hook around ``DefaultPoolConfigurator._compute_cell_size``."""
    config = settings.target_preset(kvc)
    if config is None:
        return original(self, kvc, num_layers)
    return model_shape(kvc).token_bytes(config)


def charge_fixed_bytes(result: int, configurator: Any, *args: Any, **kwargs: Any) -> int | None:
    """Take the workspaces out of the KV memory. Hook after ``_profile_available_bytes``.

    The requests at a time are fixed here, before tokens are counted, and passed on as ``max_running_requests``: the
    workspaces are made for them.

    Raises:
        Refused: what is left holds no pool that a request could use.
    """
    config = settings.target_preset(configurator)
    if config is None:
        return None
    shape, server_args = model_shape(configurator), configurator.server_args
    found = bounds(server_args, configurator.model_config.context_len)
    charged = capacity.charge(shape, config, result, found, torch.device(configurator.device))
    if found.requests is None:
        compat.set_max_running_requests(server_args, charged.rows)
    logger.info(
        "KVarN: workspaces for at most %d requests at a time take %.1f MiB of %.1f MiB KV memory",
        charged.rows,
        charged.workspace / MIB,
        result / MIB,
    )
    return result - charged.workspace


def cap_rows(result: int, configurator: Any, token_capacity: int) -> int | None:
    """Keep the rows within what the workspaces are made for. Hook after ``resolve_max_num_reqs``."""
    if settings.target_preset(configurator) is None:
        return None
    rows = compat.max_running_requests(configurator.server_args)
    assert rows is not None, "charge_fixed_bytes comes first"
    return min(result, rows)
