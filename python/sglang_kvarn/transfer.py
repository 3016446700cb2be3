# SPDX-License-Identifier: Apache-2.0
"""PD disaggregation: a request goes on in another server. Hooks into SGLang's transfer between the two.

    records        The cache of a request, page by page: the bytes of a page of a layer are one item.
    exact tokens   A state of the request: the pages of its ring, as far as the next token reads them. The pages of one
                   server's ring answer to those of the other's in the order of their tokens.
    states         Of a hybrid model, what its other layers keep. SGLang sends them as it does beside any cache.
    windows        Of layers whose sliding window is in SGLang's pool, the pages that the next token sees. SGLang sends
                   these as beside any cache, and a decode server takes room for no others.
    exact start    A number that travels with the first token of the answer.
    drafts         SGLang's part: pages of a draft model have the numbers of those of records, and the hidden state
                   behind the prompt travels with the first token.

Nothing is copied on either side, and nothing is decoded on the way. A page is sent after the step that wrote it, and
its address is told to the sender after the steps of its last owner (`fences`). What stands before a request's exact
start in its ring, and behind its last token in a page, is sent too and never read.

Servers that send and receive must mean the same by the same bytes: a prefill server tells what its pages are, and a
decode server fails the requests of one that has others.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kvarn_kernels.record import tile

from sglang_kvarn import compat, rings
from sglang_kvarn.settings import PAGE_SIZE

if TYPE_CHECKING:
    from sglang_kvarn.pool import KVarNTokenToKVPool

# what both servers call their cache; which one it is says the layout
FORMAT = "kvarn"
# of the 16 numbers of a request that travel with its first token, one that SGLang leaves alone
EXACT_START = 15
_SAME_DRAFTS = "start both servers with the same --speculative-algorithm, draft model and number of drafts"
# by the part of a layout that differs: what to do. Other ranks have another balance too, and come first
_WAYS_OUT = {
    "preset": "start both servers with the same --kv-cache-dtype",
    "record": "run the same version of sglang-kvarn on both servers",
    "dtype": "start both servers with the same --dtype",
    "states": "start both servers with the same --mamba-ssm-dtype and SGLANG_MAMBA_CONV_DTYPE",
    "tp_size": "start both servers with the same --tp-size",
    "balance": "start both servers with the same weights and the same KVARN_BALANCE",
    "draft_page_bytes": _SAME_DRAFTS,
    "ring_pages": _SAME_DRAFTS,
}


def layout(pool: KVarNTokenToKVPool, ranks: int, states: str | None, draft_pages: list[int]) -> dict[str, Any]:
    """Return what the bytes of a request mean, in JSON types: equal where one server can read what another wrote.

    Every rank has balanced heads of its own, so all of them must call this at the same time.

    Args:
        ranks: that share the heads of the model.
        states: `compat.state_dtypes` of a hybrid model, None of another.
        draft_pages: bytes of a page of a draft model, for each of its buffers.
    """
    return {
        "preset": pool.config.name,
        "record": tile.VERSION,
        "dtype": str(pool.shape.dtype).removeprefix("torch."),
        "states": states,
        "balance": "-".join(compat.gather_from_ranks(pool.balance_tag())),
        "tp_size": ranks,
        "draft_page_bytes": draft_pages,
        # whether the oldest and the newest tokens share a page
        "ring_pages": pool.rings.pages_per_ring,
    }


def describe(
    result: Any, kv_args: Any, token_to_kv_pool: Any, *args: Any, req_to_token_pool: Any, **kwargs: Any
) -> None:
    """Tell SGLang's transfer what a request consists of. Hook after ``setup_state_kv_args``."""
    pool: KVarNTokenToKVPool | None = rings.records_of(token_to_kv_pool)
    if pool is None:
        return
    # behind the buffers of records
    draft_pages = list(kv_args.kv_item_lens[len(pool.layer_ids) :])
    ranks, states = compat.get_parallel().attn_tp_size, compat.state_dtypes(req_to_token_pool)
    pool.layout = layout(pool, ranks, states, draft_pages)
    kv_args.kv_cache_dtype_str = FORMAT
    # SGLang pairs buffers by layer; without ids it takes one half of them for keys and the other for values
    after = max(pool.layer_ids) + 1
    kv_args.kv_layer_ids = [*pool.layer_ids, *range(after, after + len(draft_pages))]
    if compat.published_argument("disaggregation_mode") == "prefill":
        # the decode server compares itself: where SGLang finds a difference, it ends the server
        kv_args.kv_layout = json.dumps(pool.layout)
    compat.add_request_state(kv_args, pool.get_contiguous_buf_infos(), pool.layer_ids)
    if not pool.slab.is_cuda:
        compat.send_page_ids_at_once()


