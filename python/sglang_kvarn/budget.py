# SPDX-License-Identifier: Apache-2.0
"""What a kvarn cache takes of SGLang's memory: hooks that charge it, by the arithmetic of `capacity`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from sglang_kvarn import capacity, compat, settings
from sglang_kvarn.capacity import (
    GIB,
    MIB,
    STATES_PER_SESSION,
    TYPICAL_SESSION,
    Bounds,
    ModelShape,
    SlidingShare,
    States,
)

logger = logging.getLogger(__name__)


def layer_ids(configurator: Any) -> list[int]:
    """Return the layers of the rank that have a KV cache, from SGLang's KVCacheConfigurator."""
    found = configurator.layer_info
    return compat.attention_layers(configurator.model_config, found.start_layer, found.end_layer)


def model_shape(configurator: Any) -> ModelShape:
    """Read the shape of the rank's model from SGLang's KVCacheConfigurator."""
    layers, tp_size = len(layer_ids(configurator)), compat.get_parallel().attn_tp_size
    model, dtype = configurator.model_config, configurator.model_dtype
    heads, windows = compat.query_heads(model), compat.windows_in_records(model)
    return capacity.rank_shape(model, dtype, tp_size, layers, heads, windows)


def sliding_layer_ids(configurator: Any) -> list[int]:
    """Return the layers of the rank that have a sliding window, from SGLang's KVCacheConfigurator."""
    found = configurator.layer_info
    return compat.sliding_layers(configurator.model_config, found.start_layer, found.end_layer)


def sliding_share(configurator: Any) -> SlidingShare:
    """Return how records and sliding windows share memory, from SGLang's KVCacheConfigurator, in a scheduler."""
    config, server_args = settings.target_preset(configurator), configurator.server_args
    assert config is not None, "another cache is SGLang's to size"
    shape, itemsize = model_shape(configurator), configurator.model_dtype.itemsize
    heads, *channels = compat.sliding_shape(configurator.model_config, compat.get_parallel().attn_tp_size)
    found = bounds(server_args, configurator.model_config.context_len)
    assert found.requests is not None, "charge_fixed_bytes comes first"
    args = compat.resolved_arguments(server_args)
    requests, ahead = found.requests, found.chunk_len if args.disable_overlap_schedule else 2 * found.chunk_len
    if compat.published_argument("disaggregation_mode") == "decode":
        # which computes no prompts: SGLang receives one where it finds room for so much of the answer, too
        requests, ahead = requests + compat.received_requests(server_args), compat.most_new_tokens_expected()
    window, drafts = configurator.sliding_window_size, found.draft_tokens
    interval = compat.sliding_eviction_interval(drafts)
    each, drafted = capacity.sliding_tokens_of_request(window, interval, drafts), draft_token_bytes(configurator)
    return SlidingShare(
        token=shape.token_bytes(config) + drafted,
        plain_token=shape.full_token_bytes(itemsize) + drafted,
        sliding_token=len(sliding_layer_ids(configurator)) * heads * sum(channels) * itemsize,
        ratio=compat.scheduler_argument(server_args, "swa_full_tokens_ratio"),
        is_chosen=not compat.is_sliding_ratio_open(server_args),
        least=each + ahead + settings.PAGE_SIZE,
        most=requests * each + ahead + settings.PAGE_SIZE if args.disable_radix_cache else None,
    )


def choose_sizes(original: Callable[..., Any], kvc: Any) -> Any:
    """Choose who sizes the pool. Hook around ``create_memory_pool_configurator``."""
    if settings.target_preset(kvc) is None or not sliding_layer_ids(kvc):
        return original(kvc)
    # subclasses SGLang's, which is imported once SGLang sizes a kvarn pool, not when plugins load
    from sglang_kvarn.mixed_sizes import MixedPoolConfigurator

    return MixedPoolConfigurator(kvc)


def draft_token_bytes(configurator: Any) -> int:
    """Return the bytes of a token in the cache of the draft model, 0 without one; from a KVCacheConfigurator."""
    if (draft := compat.draft_model(configurator)) is None:
        return 0
    model_config, layers, itemsize = draft
    ranks = compat.get_parallel().attn_tp_size
    return capacity.rank_shape(model_config, model_config.dtype, ranks, layers).full_token_bytes(itemsize)


