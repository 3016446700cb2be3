# SPDX-License-Identifier: Apache-2.0
"""How many agents fit on one server: multi-turn sessions over HTTP, cache against cache.

    python benchmarks/bench_agentic.py --concurrency 2 4 8 16 32 64 --output agentic-8b
    python benchmarks/bench_agentic.py --model tiny --caches kvarn --concurrency 1 3 --system-tokens 300 \\
        --task-tokens 200 --turns 2 --turn-tokens 150 --output-tokens 8 --think-seconds 0

Starts a stock SGLang server per cache, the same but for --kv-cache-dtype, and replays N sessions at a time: a
shared system prompt, a task, then turns of new tokens on top of the history, each after a pause. Reports time
to first token, time per token, the prompt tokens found in the cache against what a cache that never evicts
would find, and the cliff: the largest N up to which at least 0.9 of that is found. Random tokens from a seed
(or --trace), greedy, answers of fixed length. The cache is emptied before each N; the shared prompt is
computed before the clock starts. Clients start --stagger seconds after each other: without that the first
tasks of all of them queue up, and their wait is all that TTFT p95 shows.

--output keeps one JSON per cache and N; those that are there are not measured again. points.csv, turns.csv,
summary.json and agentic.png are written from all of them after each cache.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from dataclasses import replace
from pathlib import Path

from agentic import client as http
from agentic import counters, report, servers, store, summary, trace
from agentic.replay import Pace, replay
from agentic.workload import Shape, Workload
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rows import commit
from sglang_kvarn.demo import server as processes

CONSOLE = Console(stderr=True)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    default = Shape()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    servers.add_arguments(parser)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32], metavar="N")
    parser.add_argument(
        "--refine", type=int, default=0, help="more N between the cliff and the next, by bisection"
    )
    for name in ("system_tokens", "task_tokens", "turns", "turn_tokens", "output_tokens", "seed"):
        value = getattr(default, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=int, default=value, help="default %(default)s"
        )
    parser.add_argument(
        "--think-seconds", type=float, default=default.think_seconds, help="default %(default)s"
    )
    parser.add_argument(
        "--stagger", type=float, default=0.5, help="seconds between first starts, default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=1, help="sessions of each client, one after the other")
    parser.add_argument("--trace", type=Path, help="replay a file, one JSON per turn: see agentic/trace.py")
    parser.add_argument("--limit", type=float, default=900, help="seconds for one N, default %(default)s")
    parser.add_argument("--no-warmup", action="store_true", help="do not run two short sessions first")
    parser.add_argument(
        "--output", type=Path, default=Path("agentic-results"), help="folder, default %(default)s"
    )
    args = parser.parse_args(arguments)
    if min(args.concurrency) < 1:
        parser.error(f"expected numbers of sessions from 1, got {args.concurrency}")
    return args


def shape_of(args: argparse.Namespace, folder: Path) -> Shape:
    """Return the shape of the sessions for the vocabulary of the model."""
    names = ("system_tokens", "task_tokens", "turns", "turn_tokens", "output_tokens", "think_seconds", "seed")
    return Shape(**{name: getattr(args, name) for name in names}, vocabulary=servers.vocabulary(folder))


def make_workload(args: argparse.Namespace, shape: Shape, clients: int) -> Workload:
    """Return the sessions of that many clients, of the trace or synthetic."""
    sessions = clients * args.rounds
    return trace.load(args.trace, shape).take(sessions) if args.trace else shape.workload(sessions)


def settings(args: argparse.Namespace, shape: Shape) -> dict:
    """Return what all points of a sweep must share."""
    run = {name: getattr(args, name) for name in ("stagger", "rounds", "limit")}
    return {**servers.settings(args), **shape.as_dict(), "trace": str(args.trace or ""), **run}


async def facts_of(url: str) -> dict:
    """Return the sizes of a running server."""
    async with http.connect(url) as client:
        return await counters.server_facts(client)


def measure(server: processes.Server, workload: Workload, facts: dict, pace: Pace, label: str) -> dict:
    """Run one workload behind a progress bar and return its figures.

    Raises:
        RuntimeError: the server died.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task(label, total=sum(map(len, workload.sessions)))
        run = asyncio.run(
            replay(server.url, workload, facts["page_size"], pace, lambda: progress.advance(task))
        )
    if server.process.poll() is not None:
        raise RuntimeError(f"the server ended with code {server.process.returncode}: {server.where()}")
    return {
        **summary.point(run.rows, run.seconds, facts["pool_tokens"]),
        **run.server,
        "failed": len(run.errors),
        "cut_turns": run.cut_turns,
        "error_messages": run.errors[:10],
        "by_turn": summary.by_turn(run.rows),
        "turns": sorted(run.rows, key=lambda row: row["sent"]),
    }


