# SPDX-License-Identifier: Apache-2.0
"""Faults of host memory and of the storage behind it, in the processes of an engine, while a test wants them.

A test and the engine share a folder. A fault is on while a file with its name is there, and leaves one to say that it
happened.
"""

from __future__ import annotations

import functools
import os
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from engine_plugin import add_to_engines
from sglang_kvarn import compat, hook

FOLDER = "KVARN_TEST_FAULTS"
# no memory of the device for a load; a load, and a read from the storage, that go on only when the fault ends
NO_ROOM, LATE_LOAD, LATE_READ = "no room", "late load", "late read"
# a storage that raises, by its method; a disk on which nothing fits
EXISTS, GET, SET, FULL_DISK = "exists", "get", "set", "full disk"
# of what a test waits for
LIMIT_SECONDS = 60


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> Faults:
    """Let the engines that this process starts have faults; return what turns them on and off."""
    add_to_engines(patch, folder, "host_faults:install")
    (shared := folder / "faults").mkdir()
    patch.setenv(FOLDER, str(shared))
    return Faults(shared)


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """Wait until it has.

    Raises:
        AssertionError: it did not.
    """
    for _ in range(LIMIT_SECONDS * 50):
        if happened():
            return
        time.sleep(0.02)
    raise AssertionError(f"expected {what} within {LIMIT_SECONDS} s")


class Faults:
    """Turn the faults of engines on and off."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def on(self, *names: str) -> Iterator[None]:
        """Let these happen in a block; each of them must."""
        for name in names:
            (self._folder / name).touch()
        yield
        for name in names:
            self.wait_for(name)
            (self._folder / name).unlink()
            _trace(self._folder, name).unlink()

    def wait_for(self, name: str) -> None:
        """Wait until a fault has happened."""
        wait_for(_trace(self._folder, name).exists, f"the fault {name!r}")


def _trace(folder: Path, name: str) -> Path:
    return folder / f"{name} happened"


def _happens(name: str) -> bool:
    """Whether a fault is on; leaves a trace if it is."""
    folder = Path(os.environ[FOLDER])
    if not (folder / name).exists():
        return False
    _trace(folder, name).touch()
    return True


def _wait_while(name: str) -> None:
    if _happens(name):
        wait_for(lambda: not (Path(os.environ[FOLDER]) / name).exists(), f"the end of the fault {name!r}")


def install() -> None:
    """Put the faults in place, for good; not in the process of the tests, where later ones want none."""
    if hook.is_first_process():
        return
    newest = compat.has_host_sources()
    controller = compat.resolve(
        "sglang.srt.mem_cache.hybrid_cache.hybrid_cache_controller.HybridCacheController"
        if newest
        else "sglang.srt.managers.cache_controller.HiCacheController"
    )
    controller.load = _or_none(controller.load)
    pool = compat.resolve("sglang_kvarn.host_pool.KVarNHostPool")
    pool.load_to_device_per_layer = _late(LATE_LOAD, pool.load_to_device_per_layer)
    files = compat.resolve("sglang.srt.mem_cache.hicache_storage.HiCacheFile")
    for name in (EXISTS, GET, SET):
        setattr(files, name, _or_raise(name, getattr(files, name)))
    files.get, files.set = _late(LATE_READ, files.get), _on_a_full_disk(files.set)


def _or_none(load: Callable) -> Callable:
    @functools.wraps(load)
    def fails(*args, **kwargs):
        return None if _happens(NO_ROOM) else load(*args, **kwargs)

    return fails


def _late(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def waits(*args, **kwargs):
        _wait_while(name)
        return function(*args, **kwargs)

    return waits


def _or_raise(name: str, function: Callable) -> Callable:
    @functools.wraps(function)
    def raises(*args, **kwargs):
        if _happens(name):
            raise RuntimeError(f"the storage has no {name} today")
        return function(*args, **kwargs)

    return raises


def _on_a_full_disk(store: Callable) -> Callable:
    """Return the function with a limit on the size of files, where a page does not fit: the system refuses the rest."""

    @functools.wraps(store)
    def fails(*args, **kwargs):
        if not _happens(FULL_DISK):
            return store(*args, **kwargs)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            return store(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return fails
