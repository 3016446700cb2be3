# SPDX-License-Identifier: Apache-2.0
"""Host memory behind a world's prefix cache: SGLang's hierarchical cache over our host pool, on a device that is late.

Files may be behind host memory in turn (`storage_tier`).

The copies are operations of simulated streams (`streams`), and so are the forward passes of a world. What a page of the
prefix cache must hold is known from the tokens of its path in the tree. A page is checked when nothing that is queued
will still write it.
"""

from __future__ import annotations

import atexit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType

import torch
from history import History, Pages, extend_hashes
from prefix_cache import PAGE, calls
from sglang_kvarn import compat
from storage_tier import Folder, StorageTier
from streams import Device

# where SGLang takes streams and events from
_USERS = ("sglang.srt.managers.cache_controller", "sglang.srt.mem_cache.l2_transfer")


@dataclass(frozen=True)
class HostOptions:
    """Describe the host memory of a world.

    Attributes:
        pages: of the host; policy: SGLang's --hicache-write-policy; seed: of the order in which the device works, see
            `streams.Device`.
        core: which of SGLang's two trees, from 0.5.23 on; "rust", its default, does not show its nodes, so that only
            what requests read is checked there.
        folder: of the files behind it, None without any; prefetch: SGLang's policy of waiting for them.
        factors: by which the channels of the model are balanced, 0 or 1. With others it caches other bytes of the same
            tokens: here, every layer has its heads in the other order.
    """

    pages: int
    policy: str = "write_through"
    seed: int | str = 0
    core: str = "python"
    folder: Folder | None = None
    prefetch: str = "wait_complete"
    factors: int = 0


def users_of_streams() -> list[ModuleType]:
    """Return the modules of the installed SGLang that take streams from `device_module`."""
    modules = []
    for name in _USERS:
        try:
            module = compat.resolve(name)
        except (ImportError, AttributeError):
            continue
        if hasattr(module, "device_module"):
            modules.append(module)
    return modules


def of_layer(n: int, x: torch.Tensor, dim: int) -> torch.Tensor:
    """Return what layer n has of this: layers differ in that odd ones have their heads in reverse order."""
    return x.flip(dim) if n % 2 else x


