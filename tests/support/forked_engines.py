# SPDX-License-Identifier: Apache-2.0
"""Processes of engines that are copies of one that has imported SGLang.

SGLang starts every process of an engine anew, and on two cores its imports take most of the time until an engine
answers. Here a server for each environment imports once, and forks (multiprocessing's "forkserver", whose processes
have one thread until SGLang starts its own).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from multiprocessing import context, forkserver
from typing import Any

import psutil
import pytest
from forked_server import IMPORTED
from sglang_kvarn import compat

# read when they are used, not when a module is imported, so that a process may differ in them from its server
_READ_LATE = (
    *("SGLANG_TEST_RETRACT", "SGLANG_TEST_RETRACT_INTERVAL", "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY"),
    *("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", "SGLANG_CPU_OMP_THREADS_BIND", "PYTEST_CURRENT_TEST"),
    # of each engine another one
    "SGLANG_RUN_ID",
)
_servers: dict[tuple[tuple[str, str], ...], forkserver.ForkServer] = {}


def _server() -> forkserver.ForkServer:
    """Return the server of this environment; it starts when it is first used."""
    key = tuple(sorted((name, value) for name, value in os.environ.items() if name not in _READ_LATE))
    if key not in _servers:
        _servers[key] = forkserver.ForkServer()
        _servers[key].set_forkserver_preload([f"sglang.srt.{name}" for name in IMPORTED])
    return _servers[key]


def _run(environment: dict[str, str], target: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
    """Run what SGLang wants to run, in the environment of the process that asked for it."""
    os.environ.clear()
    os.environ.update(environment)
    target(*args, **kwargs)


class _Process(context.ForkServerProcess):
    """A process as SGLang makes one, forked by the server of the environment that it is made in.

    Attributes:
        made: the list that new ones are added to.
    """

    made: list[_Process]

    def __init__(self, *, target: Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        super().__init__(target=_run, args=(dict(os.environ), target, args, kwargs or {}))
        self.made.append(self)

    def start(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _server().connect_to_new_process)
            super().start()


def _kill(processes: list[_Process]) -> None:
    """Kill processes and those that they have started."""
    for process in processes:
        if process.pid is None:
            # it was not started
            continue
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(process.pid)
            for child in [*own.children(recursive=True), own]:
                child.kill()
        process.join()


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Let engines that are started inside have processes that are forked, and be ended with them."""
    # its modules are imported first, since some derive classes from what is replaced
    engine = compat.resolve("sglang.srt.entrypoints.engine")
    made: list[_Process] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Process, "made", made, raising=False)
        patch.setattr("multiprocessing.Process", _Process)
        # it would kill the servers too
        patch.setattr(engine, "kill_process_tree", lambda *args, **options: _kill(made))
        try:
            yield
        finally:
            _kill(made)
