# SPDX-License-Identifier: Apache-2.0
"""Start SGLang for a benchmark: an engine in a process of its own, or a server, and end it whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from sglang_kvarn.demo import server

CONSOLE = Console(stderr=True)
RESULT, PROGRESS = "BENCH_RESULT ", "BENCH_PROGRESS "


def flags(arguments: dict[str, Any]) -> list[str]:
    """Return arguments of SGLang's ServerArgs as flags of `launch_server`: {"page_size": 128} is --page-size 128."""
    found = []
    for name, value in arguments.items():
        found += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return found


def server_command(own_flags: list[str], port: int | None = None) -> tuple[list[str], int]:
    """Return the command of a stock server, and its port: a free one if none is given."""
    port = server.choose_port(port)
    return server.launch_command(own_flags, port), port


@contextlib.contextmanager
def starting(own_flags: list[str], *environment: str) -> Iterator[server.Server]:
    """Start a server on a free port and end it on the way out; the caller waits until it is healthy.

    Args:
        environment: further variables of the server, each as NAME=VALUE.
    """
    command, port = server_command(own_flags)
    # env(1) becomes the server: the process id stays
    started = server.Server(["env", *environment, *command] if environment else command, port)
    try:
        yield started
    finally:
        started.stop()


@contextlib.contextmanager
def running(own_flags: list[str], *environment: str) -> Iterator[server.Server]:
    """As `starting`, but yield the server when it is healthy.

    Raises:
        RuntimeError: the server ended, or did not answer; with the end of its log.
    """
    with starting(own_flags, *environment) as started:
        started.wait(CONSOLE)
        yield started


def end_on_signals() -> None:
    """Make Ctrl-C, SIGTERM and SIGHUP end this process in the usual way, so that its servers end too.

    A shell starts background jobs with Ctrl-C ignored.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, frame: sys.exit(128 + n))


def flush(engine: Any) -> None:
    """Empty the prefix cache; SGLang refuses while a request is in flight, its last step included.

    Raises:
        RuntimeError: the engine did not become idle within 30 s.
    """
    deadline = time.monotonic() + 30
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("expected the engine to be idle within 30 s: see what still runs in its log")
        time.sleep(0.1)


def report_progress(text: str) -> None:
    """Tell the parent process how far the engine of this one is."""
    print(PROGRESS + text, flush=True)


def report_result(result: dict[str, Any]) -> None:
    """Hand the result of this process to its parent."""
    print(RESULT + json.dumps(result), flush=True)


def run_alone(
    module: str, cache: str, timeout: float, show: Callable[[str], None] = lambda text: None
) -> dict[str, Any] | None:
    """Run a module again as this process runs it, but with `--one CACHE`, and return what it reported.

    Args:
        module: as after `python -m`; it gets the arguments of this process.
        timeout: seconds after which the process and its engine are killed.
        show: called with each line of `report_progress`.

    Returns:
        None if there is no result; then the end of the log is printed.
    """
    # the engine is in a process group of its own, which ends in `finally`
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    command = [sys.executable, "-m", module, *sys.argv[1:], "--one", cache]
    deadline = time.monotonic() + timeout
    with tempfile.NamedTemporaryFile("w+", suffix=f"-{cache}.log", delete=False) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                steps = _reported(log.name, PROGRESS)
                show(steps[-1] if steps else "start")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    found = _reported(log.name, RESULT)
    if not found:
        end = Path(log.name).read_text(errors="replace").splitlines()[-15:]
        print(f"{cache}: no result, the log is {log.name} and ends with", *end, sep="\n  ", file=sys.stderr)
        return None
    return json.loads(found[-1])


def run_each(
    module: str, caches: Sequence[str], timeout: float, of: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (cache, what it reported) of `run_alone` for each cache; one without a result is left out.

    Args:
        of: what a result holds, for who reads that there is none.

    Raises:
        SystemExit: the first cache, with which the others are compared, gave no result.
    """
    for cache in caches:
        with CONSOLE.status(cache) as status:
            result = run_alone(module, cache, timeout, lambda text, s=status, c=cache: s.update(f"{c}: {text}"))
        if result is not None:
            yield cache, result
        elif cache == caches[0]:
            raise SystemExit(f"expected {of} of {cache}, the first cache, got none: see its log")


def _reported(log: str, mark: str) -> list[str]:
    """Return what the lines of a log that begin with a mark say."""
    lines = Path(log).read_text(errors="replace").splitlines()
    return [line[len(mark) :] for line in lines if line.startswith(mark)]