def send_exact_start(scheduler: Any, req: Any, last_chunk: bool = False, *args: Any, **kwargs: Any) -> None:
    """Put the exact start beside the first token. Hook before ``SchedulerDisaggregationPrefillMixin.send_kv_chunk``."""
    if last_chunk and (found := rings.of_pool(scheduler.req_to_token_pool)) is not None:
        start = found.held(compat.request_row(req)).exact_start
        scheduler.disagg_metadata_buffers.cached_tokens[req.metadata_buffer_index][EXACT_START] = start


def take_exact_start(queue: Any, decode_req: Any) -> None:
    """Note the exact start that came with the first token. Hook before ``DecodeTransferQueue._commit_transfer_to_req``.

    The request joins no batch before, so that no step has read another one.
    """
    if (found := rings.of_pool(queue.scheduler.req_to_token_pool)) is not None:
        numbers = queue.metadata_buffers.cached_tokens[decode_req.metadata_buffer_index]
        found.set_exact_start(compat.request_row(decode_req.req), int(numbers[EXACT_START]))
        # the next request here may have no sender: SGLang checks the health of a server by such ones
        numbers[EXACT_START] = 0


def charge_ring(result: int, queue: Any, *args: Any, **kwargs: Any) -> int | None:
    """Count the ring among what a request needs to be received.

    Hook after ``DecodePreallocQueue._required_admission_tokens``.
    """
    found = rings.of_pool(queue.req_to_token_pool)
    return None if found is None else result + found.tokens_per_ring


def charge_ring_of_retracted(result: tuple[int, int], queue: Any, req: Any) -> tuple[int, int] | None:
    """Count the ring among what a retracted request needs to come back.

    Hook after ``DecodePreallocQueue._prealloc_required_tokens``.
    """
    if (found := rings.of_pool(queue.req_to_token_pool)) is None:
        return None
    full, windows = result
    return full + found.tokens_per_ring, windows


def finish_step(scheduler: Any, running_batch: Any) -> None:
    """Let no step run where requests of a hybrid model may be taken back.

    With any cache SGLang copies a request to the host while its last step runs, drops the token of that step, and
    computes it again once the request is back. Pages and ring are then written once more, with equal values. A state is
    already behind the step, and would go on from there by the same token.

    Hook before ``SchedulerDisaggregationDecodeMixin.get_next_disagg_decode_batch_to_run``.
    """
    pool = rings.records_of(scheduler.token_to_kv_pool_allocator.get_kvcache())
    if pool is None or pool.states is None or not compat.runs_step(scheduler):
        return
    # SGLang keeps room for the drafts of two steps, which may begin at the end of a page
    tokens = (2 + 2 * pool.draft_tokens // PAGE_SIZE) * PAGE_SIZE
    if compat.may_retract(scheduler, running_batch, tokens):
        compat.finish_step(scheduler)


def check_senders(original: Callable[..., Any], queue: Any, waiting: dict[str, list[Any]]) -> tuple[Any, list[Any]]:
    """Fail the requests of prefill servers whose pages are others. Hook around ``_ensure_prefill_info``.

    Args:
        waiting: SGLang's DecodeRequests by the address of their prefill server.

    Returns:
        The requests that can be received now, by address, and those whose server has not answered yet.
    """
    if (pool := rings.records_of(queue.token_to_kv_pool)) is None:
        return original(queue, waiting)
    ready: dict[str, list[Any]] = {}
    remaining: list[Any] = []
    for address, requests in waiting.items():
        try:
            answered, unanswered = original(queue, {address: requests})
        except RuntimeError as error:
            # another cache; SGLang's sentence names both
            _fail(queue, address, requests, str(error))
            continue
        if answered and (difference := _difference(pool.layout, queue.kv_manager, address)):
            _fail(queue, address, requests, difference)
            # asked again by the next request, since the server may have been started anew
            del queue.kv_manager.prefill_info_table[address]
            continue
        ready |= answered
        remaining += unanswered
    return ready, remaining


def _difference(mine: dict[str, Any], kv_manager: Any, address: str) -> str | None:
    """Return the sentence about a prefill server whose pages mean something else, None for one of the same."""
    told = kv_manager.prefill_info_table[address].kv_layout
    sender = json.loads(told) if told else {}
    for part, way_out in _WAYS_OUT.items():
        if sender.get(part) != mine[part]:
            return (
                f"expected {part} {mine[part]} as on this decode server, but the prefill server {address} sends {part} "
                f"{sender.get(part)}: {way_out}"
            )
    return None


def _fail(queue: Any, address: str, requests: list[Any], why: str) -> None:
    """Fail requests before anything of them was received, on both servers where the other can be told."""
    for request in requests:
        if request.kv_receiver is None:
            continue
        rank = queue._resolve_prefill_dp_rank(request.req)
        if rank is not None:
            request.kv_receiver.init(rank)
        compat.fail_receiver(request.kv_receiver, why)
