# SPDX-License-Identifier: Apache-2.0
"""HiCache: the host pool of records, who chooses it, and what copies wait for."""

from __future__ import annotations

import importlib
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.batch import Limits
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.record import tile
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import balanced_layers, compat, fences, plugin, storage_keys
from sglang_kvarn.capacity import States

PAGE, PAGES, LAYERS = 128, 6, (3, 7, 11)
SHAPE = AttentionShape(4, 2, 64, torch.float32)


@pytest.fixture
def pool(monkeypatch):
    """Return a token pool of random bytes, of layers 3, 7 and 11 of a model."""
    monkeypatch.setattr("sglang_kvarn.hook.verify_hooks", lambda: None)
    config = KVarNConfig.from_preset("kvarn")
    made = compat.resolve("sglang_kvarn.pool.KVarNTokenToKVPool")(
        PAGES * PAGE, SHAPE, list(LAYERS), config=config, rows=3, device="cpu"
    )
    made.slab.random_(256, generator=torch.Generator().manual_seed(1))
    return made


@pytest.fixture
def make(pool):
    """Return a function that makes the host pool as SGLang does: by class, from what the hook gets."""

    def make(**sizes):
        source = pool.get_device_pool_infos()[0].buffer_info if compat.has_host_sources() else pool
        chosen = plugin._choose_host_pool(lambda source: "another", source)
        given = {"host_to_device_ratio": 2.0, "host_size": 0, "page_size": PAGE, "layout": "page_first"} | sizes
        return chosen(source, **given, allocator_type=None)

    return make


def slots(*pages: int) -> torch.Tensor:
    return torch.cat([torch.arange(page * PAGE, (page + 1) * PAGE) for page in pages])


def test_a_host_pool_holds_so_many_times_the_tokens_or_so_many_bytes(pool, make):
    token_bytes = pool.facts()["bytes_per_token"]
    host = make()
    # SGLang adds a page
    assert (host.size, host.size_per_token) == ((2 * PAGES + 1) * PAGE, token_bytes)
    assert host.kv_buffer.nbytes == host.size * token_bytes and not host.kv_buffer.is_pinned()
    size = 40 * PAGE * token_bytes / 1e9
    assert make(host_size=size).page_num in (40, 41)
    # the bytes are also for what a draft model keeps of the same tokens
    pool.draft_token_bytes = 3 * token_bytes
    assert make(host_size=size).page_num in (10, 11) and make().size == host.size


def test_pages_come_back_layer_by_layer_wherever_they_are_needed(pool, make):
    host, before = make(), pool.slab.clone()
    host.backup_from_device_all_layer(pool, slots(9, 0), slots(5, 2), "kernel")
    for number in range(len(LAYERS)):
        at = slots(1, 4)
        host.load_to_device_per_layer(pool, slots(0, 9), at, number, "kernel")
        expected = before.clone()
        expected[: number + 1, [1, 4]] = before[: number + 1, [2, 5]]
        assert torch.equal(pool.slab, expected), number
    # all layers of a page are one run of bytes
    assert torch.equal(host.get_data_page(9 * PAGE), before[:, 5].flatten())
    assert len(host.get_dummy_flat_data_page()) == len(host.get_data_page(0))


def test_a_page_comes_back_from_a_storage(pool, make):
    host = make()
    # float32 has first tokens in float16
    pool.slab[..., 0] = pool.slab[..., 0] & 0xF0 | tile.HEADER
    host.backup_from_device_all_layer(pool, slots(9), slots(5), "kernel")
    stored = host.get_data_page(9 * PAGE).clone()
    host.kv_buffer.zero_()
    host.set_from_flat_data_page(2 * PAGE, stored)
    assert torch.equal(host.kv_buffer[2], pool.slab[:, 5].flatten(1)) and not host.kv_buffer[[1, 3]].any()


def test_a_load_computes_no_page_ids_on_the_device(pool, make):
    host, given = make(), []
    host._load = lambda source, target, *slots: given.append(slots)
    whole = slots(3, 9), slots(1, 4)
    for number in range(len(LAYERS)):
        host.load_to_device_per_layer(pool, *whole, number, "kernel")
    for *firsts, page_size in given:
        assert page_size == PAGE
        for first, of in zip(firsts, whole, strict=True):
            # a view of what SGLang gave
            assert first.data_ptr() == of.data_ptr() and first.tolist() == of[::PAGE].tolist()
    assert len(given) == len(LAYERS)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
