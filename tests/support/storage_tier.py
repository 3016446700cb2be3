# SPDX-License-Identifier: Apache-2.0
"""Files behind host memory: SGLang's storage of pages over our host pool, whose threads run late and in any order.

SGLang reads and writes files in threads. Here each thread is a stream of the simulated device (`streams`): what is put
into its queue is an operation, which runs SGLang's own function for one item, sooner or later. `Folder` knows what
every file must hold, and damages files; it outlives the world that wrote them, as the files of a server do.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Queue
from types import SimpleNamespace

import damages
import torch
from history import PAGE, History
from kvarn_kernels.record import tile
from sglang_kvarn import compat
from streams import Device

# what SGLang puts in and the function of the thread that takes it out
_THREADS = {
    "prefetch_queue": "prefetch_thread_func",
    "prefetch_buffer": "prefetch_io_aux_func",
    "prefetch_sync_queue": "prefetch_sync_thread_func",
    "backup_queue": "backup_thread_func",
}
_ONE_RANK = {"tp_rank": 0, "pp_rank": 0, "attn_tp_rank": 0, "attn_dp_rank": 0, "attn_cp_rank": 0, "attn_dcp_rank": 0}
# ways to damage the file of a page so that it is none: those of any file, and records of another type
DAMAGES = ("cut", "emptied", "zeroed", "retyped", "gone")


class NoThread:
    """A thread that never runs."""

    def __init__(self, *args, **kwargs) -> None:
        pass

    def start(self) -> None:
        pass

    def join(self, timeout: float | None = None) -> None:
        pass

    def is_alive(self) -> bool:
        return False


# in the place of the module from which SGLang takes threads
NO_THREADS = SimpleNamespace(Thread=NoThread, Event=threading.Event, Lock=threading.Lock)


class Work(Queue):
    """The queue of a thread; with each item an operation is launched on its stream."""

    def __init__(self, launch: Callable[[], None]) -> None:
        super().__init__()
        self._launch = launch

    def put(self, item: object, *args, **kwargs) -> None:
        super().put(item, *args, **kwargs)
        # None only wakes a thread up
        if item is not None:
            self._launch()


class OneRound:
    """As the event that stops SGLang's threads: not set when it is asked for the first time, set from then on."""

    def __init__(self) -> None:
        self._asked = False

    def is_set(self) -> bool:
        asked, self._asked = self._asked, True
        return asked


def plain_hash(token_ids: object, prior_digest: bytes | None, page_size: int | None = None) -> str | list[str]:
    """Return the key of a page, or of every page, as SGLang's C++ does, which would have to be built first."""
    raw = token_ids.raw_token_ids() if hasattr(token_ids, "raw_token_ids") else token_ids
    words = list(raw)[: len(token_ids)]
    size, keys, digest = page_size or max(len(words), 1), [], prior_digest or b""
    for start in range(0, len(words), size):
        digest = hashlib.sha256(digest + array("I", words[start : start + size]).tobytes()).digest()
        keys.append(digest.hex())
    return keys if page_size else keys[0]


