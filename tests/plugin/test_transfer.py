# SPDX-License-Identifier: Apache-2.0
"""PD disaggregation: what a request consists of, what its transfer costs, and whose pages a server takes."""

from __future__ import annotations

import json
from collections import defaultdict, deque
from threading import Lock
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import admission, compat, fences, rings, transfer
from sglang_kvarn.rings import ATTRIBUTE

pytestmark = pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang")

PAGE, LAYERS = 128, (3, 7, 11)
ROW = 2


def make_pool(monkeypatch, preset: str = "kvarn", heads: int = 2, head_dim: int = 64, pages: int = 60):
    """Return a token pool of random bytes, layers 3, 7 and 11 of a model, and the allocator of its pages."""
    monkeypatch.setattr("sglang_kvarn.hook.verify_hooks", lambda: None)
    shape = AttentionShape(4, heads, head_dim, torch.bfloat16)
    pool = compat.resolve("sglang_kvarn.pool.KVarNTokenToKVPool")(
        pages * PAGE, shape, list(LAYERS), config=KVarNConfig.from_preset(preset), rows=4, device="cpu"
    )
    pool.slab.random_(256, generator=torch.Generator().manual_seed(1))
    compat.PagedTokenToKVPoolAllocator(
        pool.size, page_size=PAGE, dtype=torch.uint8, device="cpu", kvcache=pool, need_sort=False
    )
    return pool


@pytest.fixture
def pool(monkeypatch):
    return make_pool(monkeypatch)


def beside_windows(pool):
    """Return the token pool of a model whose layers 0 and 1 have a sliding window, and the others the records."""
    return compat.resolve("sglang_kvarn.mixed_pool.MixedPool")(pool, 8 * PAGE, [0, 1], (2, 64, 32))


@pytest.fixture(params=["records", "beside windows"])
def kvcache(request, pool):
    """Return what SGLang has for a token pool."""
    return pool if request.param == "records" else beside_windows(pool)


def give_ring(pool, row: int = ROW, start: int = 0) -> list[int]:
    """Give a row a ring, as an admitted request has; return its pages."""
    request = SimpleNamespace(prefix_len=start, kv=SimpleNamespace(req_pool_idx=row))
    assert pool.rings.assign([request])
    pool.rings.note_rows([request])
    return pool.rings.held(row).pages.tolist()


def slots_of(pages: list[int]) -> torch.Tensor:
    return (torch.tensor(pages)[:, None] * PAGE + torch.arange(PAGE)).flatten()


def queue_of(kvcache, **fields) -> SimpleNamespace:
    rows = rows_of(rings.records_of(kvcache))
    return SimpleNamespace(token_to_kv_pool=kvcache, req_to_token_pool=rows, **fields)


