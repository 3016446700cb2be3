# SPDX-License-Identifier: Apache-2.0
"""A prefill server and a decode server of a tiny model on this machine, and what a client sends to both.

On a machine with GPUs each server has one of its own, and mooncake moves the bytes; on a CPU a stand-in does.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import engine_plugin
import forked_server
import httpx
import tiny_engines
import torch
import transfer_engine_on_cpu
from host_faults import wait_for
from tiny_engines import DTYPE, ON_GPU, ROWS

from benchmarks.common import tiny_model

HOST, LIMIT_SECONDS = "127.0.0.1", 400
OPTIONS = {
    "kv-cache-dtype": "kvarn",
    "dtype": str(DTYPE).removeprefix("torch."),
    "max-running-requests": ROWS,
    "chunked-prefill-size": 256,
    "random-seed": 0,
    "log-level": "info",
    "num-reserved-decode-tokens": 128,
}
# idle schedulers would take all cores, and whoever asks a busy one would wait
FLAGS = ("skip-tokenizer-init", "skip-server-warmup", "enable-cache-report", "sleep-on-idle")
ENVIRONMENT = {
    "MOONCAKE_PROTOCOL": "tcp",
    "SGLANG_HOST_IP": HOST,
    # of a server that is gone; the first of these may come late on a busy machine
    "SGLANG_DISAGGREGATION_HEARTBEAT_MAX_FAILURE": "3",
    "SGLANG_DISAGGREGATION_HEARTBEAT_INTERVAL": "2",
    # of pages that a server which is gone cannot say it has stopped writing to
    "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE_TIMEOUT": "5",
    # a receiver to which a transfer has failed is tried again
    "SGLANG_ENABLE_FAILED_SESSION_PROBE": "1",
    "SGLANG_FAILED_SESSION_PROBE_INTERVAL_S": "0.5",
}
if ON_GPU:
    OPTIONS |= {"mem-fraction-static": 0.3, "cuda-graph-max-bs-decode": ROWS}
    FLAGS = (*FLAGS, "disable-prefill-cuda-graph")
# of a decode server that takes running requests back at every few steps, and of one that counts every page in each
OFTEN = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "5"}
CHECKED = {"SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "2"}
# how servers start: on a GPU as for a user
_SERVER = ["-m", "sglang.launch_server"] if ON_GPU else [forked_server.__file__]
_rooms = count(1)


def pool(model: str, preset: str, *, pages: int, rows: int, drafts: int = 1) -> dict[str, int]:
    """Return the option of a server with a pool of so many pages beside the rings of some requests, in 32 bits."""
    return {"max-total-tokens": (rows * tiny_engines.ring_pages(model, preset, 4, drafts) + pages) * 128}


def free_port() -> int:
    """Return a port that nobody listens to."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return found.getsockname()[1]


