# SPDX-License-Identifier: Apache-2.0
"""DP attention on a machine without a GPU: what SGLang takes of CUDA to gather the tokens of its ranks.

SGLang copies the tokens of a rank to and from those of all by a Triton kernel, which Triton's interpreter runs, and
gathers them by its collectives, on gloo. Around a collective is an operator of torch that SGLang makes for the device
of its platform, which for a platform of a plugin is not the CPU; here the collective is called without it.
"""

from __future__ import annotations

import contextlib
import random
import socket
from pathlib import Path

import pytest
import unpinned
from engine_plugin import add_to_engines
from sglang_kvarn import compat


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Let engines that this process starts have ranks with requests of their own."""
    add_to_engines(patch, folder, "dp_attention_on_cpu:install")
    # the plugin sets it for this number of ranks; the next engine of this process has another
    patch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")


def free_port() -> int:
    """Return a value for --port with which those are free that an engine takes: it keeps them until its process ends.

    They are below those that the system gives to connections, and no two processes draw the same.
    """
    first = compat.resolve("sglang.srt.server_args.ZMQ_TCP_PORT_DELTA")
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as taken:
            for n in range(8):
                taken.enter_context(socket.socket()).bind(("127.0.0.1", port + first + n))
            return port


def install() -> None:
    """Put the stand-ins in place, for good."""
    # for the tokens of each rank, in every step
    unpinned.install()
    group = compat.resolve("sglang.srt.distributed.parallel_state.GroupCoordinator")
    group.all_gather_into_tensor = group._all_gather_into_tensor
    group.reduce_scatter_tensor = group._reduce_scatter_tensor