def rows_of(pool) -> SimpleNamespace:
    """Return SGLang's rows of requests, with the rings of a pool."""
    return SimpleNamespace(**{ATTRIBUTE: pool.rings})


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
@pytest.mark.parametrize("tokens", [1, 100, 127, 128, 129, 255, 256, 300, 383, 384, 1000])
def test_the_pages_of_a_ring_that_are_sent_are_those_that_the_next_token_reads(monkeypatch, preset, tokens):
    pool = make_pool(monkeypatch, preset)
    ring = give_ring(pool)
    sent = pool.request_state_transfer_indices(ROW, tokens)
    config, each = pool.config, pool.config.exact_tokens(64, 2)
    # by the position rule: what stands in the query's own page and in those before it
    read = [i for i in range(tokens) if i // PAGE >= tokens // PAGE - config.window_pages]
    assert sent == list(dict.fromkeys(ring[i // each % len(ring)] for i in read))


def test_rings_of_two_servers_answer_to_each_other_page_by_page(monkeypatch):
    sender, receiver = make_pool(monkeypatch), make_pool(monkeypatch, pages=50)
    give_ring(receiver, row=1)
    give_ring(sender), give_ring(receiver)
    for tokens in (300, 511, 1337):
        pairs = zip(
            sender.request_state_transfer_indices(ROW, tokens),
            receiver.request_state_transfer_indices(ROW, tokens),
            strict=True,
        )
        rings = (sender.rings.held(ROW).pages.tolist(), receiver.rings.held(ROW).pages.tolist())
        assert all(rings[0].index(mine) == rings[1].index(theirs) for mine, theirs in pairs)


def test_describe_names_records_by_layer_and_rings_as_a_state(monkeypatch, pool):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(compat, "gather_from_ranks", lambda value: [value])
    sender = compat.resolve("sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender")
    monkeypatch.setattr(sender, "supports_host_tensor_indices", True)
    addresses, sizes, items = pool.get_contiguous_buf_infos()
    for mode in ("prefill", "decode"):
        monkeypatch.setattr(compat, "published_argument", lambda name, mode=mode: mode)
        # keys and values of a draft model's layer
        for drafts in ([], [4096, 2048]):
            kv_args = empty_args(kv_item_lens=[*items, *drafts])
            transfer.describe(None, kv_args, pool, req_to_token_pool=SimpleNamespace())
            assert kv_args.kv_layer_ids == [*LAYERS, *[12, 13][: len(drafts)]]
            assert pool.layout["draft_page_bytes"] == drafts
        assert kv_args.state_layer_ids == [list(LAYERS)]
        assert (kv_args.state_data_ptrs, kv_args.state_item_lens) == ([addresses], [items])
        assert [kv_args.state_data_lens[0], kv_args.kv_cache_dtype_str] == [sizes, "kvarn"]
        # a decode server compares, and SGLang must not
        assert kv_args.kv_layout == (json.dumps(pool.layout) if mode == "prefill" else None)
    # what would take CUDA events on a CPU
    assert not sender.supports_host_tensor_indices
    assert items == [pool.slab[0, 0].nbytes] * len(LAYERS) and addresses[1] == pool.slab[1].data_ptr()


def empty_args(**fields) -> SimpleNamespace:
    names = ("types", "data_ptrs", "data_lens", "item_lens", "dim_per_tensor", "conv_shard_groups")
    lists = {f"state_{name}": [] for name in (*names, "slice_outer_counts", "layer_ids")}
    return SimpleNamespace(kv_layout=None, **lists, **fields)


def test_the_layout_holds_what_every_rank_says_of_its_channels(monkeypatch, pool):
    pool.balance_tag = lambda: "here"
    monkeypatch.setattr(compat, "gather_from_ranks", lambda value: [value, "there"])
    assert transfer.layout(pool, 2, "float32", [4096]) == {
        "preset": "kvarn_k4v2_g128",
        "record": 1,
        "dtype": "bfloat16",
        "states": "float32",
        "balance": "here-there",
        "tp_size": 2,
        "draft_page_bytes": [4096],
        "ring_pages": KVarNConfig.from_preset("kvarn").ring_pages(64, 2),
    }


# heads, channels and layers do not matter: records of 64 channels are the largest beside 16 bits
@pytest.mark.parametrize(("head_dim", "least"), [(64, 4.3), (128, 4.5), (256, 4.6)])
def test_a_page_is_so_many_times_smaller_than_what_sglang_sends_of_a_bf16_cache(monkeypatch, head_dim, least):
    pool = make_pool(monkeypatch, head_dim=head_dim, pages=4 * 24)
    plain = compat.MHATokenToKVPool(
        4 * PAGE,
        page_size=PAGE,
        dtype=torch.bfloat16,
        head_num=2,
        head_dim=head_dim,
        layer_num=len(LAYERS),
        device="cpu",
        enable_memory_saver=False,
    )
    ours, theirs = (sum(each.get_contiguous_buf_infos()[2]) for each in (pool, plain))
    assert theirs / ours > least
    # a prompt of 8,192 tokens with its ring at most
    assert theirs * 64 / (ours * (64 + pool.rings.pages.shape[1])) > least * 0.85


def sender(pool, **fields) -> SimpleNamespace:
    buffers = SimpleNamespace(cached_tokens=torch.full((4, 16), 7, dtype=torch.int32))
    return SimpleNamespace(req_to_token_pool=rows_of(pool), disagg_metadata_buffers=buffers, **fields)


def test_the_exact_start_travels_with_the_first_token_and_reaches_the_row(monkeypatch, pool):
    give_ring(pool, start=256)
    scheduler = sender(pool)
    request = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=ROW), metadata_buffer_index=3)
    numbers = scheduler.disagg_metadata_buffers.cached_tokens
    transfer.send_exact_start(scheduler, request)
    assert (numbers == 7).all(), "the first token is known with the last chunk"
    transfer.send_exact_start(scheduler, request, last_chunk=True)
    assert numbers[3].tolist() == [7] * 15 + [256] and (numbers[:3] == 7).all()

    receiver = make_pool(monkeypatch)
    give_ring(receiver, row=1)
    queue = SimpleNamespace(
        scheduler=SimpleNamespace(req_to_token_pool=rows_of(receiver)),
        metadata_buffers=SimpleNamespace(cached_tokens=numbers),
    )
    received = SimpleNamespace(req=SimpleNamespace(kv=SimpleNamespace(req_pool_idx=1)), metadata_buffer_index=3)
    transfer.take_exact_start(queue, received)
    assert receiver.rings.held(1).exact_start == 256 and receiver.rings.exact_starts[1] == 256
    # a request without a sender, as the check of a server's health is, begins at 0
    transfer.take_exact_start(queue, received)
    assert receiver.rings.held(1).exact_start == 0 and receiver.rings.exact_starts[1] == 0


def test_the_exact_start_is_in_its_place_before_sglang_sends_the_first_token(pool):
    seen = []

    class Scheduler(compat.resolve("sglang.srt.disaggregation.prefill.SchedulerDisaggregationPrefillMixin")):
        kv_checksum_computer = None

        def _send_kv_chunk(self, req, last_chunk=False, end_idx=None) -> None:
            numbers = self.disagg_metadata_buffers.cached_tokens[req.metadata_buffer_index]
            seen.append((last_chunk, int(numbers[transfer.EXACT_START])))

    give_ring(pool, start=256)
    scheduler = Scheduler()
    vars(scheduler).update(vars(sender(pool)))
    request = SimpleNamespace(kv=SimpleNamespace(req_pool_idx=ROW), metadata_buffer_index=3)
    scheduler.send_kv_chunk(request)
    scheduler.send_kv_chunk(request, last_chunk=True)
    assert seen == [(False, 7), (True, 256)]


class Reached(Exception):
    """SGLang has come to where it does what a hook comes before."""


def reach(*args) -> None:
    raise Reached


def test_the_exact_start_is_taken_before_sglang_takes_the_first_token(pool):
    give_ring(pool)
    numbers = torch.full((4, 16), 128, dtype=torch.int32)
    queue = object.__new__(compat.resolve("sglang.srt.disaggregation.decode.DecodeTransferQueue"))
    queue.scheduler = SimpleNamespace(req_to_token_pool=rows_of(pool), kv_checksum_computer=None)
    queue.metadata_buffers = SimpleNamespace(cached_tokens=numbers, get_buf=reach)
    received = SimpleNamespace(req=SimpleNamespace(kv=SimpleNamespace(req_pool_idx=ROW)), metadata_buffer_index=3)
    with pytest.raises(Reached):
        queue._commit_transfer_to_req(received)
    assert pool.rings.held(ROW).exact_start == 128


def preallocation(pool, **fields):
    """Return SGLang's queue of requests that are to be received, as far as our hooks read it."""
    queue = object.__new__(compat.resolve("sglang.srt.disaggregation.decode.DecodePreallocQueue"))
    vars(queue).update(vars(queue_of(pool)) | {"token_to_kv_pool_allocator": pool.rings.allocator} | fields)
    return queue


def test_sglang_waits_for_steps_before_it_tells_a_sender_of_pages(pool):
    told = []
    pool.slab = SimpleNamespace(is_cuda=True)
    pool.forward_stream = SimpleNamespace(synchronize=lambda: told.append("waited"))
    queue = preallocation(pool, req_to_metadata_buffer_idx_allocator=SimpleNamespace(alloc=reach))
    with pytest.raises(Reached):
        queue._send_kv_metadata(SimpleNamespace(), None, PAGE)
    assert told == ["waited"]


def test_sglang_counts_a_ring_beside_the_tokens_of_a_request_that_comes_or_comes_back(monkeypatch, pool):
    memory = SimpleNamespace(disable_radix_cache=True)
    monkeypatch.setattr("sglang.srt.disaggregation.decode.get_memory", lambda: memory)
    queue, ring = preallocation(pool, num_reserved_decode_tokens=128), pool.rings.tokens_per_ring
    request = SimpleNamespace(
        origin_input_ids=[0] * 300, output_ids=[0] * 50, sampling_params=SimpleNamespace(max_new_tokens=1000)
    )
    assert queue._required_admission_tokens(request, 384, 0, 0) == 1300 + ring
    assert queue._required_admission_tokens(request, 384, 0, 1200) == 384 + 128 + ring
    # whole pages of 349 tokens, the last one of which is not yet computed
    assert queue._prealloc_required_tokens(request) == (384 + 128 + ring, 384)


def test_sglang_leaves_the_number_of_the_exact_start_alone():
    buffers = compat.resolve("sglang.srt.disaggregation.utils.MetadataBuffers")(
        size=2, hidden_size=16, hidden_states_dtype=torch.float32, max_sampling_mask_tokens=1
    )
    request = SimpleNamespace(metadata_buffer_index=1, output_ids=[5], return_logprob=False, return_sampling_mask=False)
    request.cached_tokens, request.cached_tokens_device = 256, 128
    request.cached_tokens_host, request.cached_tokens_storage = 64, 32
    request.hidden_states_tensor, request.bootstrap_room = None, 9
    request.get_mm_token_counts = lambda: (1, 2, 3)
    buffers.cached_tokens[1][transfer.EXACT_START] = 384
    buffers.set_buf(request)
    assert buffers.cached_tokens[1].tolist() == [256, 128, 64, 32, 1, 2, 3, *[0] * 8, 384]


def test_a_request_is_received_where_there_is_room_for_its_ring_too(pool, kvcache):
    queue = queue_of(kvcache)
    assert transfer.charge_ring(640, queue) == 640 + pool.rings.tokens_per_ring
    assert transfer.charge_ring_of_retracted((640, 512), queue, None) == (640 + pool.rings.tokens_per_ring, 512)


@pytest.mark.parametrize(("mode", "less"), [("prefill", 0), ("decode", 512)])
def test_a_decode_server_takes_no_prompt_that_never_fits_beside_what_it_reserves(monkeypatch, pool, mode, less):
    monkeypatch.setattr(compat, "published_argument", lambda name: mode)
    monkeypatch.setattr(compat, "scheduler_argument", lambda args, name: 512)
    monkeypatch.setattr(compat, "draft_tokens", lambda args: 1)
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(get_memory_pool=lambda: (rows_of(pool), None)),
        server_args=None,
        max_total_num_tokens=pool.size,
        max_req_len=pool.size,
        max_req_input_len=pool.size,
    )
    admission.limit_lengths(None, scheduler)
    longest = pool.size - pool.rings.tokens_per_ring - PAGE - 1
    assert (scheduler.max_req_len, scheduler.max_req_input_len) == (longest, longest - less)


def test_a_sender_hears_of_pages_after_the_steps_of_their_last_owner(pool, kvcache):
    told = []
    slab, pool.slab = pool.slab, SimpleNamespace(is_cuda=True)
    pool.forward_stream = SimpleNamespace(synchronize=lambda: told.append("waited"))
    fences.before_receiving(queue_of(kvcache), None, None, PAGE)
    assert told == ["waited"]
    pool.slab = slab
    fences.before_receiving(queue_of(kvcache), None, None, PAGE)
    assert told == ["waited"], "a CPU has no streams"


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
@pytest.mark.parametrize("tokens", [5, 128, 300, 384])
def test_a_retracted_request_comes_back_with_records_ring_and_exact_start(monkeypatch, preset, tokens):
    pool = make_pool(monkeypatch, preset)
    start = tokens // PAGE // 2 * PAGE
    give_ring(pool, start=start)
    pages = [33, 5, 41, 2][: -(-tokens // PAGE)]
    slots = slots_of(pages)[:tokens]
    before, sent = pool.slab.clone(), pool.request_state_transfer_indices(ROW, tokens)
    saved = pool.get_cpu_copy(slots, mamba_indices=None, req_pool_index=ROW)
    pool.rings.free_row(ROW)
    # everything goes to others
    pool.slab.random_(256)
    give_ring(pool, row=3)
    give_ring(pool, row=1)
    again = [50, 3, 17, 9][: len(pages)]
    slots = slots_of(again)[:tokens]
    pool.load_cpu_copy(saved, slots, mamba_indices=None, req_pool_index=1)
    full = tokens // PAGE
    assert torch.equal(pool.slab[:, again[:full]], before[:, pages[:full]])
    ring = pool.request_state_transfer_indices(1, tokens)
    assert torch.equal(pool.slab[:, ring], before[:, sent]) and pool.rings.exact_starts[1] == start


CONN = "sglang.srt.disaggregation.common.conn"


def make_manager():
    """Return SGLang's manager of transfers of a decode server, without its threads and its connections."""
    manager = object.__new__(compat.resolve("sglang.srt.disaggregation.mooncake.conn.MooncakeKVManager"))
    tables = ("prefill_info_table", "request_status", "failure_records", "prefill_response_tracker")
    vars(manager).update({name: {} for name in (*tables, "required_prefill_response_num_table")})
    vars(manager).update({name: {} for name in ("_deferred_ack_targets", "_staging_outstanding")})
    vars(manager).update(addr_to_rooms_tracker=defaultdict(set), _deferred_ack_poisoned_rooms=set())
    vars(manager).update(failure_lock=Lock(), deferred_bootstrap=None)
    vars(manager).update(defer_decode_allocation=False, enable_staging=False)
    return manager


def make_receiver(manager, room: int):
    """Return SGLang's receiver of a request, which notes what its sender is told instead of telling it."""

    class Receiver(compat.resolve("sglang.srt.disaggregation.mooncake.conn.MooncakeKVReceiver")):
        told = ()

        def _setup_bootstrap_infos(self) -> None:
            self.bootstrap_infos = [{"rank": self.prefill_dp_rank}]

        def _send_abort_notification(self, **options) -> None:
            self.told = (*self.told, *self.bootstrap_infos)

    return Receiver(manager, "host:1", room)


LAYOUT = {"preset": "kvarn_k4v2_g128", "record": 1, "dtype": "bfloat16", "balance": "0123456789ab", "tp_size": 1}
LAYOUT |= {"draft_page_bytes": [4096], "ring_pages": 10}
DRAFTS = "start both servers with the same --speculative-algorithm, draft model and number of drafts"
LAYOUT |= {"states": "float32-bfloat16"}
OTHERS = [
    ("preset", "kvarn_k4v4_g128", "start both servers with the same --kv-cache-dtype"),
    ("preset", "kvarn_k4v2_g128_canonical", "start both servers with the same --kv-cache-dtype"),
    ("record", 2, "run the same version of sglang-kvarn on both servers"),
    ("dtype", "float16", "start both servers with the same --dtype"),
    (
        "states",
        "bfloat16-bfloat16",
        "start both servers with the same --mamba-ssm-dtype and SGLANG_MAMBA_CONV_DTYPE",
    ),
    ("states", None, "start both servers with the same --mamba-ssm-dtype and SGLANG_MAMBA_CONV_DTYPE"),
    ("balance", "e3b0c44298fc", "start both servers with the same weights and the same KVARN_BALANCE"),
    ("tp_size", 2, "start both servers with the same --tp-size"),
    ("draft_page_bytes", [], DRAFTS),
    ("ring_pages", 11, DRAFTS),
]


@pytest.fixture
def receive(monkeypatch, pool, kvcache):
    """Let two requests ask for pages of a server that tells this of them; return what came of it."""
    early = SimpleNamespace(disaggregation_decode_allocation_policy="early")
    monkeypatch.setattr(f"{CONN}.get_disagg", lambda: early)
    pool.layout = LAYOUT

    def receive(told: str | None, answer=lambda addr_to_reqs: (addr_to_reqs, [])):
        manager = make_manager()
        waiting = {"host:1": [SimpleNamespace(req=None, kv_receiver=make_receiver(manager, room)) for room in (8, 9)]}

        def rank_of(req) -> int | None:
            return 0 if "host:1" in manager.prefill_info_table else None

        def original(given, addr_to_reqs):
            assert given is queue
            ready, remaining = answer(addr_to_reqs)
            if ready:
                info = compat.resolve(f"{CONN}.PrefillServerInfo")(1, 1, 1, 1, PAGE, "kvarn", True, kv_layout=told)
                manager.prefill_info_table["host:1"] = info
            return ready, remaining

        queue = queue_of(kvcache, kv_manager=manager, _resolve_prefill_dp_rank=rank_of)
        return transfer.check_senders(original, queue, waiting), waiting, manager

    return receive


def failures(waiting: dict, manager) -> list[str]:
    """Return what the scheduler answers each request, all of which are to have failed."""
    found = []
    for request in waiting["host:1"]:
        receiver = request.kv_receiver
        states = (receiver.poll(), manager.check_status(receiver.bootstrap_room))
        assert states == (compat.resolve("sglang.srt.disaggregation.base.conn.KVPoll").Failed,) * 2
        with pytest.raises(compat.resolve(f"{CONN}.KVTransferError")) as caught:
            receiver.failure_exception()
        found.append(str(caught.value))
    return found


def test_pages_of_a_server_with_the_same_layout_are_taken(receive):
    (ready, remaining), waiting, manager = receive(json.dumps(LAYOUT))
    assert (ready, remaining) == (waiting, []) and not manager.failure_records
    assert "host:1" in manager.prefill_info_table


@pytest.mark.parametrize(("part", "value", "way_out"), OTHERS, ids=[f"{part} {value}" for part, value, _ in OTHERS])
def test_pages_of_a_server_with_another_layout_fail_the_request_with_one_sentence(receive, part, value, way_out):
    (ready, remaining), waiting, manager = receive(json.dumps(LAYOUT | {part: value}))
    assert (ready, remaining) == ({}, [])
    for why in failures(waiting, manager):
        assert why.endswith(f": {way_out}") and str(value) in why and str(LAYOUT[part]) in why and "host:1" in why
    # the prefill server hears of it
    assert [request.kv_receiver.told for request in waiting["host:1"]] == [({"rank": 0},)] * 2
    # nothing of the server is kept, so that the next request asks again
    assert manager.prefill_info_table == {}


def test_other_ranks_are_named_although_their_balance_differs_too(receive):
    of_two = {"tp_size": 2, "balance": "-".join([LAYOUT["balance"]] * 2)}
    _, waiting, manager = receive(json.dumps(LAYOUT | of_two))
    assert all(why.endswith("the same --tp-size") for why in failures(waiting, manager))


def test_a_server_that_tells_no_layout_is_another(receive):
    (ready, _), waiting, manager = receive(None)
    assert not ready and all("sends preset None" in why for why in failures(waiting, manager))


def test_what_sglang_finds_different_fails_the_request_and_not_the_server(receive):
    def differs(addr_to_reqs):
        raise RuntimeError("KV cache dtype mismatch: prefill server has kv_cache_dtype=auto")

    (ready, remaining), waiting, manager = receive(None, differs)
    assert (ready, remaining) == ({}, [])
    assert all("kv_cache_dtype=auto" in why for why in failures(waiting, manager))


def test_a_request_whose_client_is_gone_does_not_keep_the_others_from_failing(receive):
    def forget_first(addr_to_reqs):
        addr_to_reqs["host:1"][0].kv_receiver = None
        return addr_to_reqs, []

    _, waiting, manager = receive(None, forget_first)
    del waiting["host:1"][0]
    assert len(failures(waiting, manager)) == 1


def test_a_server_that_has_not_answered_yet_is_waited_for(receive):
    (ready, remaining), waiting, manager = receive(None, lambda given: ({}, given["host:1"]))
    assert (ready, remaining) == ({}, waiting["host:1"]) and not manager.failure_records


def decode_rows(**states):
    """Return SGLang's rows of a decode server, three of them; with states of a hybrid model where some are given."""
    name = "HybridMambaDecodeReqToTokenPool" if states else "DecodeReqToTokenPool"
    return compat.resolve(f"sglang.srt.disaggregation.decode.{name}")(
        size=1, max_context_len=512, device="cpu", enable_memory_saver=False, pre_alloc_size=2, **states
    )


def states_of(temporal: torch.dtype, conv: torch.dtype) -> dict:
    """Return what SGLang's rows are told of states: two layers, one number each, and one slot of them."""
    utils = "sglang.srt.configs.mamba_utils"
    sizes = ("intermediate_size", "conv_dim", "ssm_state_size", "num_heads", "head_dim", "state_size")
    shape = {"conv": [(1, 1)], "temporal": (1, 1, 1), "conv_kernel": 2, **dict.fromkeys(sizes, 1)}
    params = compat.resolve(f"{utils}.Mamba2CacheParams")(
        shape=compat.resolve(f"{utils}.Mamba2StateShape")(**shape),
        dtype=compat.resolve(f"{utils}.Mamba2StateDType")(conv=conv, temporal=temporal),
        layers=[0, 2],
    )
    off = {"speculative_num_draft_tokens": None, "enable_mamba_extra_buffer": False, "enable_overlap_schedule": True}
    return {"cache_params": params, "mamba_layer_ids": [0, 2], "mamba_size": 1, **off}


@pytest.mark.parametrize("with_states", [False, True], ids=["tokens", "states"])
def test_rows_of_a_decode_server_have_rings(pool, with_states):
    rows = decode_rows(**states_of(torch.float32, torch.bfloat16) if with_states else {})
    setattr(rows, ATTRIBUTE, pool.rings)
    before = pool.rings.allocator.available_size()
    kv = compat.resolve("sglang.srt.managers.schedule_batch.ReqKvInfo")
    requests = [SimpleNamespace(prefix_len=0, inflight_middle_chunks=0, kv=kv()) for _ in range(3)]
    assert len(rows.alloc(requests)) == 3 and pool.rings.out == 3
    assert before - pool.rings.allocator.available_size() == 3 * pool.rings.tokens_per_ring
    rows.free(requests[0])
    assert pool.rings.out == 2
    rows.clear()
    assert pool.rings.out == 0 and rings.of_pool(rows) is pool.rings


def test_the_layout_names_the_dtypes_of_states_and_sglang_sends_their_slots(monkeypatch, pool):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(compat, "gather_from_ranks", lambda value: [value])
    monkeypatch.setattr(compat, "published_argument", lambda name: "prefill")
    rows = decode_rows(**states_of(torch.float32, torch.bfloat16))
    kv_args = empty_args(kv_item_lens=pool.get_contiguous_buf_infos()[2])
    compat.resolve("sglang.srt.disaggregation.utils.setup_state_kv_args")(kv_args, pool, req_to_token_pool=rows)
    kinds = compat.resolve("sglang.srt.disaggregation.base.conn.StateType")
    # each once: the convolution and the state proper of two layers, then rings
    assert kv_args.state_types == [kinds.MAMBA, kinds.DSV4_REQUEST_STATE]
    assert kv_args.state_item_lens == [[2, 2, 4, 4], pool.get_contiguous_buf_infos()[2]]
    assert json.loads(kv_args.kv_layout)["states"] == "float32-bfloat16"
    # a state for each row, in transfer or not, whatever was counted
    assert compat.states_made(rows) == 3 and compat.states_made(decode_rows()) is None


def test_sglang_sends_windows_beside_records_and_rings(monkeypatch, pool):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1))
    monkeypatch.setattr(compat, "gather_from_ranks", lambda value: [value])
    monkeypatch.setattr(compat, "published_argument", lambda name: "prefill")
    kvcache, items = beside_windows(pool), pool.get_contiguous_buf_infos()[2]
    assert kvcache.get_contiguous_buf_infos() == pool.get_contiguous_buf_infos()
    kv_args = empty_args(kv_item_lens=items)
    setup = compat.resolve("sglang.srt.disaggregation.utils.setup_state_kv_args")
    setup(kv_args, kvcache, req_to_token_pool=decode_rows())
    kinds = compat.resolve("sglang.srt.disaggregation.base.conn.StateType")
    # keys and values of two layers, of two heads with 64 and 32 channels in 16 bits
    windows = [PAGE * 2 * channels * 2 for channels in (64, 64, 32, 32)]
    assert (kv_args.state_types, kv_args.state_item_lens) == (
        [kinds.SWA, kinds.DSV4_REQUEST_STATE],
        [windows, items],
    )
    # SGLang takes one half of the windows for keys, as it has no layers for them
    assert (kv_args.state_layer_ids, kv_args.kv_layer_ids) == ([[], list(LAYERS)], list(LAYERS))
    assert json.loads(kv_args.kv_layout) == pool.layout
    # both servers name the pages of the ring through it
    give_ring(pool)
    sent = kvcache.request_state_transfer_indices(ROW, 300)
    assert sent and sent == pool.request_state_transfer_indices(ROW, 300)


# tokens; those of them that have windows when the request is taken back, and when it returns: SGLang gives room to less
@pytest.mark.parametrize(("tokens", "kept", "wanted"), [(100, 100, 100), (300, 172, 172), (300, 172, 44)])
def test_a_retracted_request_comes_back_with_its_windows(pool, tokens, kept, wanted):
    kvcache, table = beside_windows(pool), torch.zeros(pool.size + PAGE, dtype=torch.int64)
    kvcache.register_mapping(table)
    windows = [*kvcache.swa_kv_pool.k_buffer, *kvcache.swa_kv_pool.v_buffer]
    for buffer in windows:
        buffer.normal_()
    give_ring(pool, start=PAGE)
    slots, full = slots_of([33, 5, 41])[:tokens], tokens // PAGE
    table[slots[-kept:]] = slots_of([6, 3])[:kept]
    records, ring = pool.slab[:, [33, 5][:full]].clone(), pool.request_state_transfer_indices(ROW, tokens)
    held, exact = [buffer[table[slots[-wanted:]]] for buffer in windows], pool.slab[:, ring].clone()
    saved = kvcache.get_cpu_copy(slots, req_pool_index=ROW)
    # everything goes to others
    pool.slab.random_(256)
    for buffer in windows:
        buffer.zero_()
    table.zero_()
    give_ring(pool, row=1)
    slots = slots_of([9, 7, 2])[:tokens]
    table[slots[-wanted:]] = slots_of([4, 1])[:wanted]
    kvcache.load_cpu_copy(saved, slots, req_pool_index=1)
    found = [buffer[table[slots[-wanted:]]] for buffer in windows]
    assert all(torch.equal(x, y) for x, y in zip(found, held, strict=True))
    assert torch.equal(pool.slab[:, [9, 7][:full]], records)
    assert torch.equal(pool.slab[:, pool.request_state_transfer_indices(1, tokens)], exact)
    assert pool.rings.exact_starts[1] == PAGE


@pytest.fixture
def retracting(pool):
    """Return SGLang's scheduler of a decode server at a step that finds no memory, and what happens in order."""
    pool.states, told = object(), []
    scheduler = object.__new__(compat.resolve("sglang.srt.managers.scheduler.Scheduler"))
    vars(scheduler).update(
        token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=lambda: pool, available_size=lambda: 8 * PAGE - 1),
        scheduler_stage_metrics=None,
        enable_overlap=True,
        last_batch="last",
        result_queue=deque([("last", "its result")]),
        forward_ct=1,
        waiting_queue=["a request that was received"],
        process_batch_result=lambda batch, result: told.append((batch, result)),
        get_new_prebuilt_batch=lambda batch: told.append("next"),
        dp_attn_adapter=SimpleNamespace(maybe_prepare_mlp_sync_batch=lambda batch: batch),
    )
    # three requests, all of which have ended, so that SGLang goes no further
    return scheduler, SimpleNamespace(batch_size=lambda: 3, is_empty=lambda: True), told


