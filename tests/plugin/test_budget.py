# SPDX-License-Identifier: Apache-2.0
"""Capacity adds up: what the hooks charge is what the pool allocates."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.batch import Limits
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import budget, capacity, compat, hook
from sglang_kvarn.refused import Refused

QWEN3_8B = capacity.ModelShape(36, AttentionShape(32, 8, 128, torch.bfloat16))
MIB, GIB = 1 << 20, 1 << 30


def configurator(preset: str, tp_size: int = 1, requested: int | None = 4, **changes):
    """Return what the hooks read of SGLang's KVCacheConfigurator, for 2 layers of 4 query and 2 KV heads."""
    args = SimpleNamespace(
        kv_cache_dtype=preset,
        max_running_requests=requested,
        chunked_prefill_size=256,
        cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="disabled", max_bs=None)),
        speculative_algorithm=None,
    )
    model = SimpleNamespace(
        get_num_kv_heads=lambda size: max(1, 2 // size),
        num_attention_heads=4,
        head_dim=64,
        context_len=4096,
        is_hybrid_swa=False,
        hf_text_config=SimpleNamespace(),
    )
    return SimpleNamespace(
        is_draft_worker=False,
        server_args=args,
        model_config=model,
        model_dtype=torch.float16,
        device="cpu",
        layer_info=SimpleNamespace(start_layer=0, end_layer=2),
        **changes,
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """One rank, whose arguments stand for the configuration of its process."""
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dp_size=1), raising=False)
    monkeypatch.setattr(compat, "hybrid_config", lambda model: None)
    monkeypatch.setattr(compat, "scheduler_argument", getattr)
    monkeypatch.setattr(compat, "override_argument", lambda args, **changes: vars(args).update(changes))


def test_workspaces_hold_a_plan_for_each_sliding_window_in_records():
    kvc = configurator("kvarn")
    without, config = budget.model_shape(kvc), KVarNConfig.from_preset("kvarn")
    kvc.model_config.hf_text_config = SimpleNamespace(layer_types=["sliding_attention"] * 2, sliding_window=512)
    shape, limits, cuda = budget.model_shape(kvc), Limits(4, 33, 4, 3), torch.device("cuda")
    assert (without.sliding_windows, shape.sliding_windows) == ((), (512,))
    sizes = [capacity.workspace_bytes(each, config, cuda, limits, H100) for each in (without, shape)]
    assert sizes[1] > sizes[0] and capacity.workspace_bytes(shape, config, torch.device("cpu"), limits) == 0