def requests_of_rank(server_args: Any) -> int | None:
    """Return ``--max-running-requests`` of a rank, in a scheduler; None where it is left open.

    With DP attention ranks have requests of their own, and the argument counts those of all.
    """
    requests = compat.scheduler_argument(server_args, "max_running_requests")
    return None if requests is None else max(1, requests // compat.get_parallel().attn_dp_size)


def bounds(server_args: Any, context_len: int, states: int | None = None) -> Bounds:
    """Return what a server's arguments bound, in a scheduler.

    Args:
        context_len: of the model, in tokens; states: requests at a time that states allow, None without states.
    """
    args = compat.resolved_arguments(server_args)
    size, graph = args.chunked_prefill_size, args.cuda_graph_config.decode
    return Bounds(
        requests=requests_of_rank(server_args),
        graph_batch=(graph.max_bs or 0) if graph.backend != "disabled" else 0,
        context_len=context_len,
        chunk_len=size if size and size > 0 else context_len,
        states=states,
        draft_tokens=compat.draft_tokens(server_args),
        padding=compat.get_parallel().attn_tp_size,
        backends=compat.attention_backends(server_args),
    )


def cell_size(original: Callable[..., int], self: Any, kvc: Any, num_layers: int) -> int:
    """Return the bytes per token. Hook around ``DefaultPoolConfigurator._compute_cell_size``."""
    config = settings.target_preset(kvc)
    if config is None:
        return original(self, kvc, num_layers)
    return model_shape(kvc).token_bytes(config)


def states(configurator: Any, made: int | None = None) -> States | None:
    """Return what SGLang has set apart for the states of a hybrid model, None for other models.

    Args:
        made: `compat.states_made` once there are some. A decode server has more than it has counted.
    """
    if (config := compat.hybrid_config(configurator.model_config)) is None:
        return None
    number = made or compat.scheduler_argument(configurator.server_args, "max_mamba_cache_size")
    per_request = compat.states_per_request(configurator)
    per_session, what = _states_per_session(configurator), compat.state_format(config)
    return States(number, compat.state_bytes(config), per_request, per_session, what)


def _states_per_session(configurator: Any) -> int:
    return 0 if compat.resolved_arguments(configurator.server_args).disable_radix_cache else STATES_PER_SESSION


def split_memory(configurator: Any, total_rest_memory: float) -> None:
    """Split the memory of a hybrid model between states and tokens. Hook before ``_handle_max_mamba_cache``.

    SGLang's ratio is made for tokens of 16 bits. What the user chose stays.

    Args:
        total_rest_memory: for both, GiB.
    """
    config = settings.target_preset(configurator)
    if config is None or not compat.is_state_ratio_open(configurator.server_args):
        return
    args = compat.resolved_arguments(configurator.server_args)
    if args.max_mamba_cache_size is not None or (args.disable_radix_cache and args.max_running_requests is not None):
        # SGLang counts states by these, not by the ratio
        return
    state = compat.state_bytes(compat.hybrid_config(configurator.model_config))
    # without a prefix cache a session is there only while it runs
    per_request = compat.states_per_request(configurator)
    per_session = _states_per_session(configurator) or per_request
    token = model_shape(configurator).token_bytes(config)
    if (drafts := compat.draft_tokens(configurator.server_args)) == 1:
        ratio = capacity.state_ratio(state, per_session, token)
    else:
        share = capacity.state_ratio(state, per_session, token + draft_token_bytes(configurator))
        running = args.max_running_requests * drafts * state
        ratio = capacity.state_ratio_with_drafts(share, total_rest_memory * GIB, drafts / per_request, running)
    ratio = round(ratio, 3)
    compat.override_argument(configurator.server_args, mamba_full_memory_ratio=ratio)
    logger.info(
        "KVarN: --mamba-full-memory-ratio %s, with which states and tokens run out at the same number of sessions of "
        "%s tokens; SGLang's %s is made for tokens of 16 bits",
        ratio,
        f"{TYPICAL_SESSION:,}",
        compat.STOCK_STATE_RATIO,
    )


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
    kept = states(configurator)
    allowed = None if kept is None else max(kept.requests, 1)
    found = bounds(server_args, configurator.model_config.context_len, allowed)
    charged = capacity.charge(shape, config, result, found, torch.device(configurator.device))
    if found.requests is None:
        compat.override_argument(server_args, max_running_requests=charged.rows * compat.get_parallel().attn_dp_size)
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
    rows = requests_of_rank(configurator.server_args)
    assert rows is not None, "charge_fixed_bytes comes first"
    return min(result, rows)
