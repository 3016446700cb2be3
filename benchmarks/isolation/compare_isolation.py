# SPDX-License-Identifier: Apache-2.0
"""Tenants on a kvarn cache and on the stock 16-bit cache: does KVarN change more answers under the same load?

    python -m benchmarks.isolation.compare_isolation --folder FOLDER        # one GPU: 5,000 requests a cache
    python -m benchmarks.isolation.compare_isolation --model tiny --requests 40 --tenants 8 --prompts-per-tenant 1
    python -m benchmarks.isolation.compare_isolation --hicache 8            # with HiCache behind both caches

Runs `stress_isolation` once per cache with the same prompts, order, drops and aborts: on a GPU all of them at
the same time, four small servers side by side, on a CPU one after the other. Matrix products round by the
batch, so that answers of a 16-bit cache part from those alone as well; KVarN passes if no secret leaked, no
request was lost, and its share of differing answers is not larger than that of the stock cache by more than two
standard errors of the difference. The expected answer of a prompt is what a server gives that is asked nothing else,
after the same prefix-cache hit (`oracle`).

Writes CACHE.json with the differing answers, and CACHE.log, to --folder. Exit status 1 if KVarN does not pass.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.common import cli, launch
from benchmarks.common.caches import BF16
from benchmarks.common.rows import Figure, Rows
from benchmarks.isolation import flags

STOCK = BF16
MODULE = "benchmarks.isolation.stress_isolation"
# graphs for the largest batch only as large as the rows, and nothing that a GPU host builds on first use
GPU_FLAGS = (
    "--mem-fraction-static 0.1 --cuda-graph-max-bs-decode 32 --disable-prefill-cuda-graph"
    " --sampling-backend pytorch --grammar-backend none"
)
# of a result, with its unit
FIGURES = {
    **dict.fromkeys(("requests", "plain", "disconnected", "aborted"), "requests"),
    "tokens": "tokens",
    "prefix hits": "requests",
    **dict.fromkeys(("hits in host memory", "hits in files"), "requests"),
    "retractions": "",
    **dict.fromkeys(("differing", "differing at a near tie"), "answers"),
    "differing prompts": "prompts",
    "leaked secrets": "",
    "failed": "requests",
    "seconds": "s",
    "requests per second": "requests/s",
    **dict.fromkeys(("seconds p50", "seconds p95", "seconds max"), "s"),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    on_gpu = torch.cuda.is_available()
    parser = cli.parser(__doc__)
    text = "Where the results of each cache and its log go."
    parser.add_argument("--folder", type=Path, default=Path("isolation-results"), help=text)
    cli.add_preset(parser)
    flags.add_load(
        parser,
        model="smollm2",
        dtype="bfloat16" if on_gpu else "float32",
        requests=5000,
        prompts_per_tenant=6,
        new_tokens=[8, 16, 32, 48],
        max_running_requests=24,
        # the rings of 12 requests of SmolLM2 in 16 bit and 6,144 tokens
        max_total_tokens=19_968,
        server_args=GPU_FLAGS if on_gpu else "",
    )
    default = "--attention-backend triton" if on_gpu else ""
    parser.add_argument("--stock-args", default=default, help="More flags of the stock servers; without it none.")
    cli.add_timeout(parser, 600 if on_gpu else 3600, "each cache")
    text = "Start one server at a time; a CPU always does."
    parser.add_argument("--one-by-one", action="store_true", default=not on_gpu, help=text)
    cli.add_output(parser, "Without it rows.csv in --folder.")
    return parser.parse_args(arguments)


def command(args: argparse.Namespace, cache: str) -> list[str]:
    """Return the command that loads one cache."""
    own = [*args.server_args.split(), *(["--page-size", "128", *args.stock_args.split()] * (cache == STOCK))]
    found = [sys.executable, "-m", MODULE, "--cache", cache, "--result", str(args.folder / f"{cache}.json")]
    for name in (*flags.LOAD, "timeout"):
        found += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    found += ["--new-tokens", *map(str, args.new_tokens), f"--server-args={' '.join(own)}"]
    # what is asked alone needs no host memory, which a stock cache does not have without a prefix cache
    behind = {"hicache": args.hicache, "hicache_files": args.hicache_files}
    found += launch.flags({name: value for name, value in behind.items() if value is not None})
    # what differs is compared here
    return [*found, "--allow", str(args.requests), *([] if args.one_by_one else ["--at-once"])]


def start(args: argparse.Namespace, cache: str) -> subprocess.Popen:
    """Start the load of one cache; its output goes to a log."""
    (args.folder / f"{cache}.json").unlink(missing_ok=True)
    with (args.folder / f"{cache}.log").open("wb") as log:
        return subprocess.Popen(command(args, cache), stdout=log, stderr=log)


def run(args: argparse.Namespace, caches: list[str]) -> dict[str, dict]:
    """Load every cache; return the results by cache.

    Raises:
        RuntimeError: a run ended without a result; with the end of its log.
    """
    processes = {}
    try:
        for cache in caches:
            processes[cache] = start(args, cache)
            if args.one_by_one:
                processes[cache].wait()
        for process in processes.values():
            process.wait()
    finally:
        # each ends its own servers
        for process in processes.values():
            process.terminate()
        for process in processes.values():
            process.wait()
    results = {}
    for cache in caches:
        path = args.folder / f"{cache}.json"
        if not path.exists():
            log = (args.folder / f"{cache}.log").read_text(errors="replace")
            raise RuntimeError(f"expected a result of {cache}, it ended without one:\n{log[-3000:]}")
        results[cache] = json.loads(path.read_text())
    return results


def share(result: dict) -> float:
    """Return the share of answers that differ from those alone, at a near tie or not."""
    return (result["differing"] + result["differing at a near tie"]) / result["requests"]


def verdict(kvarn: dict, stock: dict, tiers: Sequence[str] = ()) -> tuple[bool, str]:
    """Return whether KVarN passes, and the sentence that says by what.

    Args:
        tiers: behind the GPU's memory, as `FIGURES` names hits in them; without a hit nothing was tested.
    """
    mine, other = share(kvarn), share(stock)
    both = (mine + other) / 2
    # of the difference of two shares that are the same
    error = sqrt(both * (1 - both) * (1 / kvarn["requests"] + 1 / stock["requests"]))
    clean = not (kvarn["leaked secrets"] or kvarn["failed"])
    for tier in tiers:
        if not kvarn[tier]:
            return False, f"expected some {tier}, got none: lower --max-total-tokens or send more --requests"
    passed = clean and mine - other <= 2 * error
    said = f"{mine:.2%} of the answers differ from those alone, {other:.2%} with the 16-bit cache (+- {2 * error:.2%})"
    return passed, f"{said}; {kvarn['leaked secrets']} secrets leaked, {kvarn['failed']} requests lost"


def figures_of(result: dict) -> list[Figure]:
    """Return the rows of one cache."""
    found = ((name, result[name], unit) for name, unit in FIGURES.items() if result[name] is not None)
    return [Figure(name.replace(" ", "_"), value, unit) for name, value, unit in found]


def main() -> int:
    launch.end_on_signals()
    args = parse()
    rows = Rows(args.output or args.folder / "rows.csv", "isolation")
    args.folder.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    caches = [args.preset, STOCK]
    results = run(args, caches)
    title = f"up to {args.requests} requests of {args.tenants} tenants, {args.model}, {args.dtype}"
    table = Table("", *caches, title=title)
    for name in FIGURES:
        table.add_row(name, *(str(results[cache][name]) for cache in caches))
    Console(width=100).print(table)
    settings = {name: getattr(args, name) for name in flags.LOAD if name not in ("requests", "load_seconds")}
    if args.hicache is not None:
        settings["hicache"] = args.hicache
    if args.hicache_files is not None:
        settings["hicache_files"] = True
    if args.server_args not in ("", GPU_FLAGS):
        settings["server_args"] = args.server_args
    for cache, beside in zip(caches, reversed(caches), strict=True):
        rows.append(cache, settings | {"beside": beside}, figures_of(results[cache]))
    tiers = ["hits in files"] if args.hicache_files is not None else []
    # files are behind host memory
    tiers += ["hits in host memory"] if tiers or args.hicache is not None else []
    passed, said = verdict(*(results[cache] for cache in caches), tiers)
    print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s: {said}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