def test_model_shape_gives_the_documented_bytes():
    config = KVarNConfig.from_preset("kvarn")
    assert QWEN3_8B.token_bytes(config) == 32_256
    assert QWEN3_8B.full_token_bytes(2) == 147_456


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_model_shape_counts_the_heads_of_one_rank(monkeypatch, tp_size):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=tp_size), raising=False)
    shape = budget.model_shape(configurator("kvarn")).attention
    assert (shape.num_kv_heads, shape.num_qo_heads) == (max(1, 2 // tp_size), 4 // tp_size)


BOUNDS = capacity.Bounds(requests=None, graph_batch=256, context_len=40_960, chunk_len=8192)
CUDA = torch.device("cuda")


def test_charge_takes_as_many_requests_as_stock_sglang_while_workspaces_are_small():
    charge = capacity.charge(QWEN3_8B, KVarNConfig.from_preset("kvarn"), 50 * GIB, BOUNDS, CUDA, H100)
    assert charge.rows == capacity.MAX_ROWS == 4096 and charge.workspace <= 0.02 * 50 * GIB
    # with a fixed order of sums every request has workspaces for its longest context
    fixed = KVarNConfig.from_preset("kvarn_canonical")
    charge = capacity.charge(QWEN3_8B, fixed, 50 * GIB, BOUNDS, CUDA, H100)
    assert 256 <= charge.rows < 4096 and charge.workspace <= 0.02 * 50 * GIB
    larger = BOUNDS.steps(2 * charge.rows, 321)
    assert capacity.workspace_bytes(QWEN3_8B, fixed, CUDA, larger, H100) > 0.02 * 50 * GIB


def test_charge_takes_the_users_word_and_never_fewer_than_decode_graphs():
    config = KVarNConfig.from_preset("kvarn_canonical")
    asked = dataclasses.replace(BOUNDS, requests=3000)
    assert capacity.charge(QWEN3_8B, config, 50 * GIB, asked, CUDA, H100).rows == 3000
    assert capacity.charge(QWEN3_8B, config, 4 * GIB, BOUNDS, CUDA, H100).rows == 256


def test_charge_takes_workspaces_for_every_attention_backend():
    config = KVarNConfig.from_preset("kvarn")
    one = dataclasses.replace(BOUNDS, requests=48, draft_tokens=4)
    three = dataclasses.replace(one, backends=3)
    taken = [capacity.charge(QWEN3_8B, config, 50 * GIB, bounds, CUDA, H100).workspace for bounds in (one, three)]
    assert taken[1] == 3 * taken[0] > 0
    # where nobody chose their number, requests make room for the workspaces
    charge = capacity.charge(QWEN3_8B, config, 50 * GIB, dataclasses.replace(three, requests=None), CUDA, H100)
    assert 256 <= charge.rows < 4096 and charge.workspace <= 0.02 * 50 * GIB


def test_a_ring_takes_ten_pages_of_an_8b_model():
    pages = capacity.ring_pages(QWEN3_8B.attention, KVarNConfig.from_preset("kvarn"))
    assert pages == 10 and capacity.ring_pages(QWEN3_8B.attention, KVarNConfig.from_preset("kvarn_canonical")) == 5


def test_requests_of_counts_whole_pages_and_rings():
    # 1,024 tokens and a ring of 1,280: 2,304 each
    assert capacity.requests_of(10 * 2304 + 128, 1280, 1024, 4096) == 10
    assert capacity.requests_of(10 * 2304 + 127, 1280, 1024, 4096) == 9
    assert capacity.requests_of(10 * 2304 + 128, 1280, 1000, 4096) == 10
    assert capacity.requests_of(10**6, 1280, 1024, 7) == 7 and capacity.requests_of(0, 1280, 1024, 7) == 0
    text = capacity.describe_requests(1_404_800, 1280, 4096)
    assert text == "609 requests of 1,024 tokens run at a time, or 148 of 8,192, or 41 of 32,768"


@pytest.mark.parametrize("preset", preset_names())
def test_cell_size_is_the_record_bytes_and_stock_for_other_caches(preset):
    def original(self, kvc, num_layers):
        return -1

    kvc = configurator(preset)
    expected = 2 * 2 * KVarNConfig.from_preset(preset).bytes_per_token(64)
    assert budget.cell_size(original, None, kvc, 2) == expected
    kvc.server_args.kv_cache_dtype = "auto"
    assert budget.cell_size(original, None, kvc, 2) == -1
    kvc.server_args.kv_cache_dtype, kvc.is_draft_worker = preset, True
    assert budget.cell_size(original, None, kvc, 2) == -1


def test_charge_fixed_bytes_fixes_the_requests_when_the_user_does_not():
    kvc = configurator("kvarn", requested=None)
    # the torch form has no workspaces
    assert budget.charge_fixed_bytes(GIB, kvc, 0) == GIB
    rows = kvc.server_args.max_running_requests
    assert rows == capacity.MAX_ROWS
    assert budget.cap_rows(10**5, kvc, 10**6) == rows
    assert budget.cap_rows(3, kvc, 6) == 3


def test_the_requests_of_all_ranks_are_counted_where_each_has_its_own(monkeypatch):
    ranks = SimpleNamespace(attn_tp_size=1, attn_dp_size=2)
    monkeypatch.setattr(compat, "get_parallel", lambda: ranks, raising=False)
    kvc = configurator("kvarn", requested=None)
    assert budget.charge_fixed_bytes(GIB, kvc, 0) == GIB
    assert kvc.server_args.max_running_requests == 2 * capacity.MAX_ROWS
    assert budget.cap_rows(10**5, kvc, 10**6) == capacity.MAX_ROWS
    assert budget.bounds(configurator("kvarn", requested=9).server_args, 4096).requests == 4
    assert budget.bounds(configurator("kvarn", requested=1).server_args, 4096).requests == 1


@pytest.mark.parametrize(("requests", "decode_batch"), [(3, 4), (4, 5), (5, 8), (9, 12)])
def test_a_decode_step_has_room_for_the_requests_that_ranks_pad_it_to(monkeypatch, requests, decode_batch):
    # with DP attention SGLang pads it to a multiple of the ranks that share the heads of a request
    ranks = SimpleNamespace(attn_tp_size=4, attn_dp_size=2)
    monkeypatch.setattr(compat, "get_parallel", lambda: ranks, raising=False)
    found = budget.bounds(configurator("kvarn", requested=2 * requests).server_args, 4096)
    assert found.steps(found.requests, 33).decode_batch == decode_batch


def test_charge_fixed_bytes_refuses_a_pool_without_room_for_a_ring_and_a_request():
    kvc = configurator("kvarn", requested=4)
    shape, config = budget.model_shape(kvc), KVarNConfig.from_preset("kvarn")
    pages = (capacity.ring_pages(shape.attention, config) + 3) * 128 * shape.token_bytes(config)
    assert budget.charge_fixed_bytes(pages, kvc, 0) == pages
    with pytest.raises(Refused, match=r"for a pool of 12 pages.*: lower --max-running-requests or raise"):
        budget.charge_fixed_bytes(pages - 1, kvc, 0)


def test_check_pool_says_how_many_tokens_it_takes():
    shape, config = budget.model_shape(configurator("kvarn")), KVarNConfig.from_preset("kvarn")
    capacity.check_pool(12 * 128, shape, config, 1)
    with pytest.raises(Refused, match=r"a pool of at least 1,536 tokens, not 1,408, because .* in 9 pages of the pool"):
        capacity.check_pool(11 * 128, shape, config, 1)
    # drafts can be more than the last page of a ring has room for
    with pytest.raises(Refused, match="in 10 pages of the pool"):
        capacity.check_pool(12 * 128, shape, config, 20)


def test_charge_fixed_bytes_charges_the_workspace_of_the_kernels(monkeypatch):
    from kvarn_kernels.device.gpu import NO_GPU
    from kvarn_kernels.read import decode, decode_plan

    monkeypatch.setenv("KVARN_CPU_FORM", "triton")
    kvc = configurator("kvarn", requested=4)
    left = budget.charge_fixed_bytes(GIB, kvc, 0)
    shape, config = budget.model_shape(kvc).attention, KVarNConfig.from_preset("kvarn")
    resident = decode.resident_programs(NO_GPU)
    made = decode_plan.make_workspace(shape, config, torch.device("cpu"), 5, 33, resident)
    tensors = [x for x in vars(made).values() if isinstance(x, torch.Tensor)]
    assert GIB - left == sum(t.nbytes for t in tensors) > 0


def test_charge_fixed_bytes_charges_the_workspace_of_prefill(monkeypatch):
    from kvarn_kernels.attention import Kernels
    from kvarn_kernels.dense import extend_dense

    dense = Kernels("torch", "torch", "torch", dense="flashinfer")
    monkeypatch.setattr("kvarn_kernels.attention.choose_kernels", lambda *args: dense)
    kvc = configurator("kvarn", requested=4)
    left = budget.charge_fixed_bytes(GIB, kvc, 0)
    # 5 rows of 33 pages, exact and as records; a request reads those of its chunk and two more twice
    pages = 5 * 66 * 2 * 128 * 2 * 64 * 2
    charged = extend_dense.workspace_bytes(budget.model_shape(kvc).attention, 5 * 66, 33 + 4, "flashinfer", H100)
    assert GIB - left == charged == pages + 2 * extend_dense.LIBRARIES["flashinfer"].call_bytes


@pytest.mark.parametrize(("size", "pages"), [(256, 2), (10**6, 32), (-1, 32), (None, 32)])
def test_a_chunk_is_at_most_a_context(size, pages, monkeypatch):
    graph = SimpleNamespace(decode=SimpleNamespace(backend="disabled"))
    args = SimpleNamespace(chunked_prefill_size=size, cuda_graph_config=graph, speculative_algorithm=None)
    monkeypatch.setattr(compat, "scheduler_argument", lambda args, name: None)
    limits = budget.bounds(args, 4096).steps(rows=8, request_pages=33)
    assert limits.chunk_pages == pages
    assert limits.decode_batch == limits.extend_requests == 9 and limits.extend_pages == 9 * 2 * 33


@pytest.mark.parametrize("drafts", [1, 4])
@pytest.mark.parametrize("graph_rows", [None, 3, 64])
def test_decode_batch_covers_rows_padded_graphs_and_drafts(graph_rows, drafts, monkeypatch):
    monkeypatch.setattr(compat, "scheduler_argument", lambda args, name: None)
    monkeypatch.setattr(compat, "draft_tokens", lambda args: drafts)
    graph = SimpleNamespace(backend="full", max_bs=graph_rows)
    monkeypatch.setattr(compat, "attention_backends", lambda args: 3)
    args = SimpleNamespace(chunked_prefill_size=256, cuda_graph_config=SimpleNamespace(decode=graph))
    bounds = budget.bounds(args, 4096)
    limits = bounds.steps(8, 33)
    assert limits.decode_batch == max(9, graph_rows or 0) * drafts and limits.draft_tokens == drafts
    assert bounds.backends == 3


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_k4v4_g128_canonical"])
def test_pool_allocates_what_was_charged(preset):
    from sglang_kvarn.pool import KVarNTokenToKVPool

    hook.verify_hooks()
    kvc = configurator(preset, requested=4)
    config, shape = KVarNConfig.from_preset(preset), budget.model_shape(kvc)
    available = 16 << 20
    left = budget.charge_fixed_bytes(available, kvc, 0)
    tokens = left // budget.cell_size(lambda *_: 0, None, kvc, 2) // 128 * 128
    pool = KVarNTokenToKVPool(tokens, shape.attention, [3, 7], config=config, rows=5, device="cpu")
    ring = capacity.ring_pages(shape.attention, config)
    facts = {"max_requests": 4, "ring_tokens": 128 * ring, "pool_tokens": tokens}
    assert facts.items() <= pool.facts().items()
    page = shape.token_bytes(config) * 128
    assert pool.get_kv_size_bytes() == (tokens // 128 + 1) * page
    # one page beyond the budget is SGLang's padding page, in every pool; less than one page is left over
    assert available - page < pool.get_kv_size_bytes() - page <= available
    cache = pool.layer_cache(7)
    assert cache.records.data_ptr() == pool.records[1].data_ptr()
    assert pool.rings.pages.shape == (5, ring) and cache.exact.dtype == torch.float16
    assert cache.exact.data_ptr() == cache.records.data_ptr()


# Qwen3.5-27B: 16 of 64 layers have attention, 24 query and 4 KV heads of 256; a state of the others takes 146.8 MiB
HYBRID = capacity.ModelShape(16, AttentionShape(24, 4, 256, torch.bfloat16))
STATE = int(146.8 * MIB)


def test_a_session_takes_states_and_tokens_and_either_runs_out():
    states = capacity.States(number=120, nbytes=STATE, per_request=5, per_session=3)
    # 40 sessions by states; a page of the pool is SGLang's own
    assert states.sessions(42 * 32768, 32768) == (40, "states")
    assert states.sessions(40 * 32768, 32768) == (39, "tokens")
    assert states.sessions(100 * 8192, 8100) == (40, "states")
    text = capacity.describe_sessions(states, 42 * 32768)
    assert text.startswith(" and 3 for a session")
    assert "keeps 40 of 8,192 tokens (states run out first), 40 of 32,768 tokens (states" in text
    assert text.endswith("13 of 102,400 tokens (tokens run out first)")


@pytest.mark.parametrize("name", ["kvarn", "kvarn_k4v4_g128"])
def test_the_split_of_a_hybrid_serves_the_most_typical_sessions(name):
    token, memory = HYBRID.token_bytes(KVarNConfig.from_preset(name)), 40 * GIB

    def sessions(ratio: float) -> int:
        number = int(memory * ratio / (1 + ratio)) // STATE
        states = capacity.States(number, STATE, per_request=5, per_session=3)
        return states.sessions((memory - number * STATE) // token, capacity.TYPICAL_SESSION)[0]

    chosen = sessions(capacity.state_ratio(STATE, 3, token))
    best = max(sessions(ratio / 100) for ratio in range(10, 400))
    assert chosen >= best - 1 and chosen > 1.2 * sessions(0.2)
    # what a 16-bit cache keeps at SGLang's split
    number = int(memory * 0.9 / 1.9) // STATE
    bf16 = capacity.States(number, STATE, 5, 3).sessions(
        (memory - number * STATE) // HYBRID.full_token_bytes(2), capacity.TYPICAL_SESSION
    )
    assert bf16[1] == "tokens" and chosen >= 2.5 * bf16[0]


@pytest.mark.parametrize("requests", [48, 8], ids=["as many as states allow", "fewer"])
def test_the_split_of_a_hybrid_with_drafts_serves_the_most_typical_sessions(requests):
    token, memory, drafts, per_request = HYBRID.token_bytes(KVarNConfig.from_preset("kvarn")), 40 * GIB, 4, 5

    def sessions(ratio: float) -> int:
        # as SGLang counts: all states are of running requests; what these do not need is for tokens
        number = int(memory * ratio / (1 + ratio) / (STATE * (1 + drafts / per_request)))
        verified = min(requests, number // per_request) * drafts
        states = capacity.States(number, STATE, per_request, per_session=3)
        return states.sessions((memory - (number + verified) * STATE) // token, capacity.TYPICAL_SESSION)[0]

    share = capacity.state_ratio(STATE, 3, token)
    running = requests * drafts * STATE
    chosen = sessions(capacity.state_ratio_with_drafts(share, memory, drafts / per_request, running))
    assert chosen >= max(sessions(ratio / 100) for ratio in range(10, 900)) - 1
    assert chosen > 1.2 * sessions(share)


def test_most_of_the_memory_is_left_to_states_where_tokens_cost_next_to_nothing():
    assert capacity.state_ratio_with_drafts(100, 1.0, 4.0, 0.1) == pytest.approx(0.9 / 0.1)


def hybrid(monkeypatch, *, chosen=None, **arguments):
    """Return a configurator of the model above, and what it was told to override."""
    kvc, changes = configurator("kvarn", requested=None), {}
    vars(kvc.server_args).update(
        {"max_mamba_cache_size": None, "disable_radix_cache": False, "mamba_full_memory_ratio": 0.9} | arguments
    )
    form = {"dtype": SimpleNamespace(conv=1, temporal=2), "shape": SimpleNamespace(conv=3, temporal=4), "layers": [5]}
    found = SimpleNamespace(mamba2_cache_params=SimpleNamespace(mamba_cache_per_req=1 << 20, **form))
    monkeypatch.setattr(compat, "hybrid_config", lambda model: found)
    monkeypatch.setattr(compat, "attention_layers", lambda model, start, end: [1])
    monkeypatch.setattr(compat, "is_state_ratio_open", lambda args: chosen is None)
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    monkeypatch.setattr(compat, "override_argument", lambda args, **values: changes.update(values))
    kvc._calculate_mamba_ratio = lambda: 5
    return kvc, changes


def test_the_share_of_states_is_set_where_nobody_chose_it(monkeypatch):
    kvc, changes = hybrid(monkeypatch)
    budget.split_memory(kvc, 40.0)
    token = budget.model_shape(kvc).token_bytes(KVarNConfig.from_preset("kvarn"))
    assert changes == {"mamba_full_memory_ratio": round(3 * (1 << 20) / (32768 * token), 3)}


def test_the_share_of_states_counts_those_after_drafts_and_the_tokens_of_the_draft_model(monkeypatch):
    kvc, changes = hybrid(monkeypatch)
    kvc.server_args.max_running_requests = 2
    monkeypatch.setattr(compat, "draft_tokens", lambda args: 4)
    monkeypatch.setattr(budget, "draft_token_bytes", lambda kvc: 1000)
    budget.split_memory(kvc, 0.5)
    token = budget.model_shape(kvc).token_bytes(KVarNConfig.from_preset("kvarn")) + 1000
    # 512 MiB: 2 requests take 8 for their drafts; SGLang takes 1.8 states for one
    share = 3 * (1 << 20) / (32768 * token)
    states = 1.8 * (512 - 8) * share / (1 + share)
    assert changes == {"mamba_full_memory_ratio": round(states / (512 - states), 3)}


@pytest.mark.parametrize(
    "arguments",
    [
        {"chosen": 0.5},
        {"max_mamba_cache_size": 40},
        {"disable_radix_cache": True, "max_running_requests": 8},
    ],
    ids=["ratio", "number", "requests"],
)
def test_the_share_of_states_stays_what_the_user_chose(monkeypatch, arguments):
    kvc, changes = hybrid(monkeypatch, **arguments)
    budget.split_memory(kvc, 40.0)
    assert changes == {}


def test_no_more_requests_are_charged_than_states_allow(monkeypatch):
    kvc, changes = hybrid(monkeypatch, max_mamba_cache_size=33)
    budget.charge_fixed_bytes(GIB, kvc, 0)
    assert changes == {"max_running_requests": 6}
    kept = budget.states(kvc)
    assert (kept.number, kept.per_request, kept.per_session, kept.nbytes) == (33, 5, 3, 1 << 20)
    assert kept.format == "(1, 2, 3, 4, [5])"
    # a decode server makes more than it counts
    assert budget.states(kvc, 99).number == 99
    monkeypatch.setattr(compat, "hybrid_config", lambda model: None)
    assert budget.states(kvc) is None


def test_without_a_prefix_cache_no_session_waits(monkeypatch):
    kvc, changes = hybrid(monkeypatch, disable_radix_cache=True)
    kvc.server_args.max_running_requests = None
    kvc._calculate_mamba_ratio = lambda: 1
    budget.split_memory(kvc, 40.0)
    token = budget.model_shape(kvc).token_bytes(KVarNConfig.from_preset("kvarn"))
    assert changes == {"mamba_full_memory_ratio": round((1 << 20) / (32768 * token), 3)}
    kvc.server_args.max_mamba_cache_size = 40
    kept = budget.states(kvc)
    assert (kept.per_request, kept.per_session) == (1, 0) and capacity.describe_sessions(kept, 1 << 20) == ""


# 12 layers of each kind with 8 KV heads of 64 channels, gpt-oss-20b, one request of chunks of 8,192 tokens at least
GPT_OSS = capacity.SlidingShare(5664, 24_576, 24_576, ratio=0.8, is_chosen=False, least=17_023)


def test_sliding_windows_get_the_bytes_that_they_have_beside_a_16_bit_cache():
    tokens, sliding = GPT_OSS.of_memory(40 * GIB)
    assert (tokens, sliding) == (4212736, 776704)
    assert 40 * GIB - 128 * 5664 < tokens * 5664 + sliding * 24_576 <= 40 * GIB
    # the stock pool has as many of sliding windows for 0.8 of its tokens
    assert tokens >= 4.2 * sliding / 0.8


def test_sliding_windows_have_room_for_a_request_and_no_more_than_requests_can_use():
    tokens, sliding = GPT_OSS.of_memory(GIB)
    assert sliding == 19_328 > GPT_OSS.least
    tokens, sliding = GPT_OSS.of_memory(GIB // 2)
    assert sliding == 17_024 and tokens * 5664 + sliding * 24_576 <= GIB // 2
    few = dataclasses.replace(GPT_OSS, most=30_000)
    assert few.of_memory(40 * GIB)[1] == 30_080 and few.of_memory(40 * GIB)[0] > 4212736
    with pytest.raises(ValueError, match=r"needs 399\.0 MiB for sliding windows .*, but there are 384\.0"):
        GPT_OSS.of_memory(384 * MIB)


def test_a_chosen_ratio_is_taken_as_it_is_or_refused():
    chosen = dataclasses.replace(GPT_OSS, ratio=0.1, is_chosen=True)
    tokens, sliding = chosen.of_memory(40 * GIB)
    assert 0 <= 0.1 * tokens - sliding < 256 and 0.99 < (tokens * 5664 + sliding * 24_576) / (40 * GIB) <= 1
    with pytest.raises(ValueError, match=r"ratio 0.1 leaves 12,800 tokens .* may need 17,023: drop --swa-full-tokens"):
        chosen.of_tokens(128_000, None)


def test_fewer_tokens_have_fewer_sliding_windows_but_never_more_than_there_is_memory_for():
    assert GPT_OSS.of_tokens(100_096, 776704) == 80_000
    assert GPT_OSS.of_tokens(2_000_000, 776704) == 776704
    assert GPT_OSS.of_tokens(1024, 776704) == 17_024


def test_sliding_share_reads_shapes_and_arguments_of_a_server(monkeypatch):
    kvc = configurator("kvarn", sliding_window_size=127)
    kvc.model_config.is_hybrid_swa, kvc.layer_info.end_layer = True, 4
    kvc.model_config.full_attention_layer_ids, kvc.model_config.swa_attention_layer_ids = [1, 3], [0, 2]
    kvc.model_config.get_swa_num_kv_heads = lambda ranks: 6 // ranks
    kvc.model_config.swa_head_dim = kvc.model_config.swa_v_head_dim = 64
    vars(kvc.server_args).update(
        {"disable_overlap_schedule": False, "disable_radix_cache": True, "swa_full_tokens_ratio": 0.8}
    )
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    monkeypatch.setattr(compat, "attention_backends", lambda args: 1)
    monkeypatch.setattr(compat, "is_sliding_ratio_open", lambda args: True)
    monkeypatch.setattr(compat, "is_since", lambda version: True)
    monkeypatch.setattr(compat, "published_argument", lambda name: {"disaggregation_mode": "null"}[name])
    monkeypatch.setattr(budget, "draft_token_bytes", lambda kvc: 0)
    share = budget.sliding_share(kvc)
    assert (share.token, share.plain_token) == (2 * 2 * 59, 2 * 2 * 2 * 64 * 2)
    assert share.sliding_token == 2 * 6 * 2 * 64 * 2
    # a request holds its window, what SGLang frees later, and pages at both ends; two chunks of 256 are under way
    assert (share.least, share.most) == (127 + 128 + 256 + 512 + 128, 4 * (127 + 128 + 256) + 512 + 128)
    assert share.ratio == 0.8 and not share.is_chosen
    # each of two ranks has half of the heads
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=2, attn_dp_size=1), raising=False)
    assert budget.sliding_share(kvc).sliding_token == share.sliding_token / 2
    # a decode server receives twice as many requests besides, and finds room for the answer of one before it does
    with monkeypatch.context() as patch:
        patch.setattr(compat, "published_argument", lambda name: {"disaggregation_mode": "decode"}[name])
        patch.setattr(compat, "most_new_tokens_expected", lambda: 4096)
        kvc.server_args.disaggregation_decode_extra_slots = 8
        receiving = budget.sliding_share(kvc)
    assert (receiving.least, receiving.most) == (share.least - 512 + 4096, 12 * (127 + 128 + 256) + 4096 + 128)
    # slots for the drafts of this step and of the next one
    monkeypatch.setattr(compat, "draft_tokens", lambda args: 8)
    drafting = budget.sliding_share(kvc)
    assert (drafting.least, drafting.most) == (share.least + 16, share.most + 4 * 16)
    # SGLang before 0.5.23 frees after 128 steps, each of which may be of 8 tokens
    with monkeypatch.context() as patch:
        patch.setattr(compat, "is_since", lambda version: version != "0.5.23")
        assert budget.sliding_share(kvc).least == drafting.least + 7 * 128
    # what a draft model keeps of a token is charged beside it, with any cache
    monkeypatch.setattr(budget, "draft_token_bytes", lambda kvc: 1000)
    with_model = budget.sliding_share(kvc)
    assert with_model.token - drafting.token == with_model.plain_token - drafting.plain_token == 1000
