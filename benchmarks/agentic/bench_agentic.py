# SPDX-License-Identifier: Apache-2.0
"""How many agents fit on one server: multi-turn sessions over HTTP, cache against cache.

    python -m benchmarks.agentic.bench_agentic --concurrency 2 4 8 16 32 64 --folder agentic-8b
    python -m benchmarks.agentic.bench_agentic --model tiny --caches kvarn --concurrency 1 3 --system-tokens 300 \\
        --task-tokens 200 --turns 2 --turn-tokens 150 --output-tokens 8 --think-seconds 0

Starts a stock SGLang server per cache, the same but for --kv-cache-dtype, and replays N sessions at a time: a
shared system prompt, a task, then turns of new tokens on top of the history, each after a pause. Reports time
to first token, time per token, the prompt tokens found in the cache against what a cache that never evicts
would find, and the cliff: the largest N up to which at least 0.9 of that is found. Random tokens from a seed
(or --trace), greedy, answers of fixed length. The cache is emptied before each N; the shared prompt is
computed before the clock starts. Clients start --stagger seconds after each other: without that the first
tasks of all of them queue up, and their wait is all that TTFT p95 shows.

--folder keeps one JSON per cache and N; those that are there are not measured again. summary.json and agentic.png are
written from all of them after each cache.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from sglang_kvarn.demo.server import Server

from benchmarks.agentic import client as http
from benchmarks.agentic import counters, report, summary, trace
from benchmarks.agentic.replay import Pace, replay
from benchmarks.agentic.workload import Shape, Workload
from benchmarks.common import cli, launch, models, store, sweeps
from benchmarks.common.launch import CONSOLE
from benchmarks.common.rows import Rows

# field of the workload's shape -> what it is
LENGTHS = {
    "system_tokens": "Tokens of the prompt that all sessions share.",
    "task_tokens": "Tokens of the first task of a session.",
    "turns": "Turns after the task.",
    "turn_tokens": "New tokens of a turn.",
    "output_tokens": "Tokens of an answer.",
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    default = Shape()
    parser = cli.parser(__doc__)
    cli.add_sweep(parser, [1, 2, 4, 8, 16, 32], "agentic-results")
    text = "More numbers of sessions between the cliff and the next one, by bisection."
    parser.add_argument("--refine", type=int, default=0, metavar="N", help=text)
    for name, text in LENGTHS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=int, default=getattr(default, name), metavar="N", help=text)
    cli.add_seed(parser, "the tokens")
    text = "Mean pause before a turn in seconds."
    parser.add_argument("--think-seconds", type=float, default=default.think_seconds, metavar="S", help=text)
    text = "Seconds between the first starts of two clients."
    parser.add_argument("--stagger", type=float, default=0.5, metavar="S", help=text)
    text = "Sessions of each client, one after the other."
    parser.add_argument("--sessions-per-client", type=int, default=1, metavar="N", help=text)
    text = "Replay this file, one JSON a turn (agentic/trace.py); without it sessions are synthetic."
    parser.add_argument("--trace", type=Path, metavar="FILE", help=text)
    cli.add_timeout(parser, 900, "one number of sessions, after which its turns are cut")
    parser.add_argument("--no-warmup", action="store_true", help="Leave out the two short sessions before the first.")
    cli.add_output(parser, "Without it rows.csv in --folder.")
    args = parser.parse_args(arguments)
    if min(args.concurrency) < 1:
        parser.error(f"expected numbers of sessions from 1, got {args.concurrency}")
    return args


def shape_of(args: argparse.Namespace, folder: Path) -> Shape:
    """Return the shape of the sessions for the vocabulary of the model."""
    names = ("system_tokens", "task_tokens", "turns", "turn_tokens", "output_tokens", "think_seconds", "seed")
    return Shape(**{name: getattr(args, name) for name in names}, vocabulary=models.vocabulary(folder))


def make_workload(args: argparse.Namespace, shape: Shape, clients: int) -> Workload:
    """Return the sessions of that many clients, of the trace or synthetic."""
    sessions = clients * args.sessions_per_client
    return trace.load(args.trace, shape).take(sessions) if args.trace else shape.workload(sessions)


def settings(args: argparse.Namespace, shape: Shape) -> dict:
    """Return what all points of a sweep must share."""
    run = {name: getattr(args, name) for name in ("stagger", "sessions_per_client", "timeout")}
    return {**sweeps.settings(args), **shape.as_dict(), "trace": str(args.trace or ""), **run}


async def facts_of(url: str) -> dict:
    """Return the sizes of a running server."""
    async with http.connect(url) as client:
        return await counters.server_facts(client)


def measure(server: Server, workload: Workload, facts: dict, pace: Pace, label: str) -> dict:
    """Run one workload behind a progress bar and return its figures.

    Raises:
        RuntimeError: the server died.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with Progress(*columns, console=CONSOLE) as progress:
        task = progress.add_task(label, total=sum(map(len, workload.sessions)))
        run = asyncio.run(replay(server.url, workload, facts["page_size"], pace, lambda: progress.advance(task)))
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


def sweep(args: argparse.Namespace, cache: str, shape: Shape, results: store.Store, rows: Rows) -> None:
    """Measure what is missing of one cache; start a server only if something is."""
    sessions = following(args, cache, results)
    if sessions is None:
        CONSOLE.print(f"{cache}: all there", highlight=False)
        return
    common = {name: value for name, value in settings(args, shape).items() if value != ""}
    flags = ["--skip-tokenizer-init", "--incremental-streaming-output", *sweeps.flags(cache, args)]
    with launch.running(flags) as server:
        facts = asyncio.run(facts_of(server.url))
        pool = f"{facts['pool_tokens']:,} tokens in pages of {facts['page_size']}"
        CONSOLE.print(f"{cache}: {pool}, log in {server.log}", highlight=False)
        facts = rows.provenance | facts | {"start_seconds": round(server.start_seconds, 1)}
        if not args.no_warmup:
            warm = replace(shape, seed=shape.seed + 1, turns=1, think_seconds=0)
            found = measure(server, warm.workload(2), facts, Pace(2, limit=args.timeout), f"{cache} warm-up")
            if found["failed"]:
                raise RuntimeError(f"the warm-up failed: {found['error_messages'][0]}, log in {server.log}")
        while sessions is not None:
            workload = make_workload(args, shape, sessions)
            pace = Pace(sessions, args.stagger, args.timeout)
            found = measure(server, workload, facts, pace, f"{cache} N={sessions}")
            head = {"cache": cache, "sessions": sessions, "model": args.model, **facts}
            point = head | found | {"server_command": server.command}
            for own, figures in report.rows(point):
                rows.append(cache, common | own, figures)
            results.save(point)
            sessions = following(args, cache, results)


def run(args: argparse.Namespace) -> int:
    """Measure all caches and return the exit status: 1 if a server failed, or requests did."""
    rows = Rows(args.output or args.folder / "rows.csv", "agentic")
    shape = shape_of(args, models.folder(args.model))
    make_workload(args, shape, max(args.concurrency) if args.trace else 0)
    results = store.Store(args.folder, settings(args, shape))

    def measure_one(cache: str) -> None:
        try:
            sweep(args, cache, shape, results, rows)
        finally:
            report.write(results, args.caches)

    status = sweeps.each(args.caches, measure_one)
    points = results.load(args.caches)
    report.show(points)
    return status or int(any(point["failed"] for point in points))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    return sweeps.run(lambda: run(args), args.folder)


if __name__ == "__main__":
    sys.exit(main())
