# SPDX-License-Identifier: Apache-2.0
"""Capacity adds up: what the hooks charge is what the pool allocates."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import budget, capacity, compat, hook
from sglang_kvarn.refused import Refused

QWEN3_8B = capacity.ModelShape(36, AttentionShape(32, 8, 128, torch.bfloat16))
GIB = 1 << 30


def configurator(preset: str, tp_size: int = 1, requested: int | None = 4, **changes):
    """Return what the hooks read of SGLang's KVCacheConfigurator, for 2 layers of 4 query and 2 KV heads."""
    args = SimpleNamespace(
        kv_cache_dtype=preset,
        max_running_requests=requested,
        chunked_prefill_size=256,
        cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(backend="disabled", max_bs=None)),
    )
    model = SimpleNamespace(
        get_num_kv_heads=lambda size: max(1, 2 // size), num_attention_heads=4, head_dim=64, context_len=4096
    )
    return SimpleNamespace(
        is_draft_worker=False,
        server_args=args,
        model_config=model,
        model_dtype=torch.float16,
        device="cpu",
        layer_info=SimpleNamespace(num_effective_layers=2),
        **changes,
    )


@pytest.fixture(autouse=True)
def one_rank(monkeypatch):
    """One rank, whose arguments stand for the configuration of its process."""
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1), raising=False)
    monkeypatch.setattr(compat, "max_running_requests", lambda args: args.max_running_requests)
    monkeypatch.setattr(
        compat, "set_max_running_requests", lambda args, rows: vars(args).update(max_running_requests=rows)
    )


def test_model_shape_gives_the_documented_bytes():
    config = KVarNConfig.from_preset("kvarn")
    assert QWEN3_8B.token_bytes(config) == 32_256
    assert QWEN3_8B.full_token_bytes(2) == 147_456
    assert QWEN3_8B.row_bytes(config) == 37_748_736
    assert QWEN3_8B.row_bytes(KVarNConfig.from_preset("kvarn_canonical")) * 2 == 37_748_736