def page_keys(tokens: Sequence[int]) -> list[str]:
    """Return the keys of the full pages of a sequence of tokens."""
    return plain_hash(tokens[: len(tokens) // PAGE * PAGE], None, PAGE)


def places() -> list[tuple[object, str]]:
    """Return the module and the name of what a world puts others in the place of: threads, and keys of pages."""
    utils = compat.resolve("sglang.srt.mem_cache.utils")
    threads = [(compat.resolve("sglang.srt.managers.cache_controller"), "threading")]
    return threads + ([(utils, "get_native_hash")] if hasattr(utils, "get_native_hash") else [])


@dataclass
class Folder:
    """Know what the files of a folder hold.

    Attributes:
        path: of the folder; sequences: all that was asked for, by whichever world.
        damaged: names of files that are no page any more.
    """

    path: Path
    sequences: list[History] = field(default_factory=list)
    damaged: set[str] = field(default_factory=set)
    _pages: dict[str, tuple[History, int]] = field(default_factory=dict)

    def names(self) -> list[str]:
        """Return the names of the files of pages."""
        return sorted(file.name for file in self.path.glob("*.bin"))

    def page_of(self, key: str) -> tuple[History, int]:
        """Return the sequence and the number of the page that has a key."""
        if key not in self._pages:
            for history in self.sequences:
                self._pages |= {key: (history, n) for n, key in enumerate(page_keys(history.tokens))}
        assert key in self._pages, f"a file has the key {key}, which is of no page of any request"
        return self._pages[key]

    def damage(self, name: str, way: str) -> None:
        """Damage a file, in one of DAMAGES."""
        file = self.path / name
        self.damaged.add(name)
        if way != "retyped":
            damages.DAMAGES[way](file)
        elif content := file.read_bytes():
            # the first record says that its first tokens are of the other type
            file.write_bytes(bytes([content[0] ^ tile.HEADER_BF16]) + content[1:])
        if way == "gone":
            # it may be written again
            self.damaged.discard(name)

    def wipe(self) -> None:
        """Delete every file."""
        for name in self.names():
            (self.path / name).unlink()
        self.damaged.clear()


class StorageTier:
    """Hold the storage of one world.

    Attributes:
        folder: its files.
        holds_writes: while this is set, no file is written.
    """

    def __init__(self, folder: Folder, policy: str, tree: object, device: Device) -> None:
        """Attach the files to a tree, as a request to a running server does.

        Args:
            policy: SGLang's --hicache-storage-prefetch-policy.
        """
        self.folder, self._tree, self._controller = folder, tree, tree.cache_controller
        self._checked: set[str] = set()
        self.holds_writes, self._late = False, []
        for place, own in zip(places(), (NO_THREADS, plain_hash), strict=True):
            setattr(*place, own)
        self._controller._create_sync_groups = list
        config = f'{{"prefetch_threshold": {PAGE}, "file_storage_path": "{folder.path}"}}'
        compat.get_parallel().override_permanently(**_ONE_RANK)
        done, message = tree.attach_storage_backend("file", config, "world", policy)
        assert done, message
        for name, function in _THREADS.items():
            launch = partial(self._launch, device, device.Stream(), name, function)
            setattr(self._controller, name, Work(launch))

    def _launch(self, device: Device, stream: object, name: str, function: str) -> None:
        if self.holds_writes and name == "backup_queue":
            self._late.append(partial(self._launch, device, stream, name, function))
            return
        with device.stream(stream):
            device.launch(partial(self._run, name, function), "storage")

    def write_on(self) -> None:
        """Let the files be written that were held back."""
        self.holds_writes, late, self._late = False, self._late, []
        for launch in late:
            launch()

    def _run(self, name: str, function: str) -> None:
        """Let the thread of a queue do what it does with one item."""
        controller, shared = self._controller, getattr(self._controller, name)
        if shared.empty():
            # a flush has emptied the queue
            return
        own: Queue = Queue()
        own.put(shared.get_nowait())
        stop = controller.storage_stop_event
        setattr(controller, name, own)
        controller.storage_stop_event = OneRound()
        try:
            getattr(controller, function)()
        finally:
            setattr(controller, name, shared)
            controller.storage_stop_event = stop

    @property
    def suffix(self) -> str:
        """Return the part of the names of files that is the same for every page."""
        return f"{self._controller.storage_backend.config_suffix}.bin"

    def is_idle(self) -> bool:
        """Return whether nothing is read or written, and nothing waits for SGLang to take notice of it."""
        names = (*_THREADS, "prefetch_hit_queue", "ack_prefetch_queue", "ack_backup_queue", "host_mem_release_queue")
        waits = any(not getattr(self._controller, name).empty() for name in names)
        return not (waits or self._tree.ongoing_prefetch or self._tree.ongoing_backup)

    def check(self, record_of: Callable[[list[int]], torch.Tensor]) -> None:
        """Check the files that this world could read: each holds the page that its key stands for, or was damaged.

        Args:
            record_of: returns what a page must hold, uint8 [layers, Hk * bytes], from the tokens that end with it.
        """
        names = set(self.folder.names())
        # some are gone
        self._checked &= names
        for name in names - self.folder.damaged - self._checked:
            # a state is seen by who goes on from it
            if not name.endswith(self.suffix) or name.endswith(f".{compat.PoolName.MAMBA}{self.suffix}"):
                continue
            history, page = self.folder.page_of(name.removesuffix(self.suffix))
            expected = record_of(history.tokens[: (page + 1) * PAGE]).flatten()
            content = torch.frombuffer(bytearray((self.folder.path / name).read_bytes()), dtype=torch.uint8)
            assert torch.equal(content, expected), f"file {name}: page {page} of a request"
            self._checked.add(name)