class HostTier:
    """Hold the simulated device of one world, and know what its host memory must hold.

    Attributes:
        device: the streams; host: our host pool.
        storage: the files behind it, None without.
        factors: of `HostOptions`.
        has_room: whether SGLang's controller finds memory of the device for loads; failed: loads for which it did not.
    """

    def __init__(self, options: HostOptions, pool, tree_maker: Callable, pages: Pages) -> None:
        self.device = Device(options.seed)
        self.enter()
        self._pool, self._pages, self.factors = pool, pages, options.factors
        pool.balance_tag = lambda: f"factors{options.factors}"
        pool.forward_stream = self.device.Stream(computes=True)
        self.tree = tree_maker(options)
        # SGLang keeps every such cache until the process ends, for its storage
        atexit.unregister(self.tree.shutdown)
        self.controller = calls.controller(self.tree)
        calls.set_fences(self.controller, pool.forward_stream)
        self.host = calls.host_pool(self.tree)
        assert self.host.page_num == options.pages, "the pages that were asked for"
        # one function on a CPU
        self._copy = self.host._load
        self.host._load = self.host._write = self._launch_copy
        self.storage = None
        if options.folder is not None:
            self.storage = StorageTier(options.folder, options.prefetch, self.tree, self.device)
        self.has_room, self.failed = True, 0
        self._load, self.controller.load = self.controller.load, self._load_or_fail

    def enter(self) -> None:
        """Let SGLang's streams be of this device, where another world had its turn."""
        for module in users_of_streams():
            module.device_module = self.device

    def _load_or_fail(self, *args, **kwargs) -> torch.Tensor | None:
        if self.has_room:
            return self._load(*args, **kwargs)
        self.failed += 1
        return None

    def _launch_copy(self, source, target, source_slots, target_slots, page_size) -> None:
        kind = "host" if target.data_ptr() == self.host.kv_buffer.data_ptr() else "device"
        run = partial(self._copy, source, target, source_slots, target_slots, page_size)
        self.device.launch(run, kind, frozenset((target_slots // page_size).tolist()))

    def launch_forward(
        self, layers: list[tuple[Callable, Callable]], consumer: int, *, graph: bool, begin: Callable = lambda: None
    ) -> None:
        """Queue the layers of a forward pass, each behind what its pool has it wait for.

        Args:
            layers: of each what returns its memory, and what runs with that; consumer: what SGLang's controller
                returned for the loads of this step; graph: whether SGLang's next calls wait for it only until it has
                read its inputs; begin: what comes before the layers.
        """
        forward, schedule = self._pool.forward_stream, self.device.current_stream()
        self.controller.layer_done_counter.set_consumer(consumer)
        with self.device.stream(forward):
            forward.wait_stream(schedule)
            begin()
            for memory, run in layers:
                self.device.launch(partial(run, memory()), "forward")
        if not graph:
            schedule.wait_stream(forward)

    def finish_forward(self) -> None:
        """Let the device run until the forward passes are done."""
        self._pool.forward_stream.synchronize()

    def _free_pages(self) -> list[int]:
        slots = torch.cat([self.host.free_slots, *self.host.release_slots])
        assert (slots.view(-1, PAGE) % PAGE == torch.arange(PAGE)).all(), "whole pages are given back"
        return (slots[::PAGE] // PAGE).tolist()

    def pages(self, memory: str) -> torch.Tensor:
        """Return what pages of the prefix cache hold, of "host" or of "device" memory, in the order of the tree."""
        slots = [both[memory] for _, both in self._nodes() if both[memory] is not None]
        return self._buffers()[memory][torch.cat(slots)[::PAGE] // PAGE] if slots else torch.empty(0)

    def _buffers(self) -> dict[str, torch.Tensor]:
        return {"host": self.host.kv_buffer, "device": self._pool.slab.flatten(2).transpose(0, 1)}

    def poison(self) -> None:
        """Fill free pages of the host with NaN."""
        self.host.kv_buffer[self._free_pages()] = 0xFF

    def check(self) -> None:
        """Every page of the host is free or in the tree, once; pages hold the record of the tokens of their path."""
        free = self._free_pages()
        assert len(set(free)) == len(free), "no page is free twice"
        if self.storage:
            self.storage.check(lambda path: self._records(path, len(path) - PAGE)[0])
        if not calls.shows_nodes(self.tree):
            return
        in_tree: dict[str, list[int]] = {"host": [], "device": []}
        waiting = {"host": self.device.pending("host"), "device": self.device.pending("device")}
        for kind, slots in calls.queued_copies(self.controller):
            waiting[kind] |= set((slots[::PAGE] // PAGE).tolist())
        buffers = self._buffers()
        found: dict[str, list[torch.Tensor]] = {"host": [], "device": []}
        pages: dict[str, list[int]] = {"host": [], "device": []}
        for records, slots in self._nodes():
            for kind, of_kind in slots.items():
                if of_kind is None:
                    continue
                ids = (of_kind[::PAGE] // PAGE).tolist()
                in_tree[kind] += ids
                known = [n for n, page in enumerate(ids) if page not in waiting[kind]]
                pages[kind] += [ids[n] for n in known]
                found[kind] += [records[n] for n in known]
        for kind, ids in pages.items():
            if ids:
                wrong = (buffers[kind][ids] != torch.stack(found[kind])).flatten(1).any(1)
                assert not wrong.any(), f"{kind} memory: pages {torch.tensor(ids)[wrong].tolist()} of {sorted(ids)}"
        known = free + in_tree["host"]
        assert len(set(known)) == len(known), "no page is free and in the tree, or in it twice"
        others = set(range(self.host.page_num)) - set(known)
        # what is read from files, by requests that wait for it or have stopped to
        assert not others or (self.storage and not self.storage.is_idle()), (free, in_tree["host"])

    def _nodes(self):
        """Yield the records of the pages of every node, each [layers, Hk * bytes], and the node's slots by memory."""
        for path, start, device, host in calls.nodes(self.tree):
            yield self._records(path, start), {"device": device, "host": host}

    def _records(self, path: list[int], start: int) -> list[torch.Tensor]:
        assert start % PAGE == len(path) % PAGE == 0, "nodes are whole pages"
        records, hashes = [], extend_hashes(0, path)
        for end in range(start + PAGE, len(path) + 1, PAGE):
            record = self._pages.find(hashes[end - 1])
            if record is None:
                record = History(path[:end], self._pages).records(end // PAGE)[-1]
            layers = range(self._pool.layer_num)
            records.append(torch.stack([of_layer(layer + self.factors, record, 0).flatten() for layer in layers]))
        return records