@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_model_shape_counts_the_heads_of_one_rank(monkeypatch, tp_size):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=tp_size), raising=False)
    shape = budget.model_shape(configurator("kvarn")).attention
    assert (shape.num_kv_heads, shape.num_qo_heads) == (max(1, 2 // tp_size), 4 // tp_size)


def test_choose_rows_takes_five_percent_but_at_least_eight_without_graphs():
    row = QWEN3_8B.row_bytes(KVarNConfig.from_preset("kvarn"))
    rows, reason = capacity.choose_rows(55 * GIB, row, None)
    assert (rows + 1) * row <= 0.05 * 55 * GIB < (rows + 2) * row
    assert "5%" in reason
    assert capacity.choose_rows(4 * GIB, row, None)[0] == capacity.MIN_ROWS
    assert capacity.choose_rows(10**6 * GIB, row, None)[0] == capacity.MAX_ROWS


def test_choose_rows_takes_the_batch_of_the_decode_graphs_within_a_fifth_of_the_memory():
    row = QWEN3_8B.row_bytes(KVarNConfig.from_preset("kvarn"))
    # an H100: 256 rings of 36 MiB are 16 % of 55 GiB; of 24 GiB they would be 38 %
    assert capacity.choose_rows(55 * GIB, row, None, 256)[0] == 256
    rows, reason = capacity.choose_rows(24 * GIB, row, None, 256)
    assert (rows + 1) * row <= 0.2 * 24 * GIB < (rows + 2) * row and "20%" in reason
    # never fewer than without graphs, and the user's word is the last
    assert capacity.choose_rows(55 * GIB, row, None, 8) == capacity.choose_rows(55 * GIB, row, None, 0)
    assert capacity.choose_rows(55 * GIB, row, 16, 256)[0] == 16


def test_charge_fixed_bytes_reads_the_batch_of_the_decode_graphs():
    kvc = configurator("kvarn", requested=None)
    row = budget.model_shape(kvc).row_bytes(KVarNConfig.from_preset("kvarn"))
    kvc.server_args.cuda_graph_config.decode.max_bs = 100
    budget.charge_fixed_bytes(1000 * row, kvc, 0)
    # graphs are disabled
    assert kvc.server_args.max_running_requests == 49
    kvc = configurator("kvarn", requested=None)
    kvc.server_args.cuda_graph_config.decode = SimpleNamespace(backend="full", max_bs=100)
    budget.charge_fixed_bytes(1000 * row, kvc, 0)
    assert kvc.server_args.max_running_requests == 100


def test_choose_rows_takes_what_the_user_asks_for_or_says_why_not():
    row = QWEN3_8B.row_bytes(KVarNConfig.from_preset("kvarn"))
    assert capacity.choose_rows(55 * GIB, row, 256) == (256, "--max-running-requests")
    with pytest.raises(Refused, match=r"needs 73,764\.0 MiB .* 2048 requests .* 56,320\.0 MiB are left .*: lower"):
        capacity.choose_rows(55 * GIB, row, 2048)


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


def test_charge_fixed_bytes_fixes_the_rows_when_the_user_does_not():
    kvc = configurator("kvarn", requested=None)
    left = budget.charge_fixed_bytes(GIB, kvc, 0)
    rows = kvc.server_args.max_running_requests
    assert GIB - left == (rows + 1) * budget.model_shape(kvc).row_bytes(KVarNConfig.from_preset("kvarn"))
    assert 0.04 * GIB < GIB - left <= 0.05 * GIB
    assert budget.cap_rows(4096, kvc, 10**6) == rows
    assert budget.cap_rows(3, kvc, 6) == 3


def test_charge_fixed_bytes_refuses_a_pool_of_less_than_three_pages():
    kvc = configurator("kvarn", requested=4)
    shape, config = budget.model_shape(kvc), KVarNConfig.from_preset("kvarn")
    ring, pages = 5 * shape.row_bytes(config), 3 * 128 * shape.token_bytes(config)
    assert budget.charge_fixed_bytes(ring + pages, kvc, 0) == pages
    with pytest.raises(Refused, match=r"for 3 pages of tokens.*: lower --max-running-requests or raise"):
        budget.charge_fixed_bytes(ring + pages - 1, kvc, 0)


def test_charge_fixed_bytes_charges_the_workspace_of_the_kernels(monkeypatch):
    from kvarn_kernels.device.gpu import NO_GPU
    from kvarn_kernels.read import decode, decode_plan

    monkeypatch.setenv("KVARN_CPU_FORM", "triton")
    kvc = configurator("kvarn", requested=4)
    left = budget.charge_fixed_bytes(GIB, kvc, 0)
    ring = 5 * budget.model_shape(kvc).row_bytes(KVarNConfig.from_preset("kvarn"))
    shape, config = budget.model_shape(kvc).attention, KVarNConfig.from_preset("kvarn")
    resident = decode.resident_programs(NO_GPU)
    made = decode_plan.make_workspace(shape, config, torch.device("cpu"), 5, 33, resident)
    tensors = [x for x in vars(made).values() if isinstance(x, torch.Tensor)]
    assert GIB - left - ring == sum(t.nbytes for t in tensors) > 0


def test_charge_fixed_bytes_charges_the_workspace_of_prefill(monkeypatch):
    from kvarn_kernels.attention import Kernels
    from kvarn_kernels.dense import extend_dense

    dense = Kernels("torch", "torch", "torch", dense=True)
    monkeypatch.setattr("kvarn_kernels.attention.choose_kernels", lambda *args: dense)
    kvc = configurator("kvarn", requested=4)
    left = budget.charge_fixed_bytes(GIB, kvc, 0)
    ring = 5 * budget.model_shape(kvc).row_bytes(KVarNConfig.from_preset("kvarn"))
    # 5 rows of 33 pages, exact and as records; a request reads those of its chunk and two more twice
    pages = 5 * 66 * 2 * 128 * 2 * 64 * 2
    charged = extend_dense.workspace_bytes(budget.model_shape(kvc).attention, 5 * 66, 33 + 4)
    assert GIB - left - ring == charged == pages + 2 * extend_dense.WRAPPER_BYTES


@pytest.mark.parametrize(("size", "pages"), [(256, 2), (10**6, 32), (-1, 32), (None, 32)])
def test_a_chunk_is_at_most_a_context(size, pages, monkeypatch):
    graph = SimpleNamespace(decode=SimpleNamespace(backend="disabled"))
    args = SimpleNamespace(chunked_prefill_size=size, cuda_graph_config=graph)
    monkeypatch.setattr(compat, "max_running_requests", lambda args: None)
    limits = budget.bounds(args, 4096).steps(rows=8, request_pages=33)
    assert limits.chunk_pages == pages
    assert limits.decode_batch == limits.extend_requests == 9 and limits.extend_pages == 9 * 2 * 33


@pytest.mark.parametrize("graph_rows", [None, 3, 64])
def test_decode_batch_covers_rows_and_padded_graphs(graph_rows, monkeypatch):
    monkeypatch.setattr(compat, "max_running_requests", lambda args: None)
    graph = SimpleNamespace(backend="full", max_bs=graph_rows)
    args = SimpleNamespace(chunked_prefill_size=256, cuda_graph_config=SimpleNamespace(decode=graph))
    assert budget.bounds(args, 4096).steps(8, 33).decode_batch == max(9, graph_rows or 0)


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_k4v4_g128_canonical"])
def test_pool_allocates_what_was_charged(preset):
    from sglang_kvarn.pool import KVarNTokenToKVPool

    hook.verify_hooks()
    kvc = configurator(preset, requested=4)
    config, shape = KVarNConfig.from_preset(preset), budget.model_shape(kvc)
    available = 16 << 20
    left = budget.charge_fixed_bytes(available, kvc, 0)
    tokens = left // budget.cell_size(lambda *_: 0, None, kvc, 2) // 128 * 128
    pool = KVarNTokenToKVPool(
        tokens,
        page_size=128,
        dtype=torch.uint8,
        head_num=2,
        head_dim=64,
        layer_num=2,
        device="cpu",
        enable_memory_saver=False,
        config=config,
        rows=5,
        shape=shape.attention,
    )
    assert pool.facts()["ring_rows"] == 4
    page = shape.token_bytes(config) * 128
    assert pool.get_kv_size_bytes() == (tokens // 128 + 1) * page + 5 * shape.row_bytes(config)
    # one page beyond the budget is SGLang's padding page, in every pool; less than one page is left over
    assert available - page < pool.get_kv_size_bytes() - page <= available
    cache = pool.layer_cache(1)
    assert cache.records.data_ptr() == pool.records[1].data_ptr()
    assert cache.ring_k.shape == (5, config.ring_len, 2, 64) and cache.ring_k.dtype == torch.float16