@pytest.mark.parametrize("head", range(SHAPE.num_kv_heads))
def test_bytes_of_a_storage_that_are_no_page_of_records_are_not_taken(pool, make, layer, head):
    host = make()
    pool.slab[..., 0] = pool.slab[..., 0] & 0xF0 | tile.HEADER
    page = pool.slab[:, 5].clone()
    # a record that was never encoded; one whose first tokens are bfloat16
    for header in (0, tile.HEADER | tile.HEADER_BF16):
        page[layer, head, 0] = header
        with pytest.raises(ValueError, match="without their headers"):
            host.set_from_flat_data_page(0, page.flatten())
    for size in (0, page.numel() - 1, page.numel() + 16):
        with pytest.raises(ValueError, match=f"a page of {page.numel()} bytes from the storage, got {size}"):
            host.set_from_flat_data_page(0, torch.full((size,), tile.HEADER, dtype=torch.uint8))
    assert not host.kv_buffer[0].any()


def test_the_keys_of_a_storage_name_format_and_balance(pool, make):
    host = make()
    tags = [host.storage_format_tag]
    pool.balance_tag = lambda: "0123456789ab"
    tags.append(host.storage_format_tag)
    assert tags[0] != tags[1]
    assert all(re.fullmatch("kvarn_k4v2_g128-v1-[0-9a-f]{16}", tag) for tag in tags)


@pytest.mark.skipif(not compat.salts_storage_keys(), reason="files are refused with this version of SGLang")
@pytest.mark.parametrize("preset", sorted({KVarNConfig.from_preset(name).name for name in preset_names()}))
def test_a_model_of_the_longest_name_has_files(preset, tmp_path):
    storage = importlib.import_module("sglang.srt.mem_cache.hicache_storage")
    names = dict.fromkeys(inspect.signature(storage.HiCacheStorageConfig).parameters, 0)
    model = "m" * storage_keys.longest_model_name(preset)
    names |= {"model_name": f"{model}-{storage_keys.tag(preset, ['x'])}", "extra_config": None, "dcp_size": 1}
    names |= {"tp_rank": 127, "tp_size": 128, "pp_rank": 10, "pp_size": 12}
    made = storage.HiCacheFile(storage.HiCacheStorageConfig(**names), file_path=str(tmp_path))
    for kept in ("", ".mamba", ".auxiliary_swa"):
        assert made.set("0" * 64 + kept, torch.zeros(4))
    assert max(len(file.name) for file in tmp_path.glob("*.bin")) <= storage_keys.NAME_BYTES


def test_the_keys_of_a_storage_name_the_format_of_states(pool, make):
    plain = make().storage_format_tag
    found = []
    for form in ("float32", "bfloat16"):
        pool.states = States(4, 1024, 3, 3, form)
        found.append(make().storage_format_tag)
    assert len({plain, *found}) == 3


@pytest.mark.parametrize("beside", ["sliding_tokens", "draft_token_bytes"])
def test_the_keys_of_a_storage_name_the_order_of_what_is_beside_records(pool, make, beside):
    plain = make().storage_format_tag
    # records lie in one order whatever it is called
    assert make(layout="layer_first").storage_format_tag == plain
    setattr(pool, beside, 128)
    tags = [make(layout=layout).storage_format_tag for layout in ("page_first", "layer_first")]
    assert len({plain, *tags}) == 3


def test_a_layer_waits_for_its_own_pages(pool):
    waited = []
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    for layer in (11, 3, 7):
        assert pool.layer_cache(layer).records.data_ptr() == pool.records[LAYERS.index(layer)].data_ptr()
    assert waited == [2, 0, 1]