def test_the_last_step_of_a_request_with_a_state_ends_before_the_request_is_taken_back(retracting):
    scheduler, batch, told = retracting
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    # the result counts before SGLang looks who runs next
    assert told == [("last", "its result"), "next"]
    # so that nobody asks for the result again
    assert scheduler.last_batch is None and not scheduler.result_queue
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told[2:] == ["next"]


def test_the_last_step_ends_before_a_request_is_taken_back_for_a_test(retracting, monkeypatch):
    scheduler, batch, told = retracting
    scheduler.token_to_kv_pool_allocator.available_size = lambda: 8 * PAGE
    monkeypatch.setattr("sglang.srt.managers.scheduler.TEST_RETRACT", True)
    monkeypatch.setattr("sglang.srt.managers.scheduler.TEST_RETRACT_INTERVAL", 2)
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told == ["next"]
    scheduler.forward_ct = 2
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told[1:] == [("last", "its result"), "next"]


@pytest.mark.parametrize(("drafts", "pages"), [(1, 8), (4, 8), (63, 8), (64, 12), (126, 12)])
def test_a_step_that_may_take_so_many_pages_waits_for_the_last_one(retracting, pool, drafts, pages):
    scheduler, batch, told = retracting
    pool.draft_tokens = drafts
    scheduler.token_to_kv_pool_allocator.available_size = lambda: pages * PAGE
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told == ["next"]
    scheduler.token_to_kv_pool_allocator.available_size = lambda: pages * PAGE - 1
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told[1:] == [("last", "its result"), "next"]


@pytest.mark.parametrize("case", ["no overlap", "no states"])
def test_steps_overlap_where_no_state_is_taken_back(retracting, pool, case):
    scheduler, batch, told = retracting
    if case == "no overlap":
        scheduler.enable_overlap = False
    else:
        pool.states = None
    scheduler.get_next_disagg_decode_batch_to_run(batch)
    assert told == ["next"] and scheduler.last_batch == "last"
