# SPDX-License-Identifier: Apache-2.0
"""Tenants on a kvarn cache and on the stock 16-bit cache: does KVarN change more answers under the same load?

    python benchmarks/compare_isolation.py FOLDER                                 # one GPU: 5,000 requests a cache
    python benchmarks/compare_isolation.py FOLDER --model tiny --requests 40 --tenants 8 --prompts 1

Runs `stress_isolation.py` once per cache with the same prompts, order, drops and aborts: on a GPU all of them at
the same time, four small servers side by side, on a CPU one after the other. Matrix products round by the
batch, so that answers of a 16-bit cache part from those alone as well; KVarN passes if no secret leaked, no
request was lost, and its share of differing answers is not larger than that of the stock cache by more than two
standard errors of the difference. The expected answer of a prompt is what a server gives that is asked nothing else,
after the same prefix-cache hit (`stress.oracle`).

Writes FOLDER/isolation.csv, one row per cache, FOLDER/CACHE.json with the differing answers, and CACHE.log.
Exit status 1 if KVarN does not pass.
"""

from __future__ import annotations

import argparse
import csv
import json
import signal
import subprocess
import sys
import time
from math import sqrt
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

STOCK = "auto"
SCRIPT = Path(__file__).with_name("stress_isolation.py")
# graphs for the largest batch only as large as the rows, and nothing that a GPU host builds on first use
GPU_FLAGS = (
    "--mem-fraction-static 0.1 --cuda-graph-max-bs-decode 32 --disable-prefill-cuda-graph"
    " --sampling-backend pytorch --grammar-backend none"
)
ROWS = (
    *("requests", "plain", "disconnected", "aborted", "tokens", "prefix hits", "retractions"),
    *("differing", "differing at a near tie", "differing prompts", "leaked secrets", "failed"),
    *("seconds", "requests per second", "seconds p50", "seconds p95", "seconds max"),
)


def arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--model", default="smollm2", help="tiny, smollm2, or a folder")
    parser.add_argument("--dtype", default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--kvarn", default="kvarn", help="the preset")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=6, help="prompts of each tenant")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 16, 32, 48])
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of the load, after which no request is sent any more"
    )
    parser.add_argument("--rows", type=int, default=24, help="--max-running-requests")
    parser.add_argument("--pool", type=int, default=6144, help="--max-total-tokens")
    parser.add_argument("--server-args", default=GPU_FLAGS if on_gpu else "", help="more flags of every server")
    parser.add_argument(
        "--stock-args",
        default="--attention-backend triton" if on_gpu else "",
        help="more flags of the stock servers",
    )
    parser.add_argument("--limit", type=int, default=600 if on_gpu else 3600, help="seconds of each cache")
    parser.add_argument(
        "--one-by-one", action="store_true", default=not on_gpu, help="one server at a time"
    )
    return parser.parse_args()


def command(args: argparse.Namespace, cache: str) -> list[str]:
    """Return the command that loads one cache."""
    flags = [*args.server_args.split(), *(["--page-size", "128", *args.stock_args.split()] * (cache == STOCK))]
    found = [sys.executable, str(SCRIPT), "--preset", cache, "--json", str(args.folder / f"{cache}.json")]
    for name in ("model", "dtype", "requests", "tenants", "prompts", "rows", "pool", "limit", "seconds"):
        found += [f"--{name}", str(getattr(args, name))]
    found += ["--new-tokens", *map(str, args.new_tokens), f"--server-args={' '.join(flags)}"]
    # what differs is compared here
    return [*found, "--allow", str(args.requests), *([] if args.one_by_one else ["--at-once"])]


def launch(args: argparse.Namespace, cache: str) -> subprocess.Popen:
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
            processes[cache] = launch(args, cache)
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


def verdict(kvarn: dict, stock: dict) -> tuple[bool, str]:
    """Return whether KVarN passes, and the sentence that says by what."""
    mine, other = share(kvarn), share(stock)
    both = (mine + other) / 2
    # of the difference of two shares that are the same
    error = sqrt(both * (1 - both) * (1 / kvarn["requests"] + 1 / stock["requests"]))
    clean = not (kvarn["leaked secrets"] or kvarn["failed"])
    passed = clean and mine - other <= 2 * error
    said = f"{mine:.2%} of the answers differ from those alone, {other:.2%} with the 16-bit cache (+- {2 * error:.2%})"
    return passed, f"{said}; {kvarn['leaked secrets']} secrets leaked, {kvarn['failed']} requests lost"


def main() -> int:
    args = arguments()
    args.folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    started = time.monotonic()
    caches = [args.kvarn, STOCK]
    results = run(args, caches)
    title = f"up to {args.requests} requests of {args.tenants} tenants, {args.model}, {args.dtype}"
    table = Table("", *caches, title=title)
    for name in ROWS:
        table.add_row(name, *(str(results[cache][name]) for cache in caches))
    Console(width=100).print(table)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    with (args.folder / "isolation.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["device", "model", "dtype", "cache", *ROWS])
        for cache in caches:
            writer.writerow([device, args.model, args.dtype, cache, *(results[cache][name] for name in ROWS)])
    passed, said = verdict(*(results[cache] for cache in caches))
    print(f"{'passed' if passed else 'FAILED'} in {time.monotonic() - started:.0f} s: {said}")
    return int(not passed)


if __name__ == "__main__":
    sys.exit(main())
