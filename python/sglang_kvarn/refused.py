# SPDX-License-Identifier: Apache-2.0
"""How a refusal reaches the user: as one sentence and exit code 1, or as a ValueError for a caller of the library."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

from sglang_kvarn import compat, settings

_STATUS = "refused by sglang-kvarn"
# seconds for the other ranks, which refuse too; until then they may still print
_JOIN_SECONDS = 10

# refusals that were raised. The traceback of one holds what SGLang's launch had made; if the garbage collector freed a
# ZeroMQ context there before its sockets, it would wait for them without end, so nothing is freed before the exit
_kept: list[BaseException] = []


class Refused(ValueError):
    """Say in one sentence what a kvarn cache does not serve: what was expected, what came, what to do."""


def print_sentence(result: Any, parser: Any) -> None:
    """End a command with the sentence alone, without a traceback. Hook after ``ServerArgs.add_cli_args``.

    Only a command parses its arguments: a program that calls ``sglang.Engine`` keeps its excepthook.
    """
    if getattr(sys.excepthook, "func", None) is not _print_sentence:
        sys.excepthook = functools.partial(_print_sentence, sys.excepthook)


def _print_sentence(
    other: Callable[..., Any], kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if isinstance(error, Refused):
        print(error, file=sys.stderr)
    else:
        other(kind, error, traceback)


def leave_scheduler(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """End a scheduler process that refuses. Hook around ``Scheduler.__init__``.

    SGLang answers any Exception of a scheduler with a traceback, and kills the process that started it.
    """
    try:
        return original(*args, **kwargs)
    except Refused as refusal:
        raise SystemExit(str(refusal)) from refusal


def launch_schedulers(
    original: Callable[..., Any],
    cls: type,
    server_args: Any,
    port_args: Any,
    run_scheduler_process_func: Callable[..., None],
    **kwargs: Any,
) -> Any:
    """Let schedulers send their refusal to this process, and leave no process behind.

    Hook around ``Engine._launch_scheduler_processes``. With replicas (``--dp-size``) and with DP attention a controller
    reads what schedulers send, so there the scheduler prints its sentence.
    """
    if settings.preset_of(server_args) is None or compat.has_controller(compat.resolved_arguments(server_args)):
        return original(cls, server_args, port_args, run_scheduler_process_func, **kwargs)
    others = set(multiprocessing.active_children())
    run = functools.partial(_run_scheduler, run_scheduler_process_func)
    launched, processes = original(cls, server_args, port_args, run, **kwargs)
    launched.wait_for_ready = functools.partial(_wait, launched.wait_for_ready, others)
    return launched, processes


def _wait(wait_for_ready: Callable[[], None], others: set[Any]) -> None:
    """Wait for the schedulers; where they refuse, end every child process but the others."""
    try:
        wait_for_ready()
    except Refused as refusal:
        # the detokenizer waits for messages, and a program for its children
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
            process.join()
        _kept.append(refusal)
        raise


def _run_scheduler(run: Callable[..., None], *args: Any, **kwargs: Any) -> None:
    """Run a scheduler; the target of a process, with the arguments of SGLang's ``run_scheduler_process``."""
    pipe = inspect.signature(run).bind(*args, **kwargs).arguments["pipe_writer"]
    try:
        run(*args, **kwargs)
    except SystemExit as stop:
        if not isinstance(stop.__cause__, Refused):
            raise
        pipe.send({"status": _STATUS, "sentence": str(stop.__cause__)})


def raise_refusal(original: Callable[..., Any], scheduler_pipe_readers: list[Any], scheduler_procs: list[Any]) -> Any:
    """Raise here what a scheduler refused. Hook around ``_wait_for_scheduler_ready``."""
    return original([_Reader(reader, scheduler_procs) for reader in scheduler_pipe_readers], scheduler_procs)


class _Reader:
    """The reading end of the pipe of a scheduler, as far as SGLang uses it."""

    def __init__(self, reader: Any, processes: list[Any]) -> None:
        self._reader, self._processes = reader, processes

    def poll(self, timeout: float) -> bool:
        return self._reader.poll(timeout=timeout)

    def recv(self) -> Any:
        message = self._reader.recv()
        if message["status"] != _STATUS:
            return message
        for process in self._processes:
            process.join(_JOIN_SECONDS)
            process.kill()
        raise Refused(message["sentence"])
