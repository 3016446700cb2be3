# SPDX-License-Identifier: Apache-2.0
"""What a running server says about its cache: in ``/server_info`` and, with ``--enable-metrics``, in ``/metrics``."""

from __future__ import annotations

import functools
from typing import Any

from sglang_kvarn import compat, settings

# facts of a pool that are gauges, sglang:kvarn_NAME with the preset as label; SGLang has its own of what is in use
GAUGES = {
    "bytes_per_token": "Bytes of the KV cache per token, records of all layers of this process",
    "pool_tokens": "Tokens that the pool has room for",
    "max_requests": "Requests that can run at a time, as long as the pool has pages for their rings",
    "ring_tokens": "Tokens of the pool that the exact newest tokens of a running request take the place of",
    "host_tokens": "Tokens that host memory has room for, 0 without a hierarchical cache",
}


def add_to_server_info(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Add "kvarn" to the internal state of a scheduler with our pool. Hook after ``get_internal_state``.

    "pages_in_use" counts the pages that requests and the prefix cache hold, those of rings included, and
    "host_pages_in_use" those of the prefix cache in host memory. Of a hybrid model "host_states" are there too.
    """
    if settings.preset_of(scheduler.server_args) is None:
        return result
    allocator = scheduler.token_to_kv_pool_allocator
    # beside sliding windows, whose allocator counts the smaller one of two parts
    pool = getattr(allocator.get_kvcache(), "full_kv_pool", allocator.get_kvcache())
    allocator = pool.rings.allocator
    used = (allocator.size - allocator.available_size()) // settings.PAGE_SIZE
    host = 0 if pool.host is None else (pool.host.size - pool.host.available_size()) // settings.PAGE_SIZE
    used = {"pages_in_use": used, "host_pages_in_use": host, "rings_in_use": pool.rings.out}
    if pool.host is not None and pool.states is not None:
        used["host_states"] = compat.host_states(scheduler.tree_cache)
    result.internal_state["kvarn"] = pool.facts() | used
    return result


def export(facts: dict[str, Any]) -> None:
    """Set the gauges of this process to the facts of its pool.

    SGLang has set PROMETHEUS_MULTIPROC_DIR before it starts a process.
    """
    for name, gauge in _gauges().items():
        gauge.labels(preset=facts["preset"]).set(facts[name])


@functools.cache
def _gauges() -> dict[str, Any]:
    # reads PROMETHEUS_MULTIPROC_DIR when it is imported
    from prometheus_client import Gauge

    return {
        name: Gauge(f"sglang:kvarn_{name}", text, labelnames=["preset"], multiprocess_mode="mostrecent")
        for name, text in GAUGES.items()
    }
