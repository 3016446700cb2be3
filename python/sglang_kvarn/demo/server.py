# SPDX-License-Identifier: Apache-2.0
"""Run `python -m sglang.launch_server` as a child process and end it whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console

# seconds until a server that neither answers nor dies is given up: large models load for minutes
START_LIMIT = 900
# seconds that a server gets to end by itself before its process group is killed
STOP_LIMIT = 10
LOG_TAIL = 30


def choose_port(wanted: int | None) -> int:
    """Return the wanted TCP port of 127.0.0.1, or one that was free a moment ago when none is wanted.

    Raises:
        RuntimeError: something listens on the wanted port.
    """
    with socket.socket() as probe:
        # a port of a server that ended a moment ago can be used again
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", wanted or 0))
        except OSError as error:
            raise RuntimeError(
                f"expected port {wanted} to be free, got {error}: name another --port"
            ) from None
        return probe.getsockname()[1]


def launch_command(arguments: list[str], port: int) -> list[str]:
    """Return the command that starts a stock SGLang server with these flags on 127.0.0.1:port."""
    command = [sys.executable, "-m", "sglang.launch_server", *arguments]
    return [*command, "--host", "127.0.0.1", "--port", str(port)]


class Server:
    """Hold a running server: its process, its log file and its address.

    Attributes:
        command: what was started.
        url: http://127.0.0.1:port.
        log: file with everything the server printed; kept after it ended.
        start_seconds: seconds from its start to its first healthy answer.
    """

    def __init__(self, command: list[str], port: int) -> None:
        self.command = command
        self.url = f"http://127.0.0.1:{port}"
        descriptor, name = tempfile.mkstemp(prefix="sglang-kvarn-demo-", suffix=".log")
        self.log = Path(name)
        self.start_seconds = 0.0
        with open(descriptor, "wb") as log:
            # a session of its own, so that Ctrl-C reaches the demo alone and one signal ends every process of
            # the server
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)

    def log_tail(self) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-LOG_TAIL:])

    def is_healthy(self) -> bool:
        """Return whether GET /health answers 200; the server generates one token for it."""
        try:
            return httpx.get(f"{self.url}/health", timeout=30, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def wait(self, console: Console) -> None:
        """Wait until the server is healthy, showing the time passed.

        Raises:
            RuntimeError: the server ended, or did not answer within `START_LIMIT`; with the end of its log.
        """
        started = time.monotonic()
        if not console.is_terminal:
            console.print("start the server ...", highlight=False)
        with console.status("start the server") as status:
            while not self.is_healthy():
                waited = time.monotonic() - started
                status.update(f"start the server ({waited:.0f} s)")
                if self.process.poll() is not None:
                    raise RuntimeError(
                        f"the server ended with code {self.process.returncode}: {self.where()}"
                    )
                if waited > START_LIMIT:
                    raise RuntimeError(f"the server did not answer within {START_LIMIT} s: {self.where()}")
                time.sleep(0.5)
        self.start_seconds = time.monotonic() - started

    def where(self) -> str:
        """Return what was started and the end of its log, for an error message."""
        return f"`{' '.join(self.command)}`, end of {self.log}:\n{self.log_tail()}"

    def stop(self) -> None:
        """End the server and every process it started; a second Ctrl-C ends them at once."""
        try:
            # to the server alone: where its children end first, it takes that for a crash
            self.process.terminate()
            self._wait_for_end()
        finally:
            # in any case: the group outlives its leader while a child of it runs
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self._wait_for_end()

    def _wait_for_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(STOP_LIMIT)


@contextlib.contextmanager
def running(command: list[str], port: int, console: Console) -> Iterator[Server]:
    """Start a server, yield it when it is healthy, and end it on the way out.

    Args:
        command: see `launch_command`.
        port: TCP port on 127.0.0.1 that the command listens on.
        console: where the progress is shown.
    """
    server = Server(command, port)
    try:
        server.wait(console)
        yield server
    finally:
        server.stop()