def following(args: argparse.Namespace, cache: str, results: store.Store) -> int | None:
    """Return the next number of sessions: of the list, then between the cliff and the one after it."""
    missing = [n for n in sorted(set(args.concurrency)) if not results.has(cache, n)]
    if missing:
        return missing[0]
    shares = results.shares(cache)
    refined = len(shares.keys() - set(args.concurrency))
    return summary.between(shares) if refined < args.refine else None


def sweep(args: argparse.Namespace, cache: str, folder: Path, shape: Shape, results: store.Store) -> None:
    """Measure what is missing of one cache; start a server only if something is."""
    import torch

    sessions = following(args, cache, results)
    if sessions is None:
        CONSOLE.print(f"{cache}: all there", highlight=False)
        return
    port = processes.choose_port(None)
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", *servers.flags(cache, folder, args)]
    with processes.running(processes.launch_command(flags, port), port, CONSOLE) as server:
        facts = asyncio.run(facts_of(server.url))
        pool = f"{facts['pool_tokens']:,} tokens in pages of {facts['page_size']}"
        CONSOLE.print(f"{cache}: {pool}, log in {server.log}", highlight=False)
        facts |= {
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "torch": torch.__version__,
            "commit": commit(),
            "start_seconds": round(server.start_seconds, 1),
        }
        if not args.no_warmup:
            warm = replace(shape, seed=shape.seed + 1, turns=1, think_seconds=0)
            found = measure(server, warm.workload(2), facts, Pace(2, limit=args.limit), f"{cache} warm-up")
            if found["failed"]:
                raise RuntimeError(f"the warm-up failed: {found['error_messages'][0]}, log in {server.log}")
        while sessions is not None:
            workload = make_workload(args, shape, sessions)
            pace = Pace(sessions, args.stagger, args.limit)
            found = measure(server, workload, facts, pace, f"{cache} N={sessions}")
            head = {"cache": cache, "sessions": sessions, "model": args.model, **facts}
            results.save(head | found | {"server_command": server.command})
            sessions = following(args, cache, results)


def main(arguments: list[str] | None = None) -> int:
    """Run the sweep and return its exit status: 1 if a server failed, or requests did."""
    # a shell starts background jobs with Ctrl-C ignored; every signal ends the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, frame: sys.exit(128 + n))
    args = parse(arguments)
    status, points = 0, []
    try:
        folder = servers.model_folder(args.model)
        shape = shape_of(args, folder)
        make_workload(args, shape, max(args.concurrency) if args.trace else 0)
        results = store.Store(args.output, settings(args, shape))
        for cache in args.caches:
            try:
                sweep(args, cache, folder, shape, results)
            except RuntimeError as error:
                CONSOLE.print(f"{cache} failed: {error}", highlight=False, markup=False, soft_wrap=True)
                status = 1
            points = report.write(results, args.caches)
    except ValueError as error:
        CONSOLE.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        CONSOLE.print(f"stopped; the same command goes on in {args.output}", highlight=False)
        return 128 + signal.SIGINT
    report.show(points)
    return status or int(any(point["failed"] for point in points))


if __name__ == "__main__":
    sys.exit(main())
