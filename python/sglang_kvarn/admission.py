# SPDX-License-Identifier: Apache-2.0
"""No request is admitted without a ring: hooks into SGLang's scheduler.

SGLang looks for the prefix of a waiting request, then adds the request to the next batch if its tokens fit. A ring is
taken just before that, while the prefix is locked, on the device and in host memory, so that no eviction for the ring
can take the prefix away. SGLang then counts the tokens that are left, and no allocation can fail later for the sake of
a ring.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_kvarn import compat, rings
from sglang_kvarn.settings import PAGE_SIZE


def add_with_ring(original: Callable[..., Any], adder: Any, req: Any, *args: Any, **kwargs: Any) -> Any:
    """Add a request only if there is a ring for it. Hook around ``PrefillAdder.add_one_req``."""
    found = rings.of_pool(adder.tree_cache.req_to_token_pool)
    if found is None or compat.request_row(req) is not None:
        return original(adder, req, *args, **kwargs)
    with adder._lock_node(req.last_node), compat.lock_host_prefix(adder, req):
        has_ring = found.promise(req, adder.tree_cache)
    if not has_ring:
        return compat.AddReqResult.NO_TOKEN
    result = original(adder, req, *args, **kwargs)
    if not any(added is req for added in adder.can_run_list):
        found.take_back(req)
    return result


def begin_where_a_load_failed(
    original: Callable[..., Any], tree_cache: Any, params: Any, *args: Any, **kwargs: Any
) -> Any:
    """Let a request whose load failed go on from the state of the device. Hook around ``init_load_back``.

    A request of a hybrid model may find a prefix on the device, and a longer one in host memory. SGLang copies the
    state behind the longer one; where that cannot be loaded the request keeps the shorter prefix, and would go on from
    a state of zeros. The state behind the shorter one is on the device: who adds a request locks it.
    """
    loaded = original(tree_cache, params, *args, **kwargs)
    if loaded is None or rings.of_pool(tree_cache.req_to_token_pool) is None:
        return loaded
    tokens, last_node = loaded
    if not tokens and params.req.prefix_len:
        compat.copy_state(tree_cache, params.req, last_node)
    return loaded


def limit_lengths(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse requests that the pool cannot hold beside their ring. Hook after ``Scheduler.init_model_worker``."""
    worker_pool, _ = scheduler.tp_worker.get_memory_pool()
    if (found := rings.of_pool(worker_pool)) is None:
        return
    # the allocator may take a page more than the tokens of a request fill; SGLang allocates twice its drafts ahead
    drafts = compat.draft_tokens(scheduler.server_args)
    ahead = 2 * drafts if drafts > 1 else 0
    longest = scheduler.max_total_num_tokens - found.tokens_per_ring - PAGE_SIZE - 1 - ahead
    less = max(scheduler.max_req_len - longest, 0)
    scheduler.max_req_len -= less
    scheduler.max_req_input_len -= less
    if compat.published_argument("disaggregation_mode") == "decode":
        # a decode server receives a request once there is room for so many tokens of its answer besides
        reserved = compat.scheduler_argument(scheduler.server_args, "num_reserved_decode_tokens")
        scheduler.max_req_input_len = min(scheduler.max_req_input_len, longest - reserved)


def count_rings(result: tuple[int, int], checker: Any, *args: Any, **kwargs: Any) -> tuple[int, int] | None:
    """Count rings among what requests hold. Hook after ``SchedulerInvariantChecker._get_total_uncached_sizes``."""
    if (found := rings.of_pool(checker.req_to_token_pool)) is None:
        return None
    full, windows = result
    return full + found.out * found.tokens_per_ring, windows
