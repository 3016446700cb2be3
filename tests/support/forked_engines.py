# SPDX-License-Identifier: Apache-2.0
"""Processes of engines that are copies of one that has imported SGLang.

SGLang starts every process of an engine anew, and on two cores its imports take most of the time until an engine
answers. Here a server for each environment imports once, and forks (multiprocessing's "forkserver", whose processes
have one thread until SGLang starts its own).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from multiprocessing import context, forkserver, reduction
from typing import Any

import psutil
import pytest
from forked_server import IMPORTED
from sglang_kvarn import compat

# read when they are used, not when a module is imported, so that a process may differ in them from its server; so are
# all of the plugin and of its tests
_READ_LATE = (
    *("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR"),
    *("SGLANG_CPU_OMP_THREADS_BIND", "TORCH_EXTENSIONS_DIR", "PYTEST_CURRENT_TEST"),
    # of each engine another one
    "SGLANG_RUN_ID",
)
_servers: dict[tuple[tuple[str, str], ...], forkserver.ForkServer] = {}


def _environment() -> tuple[tuple[str, str], ...]:
    """Return the variables that imports may have read."""
    early = (name for name in os.environ if name not in _READ_LATE and not name.startswith("KVARN_"))
    return tuple((name, os.environ[name]) for name in sorted(early))


def _server() -> forkserver.ForkServer:
    """Return the server of this environment; it starts when it is first used."""
    key = _environment()
    if key not in _servers:
        _servers[key] = forkserver.ForkServer()
        _servers[key].set_forkserver_preload([f"sglang.srt.{name}" for name in IMPORTED])
    return _servers[key]


def stop_others() -> None:
    """Stop the servers of other environments than that of now: each has a GiB.

    One ends by itself only after every process that it forked, and one that a failed engine left would be waited for.
    """
    for key in [key for key in _servers if key != _environment()]:
        server = _servers.pop(key)
        if server._forkserver_pid is not None:
            os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()


class _Output:
    """Take a descriptor of the process that asks for another one into that one."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __getstate__(self) -> Any:
        return reduction.DupFd(self.descriptor)

    def __setstate__(self, found: Any) -> None:
        self.descriptor = found.detach()


def _run(
    environment: dict[str, str],
    outputs: list[_Output],
    target: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
) -> None:
    """Run what SGLang wants to run as the process that asked for it would: its environment, its output and errors.

    It leads a group of its own, by which what it starts is found when it has ended by itself. What it starts are
    copies of it: the schedulers of ranks with requests of their own come from a process that only starts them.
    """
    os.setpgid(0, 0)
    multiprocessing.set_start_method("fork", force=True)
    os.environ.clear()
    os.environ.update(environment)
    for number, output in enumerate(outputs, 1):
        os.dup2(output.descriptor, number)
    target(*args, **kwargs)


class _Process(context.ForkServerProcess):
    """A process as SGLang makes one, forked by the server of the environment that it is made in.

    Attributes:
        made: the list that new ones are added to.
    """

    made: list[_Process]

    def __init__(self, *, target: Callable[..., Any], args: tuple = (), kwargs: dict[str, Any] | None = None) -> None:
        outputs = [_Output(1), _Output(2)]
        super().__init__(target=_run, args=(dict(os.environ), outputs, target, args, kwargs or {}))
        self.made.append(self)

    def start(self) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(forkserver, "connect_to_new_process", _server().connect_to_new_process)
            super().start()


def _kill(processes: list[_Process]) -> None:
    """Kill processes and those that they have started, also those whose parent has ended."""
    for process in processes:
        if process.pid is None:
            # it was not started
            continue
        if process.exitcode is None:
            with contextlib.suppress(psutil.NoSuchProcess):
                own = psutil.Process(process.pid)
                for child in [*own.children(recursive=True), own]:
                    child.kill()
            process.join()
        # the number of a group is not given to a new process while one of the group lives
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def _fail(*args: Any, **options: Any) -> None:
    """Fail the test that waits; of what a loop's callback raises, this alone leaves the loop."""
    raise SystemExit("a process of the engine died, see its log")


@contextlib.contextmanager
def forked() -> Iterator[None]:
    """Let engines that are started inside have processes that are forked, and be ended with them."""
    # its modules are imported first, since some derive classes from what is replaced
    engine = compat.resolve("sglang.srt.entrypoints.engine")
    tokenizer_manager = compat.resolve("sglang.srt.managers.tokenizer_manager")
    made: list[_Process] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Process, "made", made, raising=False)
        patch.setattr("multiprocessing.Process", _Process)
        # it would kill the servers too
        patch.setattr(engine, "kill_process_tree", lambda *args, **options: _kill(made))
        # it would kill pytest, from the loop that a test waits for, where a process ends while requests run
        patch.setattr(tokenizer_manager, "kill_process_tree", _fail)
        try:
            yield
        finally:
            _kill(made)