class Server:
    """One server and its process.

    Attributes:
        url: where it listens; log: the file that it writes to.
    """

    def __init__(self, folder: Path, name: str, model: str, environment: dict[str, str], **options: Any) -> None:
        port = free_port()
        self.url, self.log = f"http://{HOST}:{port}", folder / f"{name}.log"
        chosen = OPTIONS | {"model-path": model, "host": HOST, "port": port} | options
        flags = [f"--{flag}" for flag in FLAGS]
        command = [sys.executable, *_SERVER, *flags]
        for key, value in chosen.items():
            # True: a flag without a value
            command += [f"--{key}", *([] if value is True else [str(value)])]
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )

    def wait_until_ready(self) -> None:
        """Wait until it answers."""
        for _ in range(LIMIT_SECONDS * 5):
            assert self._process.poll() is None, self.log.read_text()[-3000:]
            try:
                if httpx.get(f"{self.url}/server_info").status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def generate(self, room: int, bootstrap_port: int, tokens: list[int], sampling: dict, **fields: Any) -> dict:
        """Return what it answers: the output, or SGLang's error."""
        body = {"input_ids": tokens, "sampling_params": sampling, "bootstrap_room": room}
        body |= {"bootstrap_host": HOST, "bootstrap_port": bootstrap_port} | fields
        return httpx.post(f"{self.url}/generate", json=body, timeout=LIMIT_SECONDS).json()

    def _get(self, path: str) -> dict[str, Any]:
        return httpx.get(f"{self.url}/{path}", timeout=LIMIT_SECONDS).json()

    def facts(self) -> dict[str, Any]:
        """Return what the server says of its cache."""
        return self._get("server_info")["internal_states"][0]["kvarn"]

    def load(self, section: str) -> dict[str, Any]:
        """Return what SGLang says of its load, by the name of a section."""
        return self._get("v1/loads")["loads"][0][section]

    def abort(self, rid: str) -> None:
        httpx.post(f"{self.url}/abort_request", json={"rid": rid})

    def flush(self) -> None:
        """Empty the prefix cache, once the server is idle."""
        wait_for(lambda: httpx.post(f"{self.url}/flush_cache").status_code == 200, f"{self.url} to be idle")

    def stop(self) -> None:
        """End all its processes, without grace."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Pair:
    """Both servers, and a client that sends each request to both, as a router does.

    Attributes:
        prefill, decode: the servers; bootstrap_port: where a decode server asks for its peers.
        folder: where faults are turned on.
    """

    def __init__(self, prefill: Server, decode: Server, bootstrap_port: int, folder: Path) -> None:
        self.prefill, self.decode, self.folder = prefill, decode, folder
        self.bootstrap_port = bootstrap_port
        self._clients = ThreadPoolExecutor(64)

    def send(
        self,
        tokens: list[int],
        new_tokens: int,
        *,
        bootstrap_port: int | None = None,
        in_turn: bool = False,
        **fields: Any,
    ) -> tuple[Future, Future]:
        """Send a request; return what the prefill and the decode server will answer.

        Args:
            in_turn: to the decode server once the prefill server has it, while that has no other one. What a decode
                server tells of a request that the prefill server does not have yet is lost on it.
        """
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        request = (next(_rooms), bootstrap_port or self.bootstrap_port, tokens, sampling)
        sent = self._clients.submit(self.prefill.generate, *request, **fields)
        if in_turn:
            wait_for(
                lambda: self.prefill.load("disaggregation")["prefill_bootstrap_queue_reqs"] > 0, "the prefill server"
            )
        return sent, self._clients.submit(self.decode.generate, *request, **fields)

    def ask(self, tokens: list[int], new_tokens: int, **fields: Any) -> dict[str, Any]:
        """Return what the decode server answers."""
        _, answer = self.send(tokens, new_tokens, **fields)
        return answer.result()

    @contextmanager
    def fault(self, name: str) -> Iterator[None]:
        """Let transfers fail in a block, as `transfer_engine_on_cpu` names it."""
        (self.folder / name).touch()
        yield
        (self.folder / name).unlink()
        (self.folder / f"{name} happened").unlink(missing_ok=True)

    def wait_for_fault(self, name: str) -> None:
        """Wait until it has happened."""
        wait_for((self.folder / f"{name} happened").exists, f"the fault {name!r}")

    def sent(self) -> list[dict[int, int]]:
        """Return, and forget, the bytes of each transfer by the size of the region that they come from."""
        file = self.folder / transfer_engine_on_cpu.SENT
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [{int(region): size for region, size in json.loads(line).items()} for line in lines]

    def expect_empty(self) -> None:
        """Wait until neither server holds a ring, and the decode server no page.

        Raises:
            AssertionError: they do: something was lost.
        """
        for server in (self.prefill, self.decode):
            wait_for(lambda server=server: server.facts()["rings_in_use"] == 0, f"no ring in use at {server.url}")
        wait_for(lambda: self.decode.facts()["pages_in_use"] == 0, "no page in use at the decode server")


def check(
    model: str,
    tokens: list[int],
    answer: dict[str, Any],
    new_tokens: int,
    near: float = 0.0,
    preset: str = OPTIONS["kv-cache-dtype"],
) -> int:
    """Compare an answer with the oracle's; return how much came from the prefix cache of the prefill server.

    Args:
        near: by how much the oracle's logit of a token may be below that of its best one.
    """
    assert "output_ids" in answer, answer
    cached, found = answer["meta_info"]["cached_tokens"], answer["output_ids"]
    # greedy, so that each token is the best one behind those before it
    expected = tiny_model.logits(model, tokens + found[:-1], preset, cached=cached)[len(tokens) - 1 :]
    below = expected.amax(-1) - expected.gather(-1, torch.tensor(found)[:, None])[:, 0]
    assert (below.max() <= near, len(found)) == (True, new_tokens), (cached, below.tolist())
    return cached


def answers_together(
    pair: Pair, model: str, prompts: list[list[int]], new_tokens: int, near: float = 0.0
) -> list[dict[str, Any]]:
    """Send requests at once; return the answers, which are the oracle's as in `check`, some of them retracted."""
    found = [answer.result() for _, answer in [pair.send(tokens, new_tokens) for tokens in prompts]]
    for tokens, answer in zip(prompts, found, strict=True):
        check(model, tokens, answer, new_tokens, near)
    assert sum(answer["meta_info"]["num_retractions"] for answer in found) > 0
    return found