def test_a_layer_beside_states_waits_for_its_own_among_all_layers_of_the_model(pool):
    waited = []
    pool.states = States(4, 1024, 3, 3)
    pool.register_layer_transfer_counter(SimpleNamespace(wait_until=waited.append))
    for layer in (11, 3, 7):
        assert pool.layer_cache(layer).records.data_ptr() == pool.records[LAYERS.index(layer)].data_ptr()
    assert waited == [11, 3, 7]


@pytest.mark.skipif(not compat.hosts_states(), reason="this SGLang has no prefix cache of hybrid models")
def test_host_memory_for_states_takes_our_pool_where_there_are_some(pool):
    names = "sglang.srt.mem_cache.unified_cache.component_type.ComponentType"
    parts = {getattr(compat.resolve(names), name) for name in ("FULL", "MAMBA")}
    strategy = compat.resolve("sglang.srt.mem_cache.hybrid_cache.hybrid_pool_assembler._select_strategy")
    assert type(strategy(pool, parts - {max(parts, key=str)})).__name__ == "_PlainKvStrategy"
    pool.states = States(4, 1024, 3, 3)
    assert type(strategy(pool, parts)).__name__ == "_MambaStrategy"
    # as SGLang numbers the transfers of layers
    assert pool.full_attention_layer_id_mapping == {3: 0, 7: 1, 11: 2} and pool.start_layer == 0


@pytest.mark.parametrize(("fence", "stream"), [("before_writing", "write_stream"), ("before_loading", "load_stream")])
def test_copies_wait_for_the_forward_pass(pool, fence, stream):
    waits = {name: [] for name in ("write_stream", "load_stream")}
    streams = {name: SimpleNamespace(wait_stream=of.append) for name, of in waits.items()}
    pool.forward_stream = object()
    getattr(fences, fence)(SimpleNamespace(mem_pool_device=pool, **streams))
    assert waits.pop(stream) == [pool.forward_stream] and list(waits.values()) == [[]]
    # from 0.5.23 on the streams are elsewhere, and wait by themselves
    getattr(fences, fence)(SimpleNamespace(mem_pool_device=pool))


def test_the_backend_names_the_stream_of_the_forward_pass_and_the_balance(pool, monkeypatch):
    backend = importlib.import_module("sglang_kvarn.backend")
    for name in ("check_device", "check_states_on_device", "check_layers"):
        monkeypatch.setattr(backend.refusals, name, lambda *args: None)
    monkeypatch.setattr(backend.scales, "log_unused", lambda model_runner: None)
    monkeypatch.setattr(backend.compat, "unread_verify_mask", lambda *args: None)
    monkeypatch.setattr(backend.compat, "windows_in_records", lambda model_config: ())
    limits = Limits(2, 4, extend_requests=2, chunk_pages=4)
    monkeypatch.setattr(backend.KVarNAttentionBackend, "_limits", lambda self, model_runner: limits)
    runner = SimpleNamespace(
        token_to_kv_pool=pool,
        device="cpu",
        dtype=torch.float32,
        model=torch.nn.Module(),
        model_config=SimpleNamespace(context_len=512),
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(3, 512, dtype=torch.int32)),
        forward_stream=object(),
    )
    with monkeypatch.context() as patch:
        patch.setattr(balanced_layers, "fingerprint", lambda model: "of " + type(model).__name__)
        backend.KVarNAttentionBackend(runner)
    assert pool.forward_stream is runner.forward_stream
    assert pool.balance_tag() == "of Module"


def test_factors_are_not_hashed_before_a_storage_asks(pool, make):
    def balance_tag() -> str:
        raise AssertionError("no storage has asked")

    pool.balance_tag = balance_tag
    host = make()
    host.backup_from_device_all_layer(pool, slots(1), slots(1), "kernel")
    with pytest.raises(AssertionError, match="no storage"):
        _ = host.storage_format_tag


@pytest.mark.skipif(compat.has_host_sources(), reason="this SGLang fences its copies itself")
def test_the_model_runner_of_sglang_has_that_stream():
    source = inspect.getsource(compat.resolve("sglang.srt.model_executor.model_runner.ModelRunner.__init__"))
    assert "self.forward_stream = " in source


def test_the_host_pool_of_another_cache_is_sglangs():
    assert plugin._choose_host_pool(lambda source: "another", SimpleNamespace(size=4)) == "another"
