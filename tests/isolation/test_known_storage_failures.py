# SPDX-License-Identifier: Apache-2.0
"""Failures of files behind host memory: each must not happen, and is found by the world where the guard is taken away.

As in `test_known_host_failures`, the device and the threads that read and write files work in an order that is given.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from history import PAGE
from host_tier import HostOptions
from prefix_cache import calls
from sglang_kvarn import compat, storage_keys
from sglang_kvarn.host_pool import KVarNHostPool
from storage_tier import DAMAGES, Folder, page_keys
from streams import COPIES_FIRST, FORWARD_FIRST, Event
from world import ROWS, World, prefill, tokens, use_plain_allocation_kernels

pytestmark = pytest.mark.skipif(not calls.stores, reason="storage is refused in this SGLang")

ORDERS = [COPIES_FIRST, FORWARD_FIRST, 0, 1, 2]
PROMPT = tokens(3 * PAGE + 5, 1)
# that the device has room for
STATES = 20


@pytest.fixture(autouse=True)
def plain_allocation(monkeypatch) -> None:
    use_plain_allocation_kernels(monkeypatch)


@pytest.fixture
def folder(tmp_path) -> Folder:
    return Folder(tmp_path)


def stored(
    folder: Folder, order: int | str = 0, *, preset: str = "kvarn", pages: int = 60, states: int = 0, **options
) -> World:
    return World(preset, host=HostOptions(pages, seed=order, folder=folder, **options), rings=ROWS, states=states)


def write(folder: Folder, order: int | str = 0, **options) -> World:
    """Return a world that has answered PROMPT, whose pages are in files."""
    world = stored(folder, order, **options)
    prefill(world, PROMPT)
    for _ in range(3):
        world.decode()
    world.settle()
    world.check_accounts()
    return world


def read(folder: Folder, order: int | str = 0, prompt: list[int] = PROMPT, **options) -> int:
    """Return how many tokens of a prompt a server finds that starts on the files of others; all reads are checked."""
    world = stored(folder, order, **options)
    again = prefill(world, prompt)
    assert again in world.running
    for _ in range(3):
        world.decode()
    world.settle()
    world.check_accounts()
    assert world.storage_hits == bool(again.exact_start)
    return again.exact_start


def each(folder: Folder, order: int | str) -> Folder:
    """Return an empty folder for an order."""
    path = folder.path / str(order)
    path.mkdir()
    return Folder(path)


@pytest.mark.parametrize("core", calls.cores)
def test_a_prefix_from_files_is_read_as_one_that_never_left(folder, core):
    for order in ORDERS:
        own = each(folder, order)
        write(own, order, core=core)
        assert len(own.names()) == 3
        assert read(own, order, core=core) == 3 * PAGE
        # one that parts from it amid its third page
        assert read(own, order, PROMPT[: 2 * PAGE + 60] + tokens(90, 2), core=core) == 2 * PAGE
        # the same tokens behind another page
        assert read(own, order, tokens(PAGE, 3) + PROMPT[PAGE:], core=core) == 0


@pytest.mark.parametrize("core", calls.cores)
def test_a_state_from_a_file_is_that_of_the_tokens_before_it(folder, core):
    for order in ORDERS:
        own = each(folder, order)
        # a prompt keeps the state at its last end of a page
        write(own, order, core=core, states=STATES)
        assert len(own.names()) == 4
        assert read(own, order, core=core, states=STATES) == 3 * PAGE
        # there is no state behind the two pages that others begin with, before the first of them has left one
        others = [PROMPT[: 2 * PAGE] + tokens(90, seed) for seed in (2, 3)]
        assert [read(own, order, other, core=core, states=STATES) for other in others] == [0, 2 * PAGE]
        # a state is as good as the pages before it
        own.damage(next(name for name in own.names() if name.startswith(page_keys(PROMPT)[0])), "gone")
        assert read(own, order, core=core, states=STATES) == 0


@pytest.mark.parametrize("way", DAMAGES)
def test_a_damaged_file_is_a_miss(folder, way):
    write(folder)
    first = folder.names()
    for name in first:
        folder.damage(name, way)
    assert read(folder) == 0
    # a file that is gone is written again, the others stay as they are
    assert folder.names() == first
    assert read(folder) == (3 * PAGE if way == "gone" else 0)


@pytest.mark.parametrize("change", [{"preset": "kvarn_k4v4_g128"}, {"factors": 1}])
def test_files_of_another_preset_or_of_other_factors_are_misses(folder, change):
    write(folder)
    assert read(folder, **change) == 0
    # each has its own by now
    assert read(folder) == read(folder, **change) == 3 * PAGE
    assert len(folder.names()) == 6


@pytest.mark.parametrize("core", calls.cores)
def test_a_request_that_stops_waiting_for_files_gives_back_what_it_held(folder, core):
    left = set()
    for order in ORDERS:
        own = each(folder, order)
        write(own, order, core=core)
        world = stored(own, order, core=core)
        for steps in range(4):
            request = world.admit(PROMPT)
            # the files are looked for; found; being read; read
            for _ in range(steps):
                world._note_copies()
            left.add((steps, world.tier.host.available_size()))
            world.abort_waiting(request)
            world.check_accounts()
            # those of a request after it are its own
            prefill(world, tokens(PAGE + 7, 10 + steps))
            world.settle()
            world.check_accounts()
        assert world.flush()
        assert world.tier.host.available_size() == world.tier.host.size
    assert len(left) > 4, "requests stopped at different times"


def test_a_page_stays_in_host_memory_until_it_is_in_its_file(folder):
    """Host memory has room for one prompt, and the next one comes before the first is written."""
    for order in ORDERS:
        own = each(folder, order)
        world = stored(own, order, pages=4)
        world.tier.storage.holds_writes = True
        for seed in (1, 2):
            request = prefill(world, tokens(3 * PAGE + 5, seed))
            world.settle()
            world.finish(request)
            world.evict(world.pool_pages * PAGE)
        world.tier.storage.write_on()
        world.settle()
        world.check_accounts()
        assert len(own.names()) == 3
        assert read(own, order, tokens(3 * PAGE + 5, 1)) == 3 * PAGE


def test_a_page_that_is_written_before_its_copy_is_done_is_found(folder, monkeypatch):
    # SGLang takes every copy for done
    monkeypatch.setattr(Event, "query", lambda event: True)
    monkeypatch.setattr(Event, "synchronize", lambda event: None)
    with pytest.raises(AssertionError, match=r"file .*: page"):
        for order in ORDERS:
            write(each(folder, order), order)


def test_a_page_that_host_memory_drops_before_it_is_in_its_file_is_found(folder, monkeypatch):
    cache = compat.resolve("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache")
    store = cache.write_backup_storage

    def write_unlocked(tree, node_id) -> None:
        store(tree, node_id)
        for operation, (node, params) in list(tree.ongoing_backup.items()):
            tree.dec_host_lock_ref(node, params)
            del tree.ongoing_backup[operation]

    monkeypatch.setattr(cache, "write_backup_storage", write_unlocked)
    with pytest.raises(AssertionError, match=r"file .*: page"):
        test_a_page_stays_in_host_memory_until_it_is_in_its_file(folder)


def test_a_short_file_that_is_taken_is_found(folder, monkeypatch):
    def get(storage, key, target_location, target_sizes=None):
        """Read as much as there is."""
        path = Path(storage.file_path, f"{storage._get_suffixed_key(key)}.bin")
        if not path.exists():
            return None
        content = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)
        target_location[: len(content)] = content
        return target_location

    write(folder)
    for name in folder.names():
        folder.damage(name, "cut")
    monkeypatch.setattr(compat.resolve("sglang.srt.mem_cache.hicache_storage.HiCacheFile"), "get", get)
    with pytest.raises(AssertionError, match=r"error|memory: pages"):
        read(folder)


@pytest.mark.parametrize("way", ["zeroed", "retyped"])
def test_a_page_without_its_header_that_is_taken_is_found(folder, monkeypatch, way):
    def take(host, index: int, data_page: torch.Tensor) -> None:
        host.kv_buffer[int(index) // PAGE] = data_page.view(host.layer_num, -1)

    write(folder)
    for name in folder.names():
        folder.damage(name, way)
    monkeypatch.setattr(KVarNHostPool, "set_from_flat_data_page", take)
    with pytest.raises(AssertionError, match=r"error|memory: pages"):
        read(folder)


@pytest.mark.parametrize("where", ["get_data_page", "set_from_flat_data_page"])
def test_a_page_beside_the_one_that_was_asked_for_is_found(folder, monkeypatch, where):
    whole = getattr(KVarNHostPool, where)
    monkeypatch.setattr(KVarNHostPool, where, lambda host, index, *more: whole(host, int(index) + PAGE, *more))
    with pytest.raises(AssertionError, match=r"error|memory: pages|file .*: page"):
        write(folder)
        read(folder)


@pytest.mark.parametrize("change", [{"preset": "kvarn_k4v4_g128"}, {"factors": 1}], ids=["preset", "factors"])
def test_a_key_without_preset_or_factors_is_found(folder, monkeypatch, change):
    tag, factors = storage_keys.tag, "factors" in change

    def without(preset: str, parts: list[str]) -> str:
        if not factors:
            return tag("kvarn", parts)
        return tag(preset, [part for part in parts if not part.startswith("factors")])

    monkeypatch.setattr(storage_keys, "tag", without)
    write(folder)
    with pytest.raises(AssertionError, match=r"error|memory: pages|file .*: page"):
        read(folder, **change)


def test_files_are_read_while_another_server_writes_the_same(folder):
    """Two servers over one folder, whose threads take turns."""
    for order in ORDERS:
        own = each(folder, order)
        one, other = stored(own, order), stored(own, order)
        for seed in (1, 2, 1, 3, 2):
            for world in (one, other):
                world.tier.enter()
                prefill(world, tokens(2 * PAGE + 9, seed))
                world.check_accounts()
        for world in (one, other):
            world.tier.enter()
            world.settle()
            world.check_accounts()
        assert len(os.listdir(own.path)) == 6