def leaves_nothing_where_it_is_aborted(pair: Pair, model: str, near: float = 0.0) -> None:
    """Abort a request while it is sent, and check that servers which count what they hold lose nothing; as `check`."""
    with pair.fault(transfer_engine_on_cpu.LATE):
        _, answer = pair.send(tiny_model.prompt(300, seed=20), 8, rid="aborted")
        pair.wait_for_fault(transfer_engine_on_cpu.LATE)
        pair.decode.abort("aborted")
        assert "Abort" in json.dumps(answer.result())
    works(pair, model, near)
    # both servers count once they are idle, and end where something is lost
    for server in (pair.prefill, pair.decode):
        server.flush()
    works(pair, model, near)


def refuse_each_other(pair: Pair, sentence: str) -> None:
    """Check that requests fail at both servers, with the sentence of the one that answers, and that both go on."""
    for _ in range(2):
        sent, answer = pair.send(tiny_model.prompt(300, seed=28), 8, in_turn=True)
        assert sentence in json.dumps(answer.result())
        assert "output_ids" not in sent.result()
    pair.expect_empty()


def works(pair: Pair, model: str, near: float = 0.0) -> None:
    """Check that a request is answered right, and leaves nothing behind; as `check`."""
    tokens = tiny_model.prompt(140, seed=90)
    check(model, tokens, pair.ask(tokens, 4), 4, near)
    pair.expect_empty()


def environment(folder: Path, stand_ins: Sequence[str] = (), **variables: str) -> dict[str, str]:
    """Return the environment of a server; on a CPU faults of its transfers are in the folder.

    Args:
        stand_ins: modules of the tests whose `install` puts torch in the place of SGLang's kernels on a CPU, in an
            `ENVIRONMENT` if they have one.
    """
    if ON_GPU:
        return os.environ | ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables
    if not (plugins := folder / "plugins").exists():
        for module in ("transfer_engine_on_cpu", *stand_ins):
            engine_plugin.make(plugins, f"{module}:install")
    path = os.pathsep.join([str(plugins), *filter(None, sys.path)])
    own = {"PYTHONPATH": path, transfer_engine_on_cpu.FOLDER: str(folder)}
    for module in stand_ins:
        own |= getattr(importlib.import_module(module), "ENVIRONMENT", {})
    return os.environ | ENVIRONMENT | own | variables


@contextmanager
def start(
    folder: Path,
    model: str,
    *,
    prefill: dict[str, Any] | None = None,
    decode: dict[str, Any] | None = None,
    stand_ins: Sequence[str] = (),
    **common: Any,
) -> Iterator[Pair]:
    """Run both servers.

    Args:
        prefill, decode: options of one of them, or, in capitals, variables of its environment; common: of both.
        stand_ins: as in `environment`.
    """
    bootstrap = free_port()
    with ExitStack() as stack:
        servers = []
        for number, (mode, own) in enumerate((("prefill", prefill), ("decode", decode))):
            chosen = ({"CUDA_VISIBLE_DEVICES": str(number)} if ON_GPU else {}) | common | (own or {})
            variables = {key: value for key, value in chosen.items() if key.isupper()}
            options = {key: value for key, value in chosen.items() if not key.isupper()}
            options |= {"disaggregation-mode": mode, "disaggregation-bootstrap-port": bootstrap}
            servers.append(Server(folder, mode, model, environment(folder, stand_ins, **variables), **options))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait_until_ready()
        yield Pair(*servers, bootstrap, folder)
