# SPDX-License-Identifier: Apache-2.0
"""What a running server says about its cache: in ``/server_info`` and, with ``--enable-metrics``, in ``/metrics``."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from sglang_kvarn import settings

if TYPE_CHECKING:
    from sglang_kvarn.pool import KVarNTokenToKVPool

# of facts(), as gauges sglang:kvarn_NAME with the preset as label; pages in use are SGLang's own token usage
GAUGES = {
    "bytes_per_token": "Bytes of the KV cache per token, records of all layers of this process",
    "pool_tokens": "Tokens that the pool of records holds",
    "ring_rows": "Requests that there are rings of exact tokens for, so that run at a time",
    "ring_bytes": "Bytes of all rings, with the one that padded rows of CUDA graphs write",
}


def facts(pool: KVarNTokenToKVPool) -> dict[str, Any]:
    """Return preset and sizes of a pool, JSON types."""
    return {
        "preset": pool.config.name,
        "bytes_per_token": sum(records[0].nbytes for records in pool.records) // pool.config.tile_size,
        "pool_tokens": pool.size,
        "ring_rows": pool.tail.max_requests,
        "ring_bytes": pool.tail.num_bytes,
    }


def add_to_server_info(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    """Add "kvarn" to the internal state of a scheduler with our pool. Hook after ``get_internal_state``.

    "pages_in_use" are those that requests and the prefix cache hold; all but the newest of each request are encoded.
    """
    if settings.preset_of(scheduler.server_args) is None:
        return result
    allocator = scheduler.token_to_kv_pool_allocator
    pool = allocator.get_kvcache()
    used = (allocator.size - allocator.available_size()) // pool.config.tile_size
    result.internal_state["kvarn"] = facts(pool) | {"pages_in_use": used}
    return result


def export(pool: KVarNTokenToKVPool) -> None:
    """Set the gauges of this process; SGLang has set PROMETHEUS_MULTIPROC_DIR before it starts one."""
    values = facts(pool)
    for name, gauge in _gauges().items():
        gauge.labels(preset=values["preset"]).set(values[name])


@functools.cache
def _gauges() -> dict[str, Any]:
    # reads PROMETHEUS_MULTIPROC_DIR when it is imported
    from prometheus_client import Gauge

    return {
        name: Gauge(f"sglang:kvarn_{name}", text, labelnames=["preset"], multiprocess_mode="mostrecent")
        for name, text in GAUGES.items()
    }
