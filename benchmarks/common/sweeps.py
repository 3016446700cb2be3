# SPDX-License-Identifier: Apache-2.0
"""The servers of a sweep: stock SGLang, the same for every cache but for --kv-cache-dtype and what the user adds."""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from benchmarks.common import caches, launch, models
from benchmarks.common.launch import CONSOLE

# flags of `cli.add_sweep` without which results are not comparable
SIZES = ("mem_fraction_static", "chunked_prefill_size", "max_running_requests")
SETTINGS = (
    *("model", "hicache", *SIZES),
    *("server_args", "stock_args", "kvarn_args"),
)


def settings(args: argparse.Namespace) -> dict:
    """Return what makes results comparable, for the result files; sizes that are left to SGLang are empty."""
    empty = SIZES if args.only_the_flag else ()
    found = {name: "" if name in empty else getattr(args, name) for name in SETTINGS}
    return {name: "" if value is None else value for name, value in found.items()}


def flags(cache: str, args: argparse.Namespace) -> list[str]:
    """Return the flags of the server of a cache."""
    import torch

    found = models.arguments(args.model) | {
        "random_seed": 0,
        "enable_metrics": True,
        "log_level": "info",
        "log_level_http": "warning",
    }
    if not args.only_the_flag:
        found["chunked_prefill_size"] = args.chunked_prefill_size
        found["max_running_requests"] = args.max_running_requests
        if torch.cuda.is_available():
            found["mem_fraction_static"] = args.mem_fraction_static
            found["cuda_graph_max_bs_decode"] = args.max_running_requests
    found |= caches.host_memory(args.hicache)
    if args.model == models.TINY:
        found["dtype"] = "float32"
    more = args.stock_args if cache in caches.STOCK else args.kvarn_args
    own = launch.flags(found | caches.arguments(cache))
    return own + shlex.split(args.server_args) + shlex.split(more)


def each(names: Iterable[str], measure: Callable[[str], None]) -> int:
    """Measure one cache after the other and return the exit status: 1 if a server or a run of one failed."""
    status = 0
    for cache in names:
        try:
            measure(cache)
        except RuntimeError as error:
            CONSOLE.print(f"{cache} failed: {error}", highlight=False, markup=False, soft_wrap=True)
            status = 1
    return status


def run(body: Callable[[], int], folder: Path) -> int:
    """Run a sweep and return its exit status: a wrong argument is a sentence, Ctrl-C says how to go on.

    Args:
        body: the sweep, which returns its status or raises ValueError.
    """
    launch.end_on_signals()
    try:
        return body()
    except ValueError as error:
        CONSOLE.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        CONSOLE.print(f"stopped; the same command goes on in {folder}", highlight=False)
        return 128 + signal.SIGINT
