# SPDX-License-Identifier: Apache-2.0
"""SGLang's own `python -m sglang.bench_serving`, the same requests for every cache, in one table.

    python benchmarks/bench_serving.py --scenarios random-1024x1024 random-16384x1024 gsp \\
        --concurrency 1 8 64 --output serving-8b
    python benchmarks/bench_serving.py --model tiny --caches kvarn --scenarios random-64x8 \\
        --concurrency 2 --prompts 2

Starts a stock SGLang server per cache, the same but for --kv-cache-dtype. Scenarios: random-INxOUT (random
token ids, exact lengths; equal seeds give equal prompts) and gsp-GROUPSxSYSTEMxQUESTIONxOUT (SGLang's
generated-shared-prefix; "gsp" is gsp-8x4096x512x256). The cache is emptied before each run. The dummy and the
tiny model get a tokenizer of one word per token, so that a prompt of n words has n tokens.

--output keeps SGLang's own result of every run as one JSON; those that are there are not measured again. The
table is written to serving.csv.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from agentic import servers, store, tokenizer
from rich.console import Console
from rich.table import Table
from sglang_kvarn.demo import server as processes

CONSOLE = Console(stderr=True)
GSP = "gsp-8x4096x512x256"
# columns of the table -> field of SGLang's result
FIGURES = {
    "asked": "asked",
    "completed": "completed",
    "seconds": "duration",
    "requests_per_second": "request_throughput",
    "input_tokens_per_second": "input_throughput",
    "output_tokens_per_second": "output_throughput",
    "ttft_p50_ms": "median_ttft_ms",
    "ttft_p95_ms": "p95_ttft_ms",
    "tpot_p50_ms": "median_tpot_ms",
    "tpot_p95_ms": "p95_tpot_ms",
    "itl_p95_ms": "p95_itl_ms",
    "input_tokens": "total_input_tokens",
    "output_tokens": "total_output_tokens",
}


def scenario_flags(scenario: str, prompts: int) -> list[str]:
    """Return the flags of bench_serving for a scenario with that many prompts.

    Raises:
        ValueError: the scenario is spelt otherwise.
    """
    kind, _, numbers = (GSP if scenario == "gsp" else scenario).partition("-")
    lengths = numbers.split("x")
    if kind == "random" and len(lengths) == 2:
        names = ["--random-input-len", "--random-output-len"]
        flags = ["--dataset-name", "random-ids", "--random-range-ratio", "1.0", "--tokenize-prompt"]
        flags += ["--num-prompts", str(prompts)]
    elif kind == "gsp" and len(lengths) == 4:
        names = ["--gsp-num-groups", "--gsp-system-prompt-len", "--gsp-question-len", "--gsp-output-len"]
        per_group = max(1, prompts // int(lengths[0]))
        flags = ["--dataset-name", "generated-shared-prefix", "--gsp-prompts-per-group", str(per_group)]
        flags += ["--num-prompts", str(per_group * int(lengths[0]))]
    else:
        raise ValueError(f"expected random-INxOUT or gsp-GROUPSxSYSTEMxQUESTIONxOUT, got {scenario!r}")
    return flags + [part for pair in zip(names, lengths, strict=True) for part in pair]


def run(url: str, folder: Path, scenario: str, concurrency: int, args: argparse.Namespace) -> dict:
    """Run bench_serving once and return its result.

    Raises:
        RuntimeError: it failed, or took longer than the limit.
    """
    prompts = args.prompts or 4 * concurrency
    partial = args.output / "running.jsonl"
    partial.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", str(folder), "--max-concurrency", str(concurrency), "--seed", str(args.seed)]
    command += ["--flush-cache", "--cache-report", "--disable-tqdm", "--output-file", str(partial)]
    flags = scenario_flags(scenario, prompts)
    command += flags
    # it keeps prompts under the home folder by the class of the tokenizer, which says nothing of its words
    home = args.output / "home"
    home.mkdir(exist_ok=True)
    hub = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    env = os.environ | {"HOME": str(home.resolve()), "HF_HOME": hub}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.limit)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{scenario} at {concurrency} took more than {args.limit} s") from None
    if done.returncode or not partial.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"`{' '.join(command)}` ended with code {done.returncode}:\n{tail}")
    result = json.loads(partial.read_text().splitlines()[-1])
    partial.unlink()
    result.pop("server_info", None)
    return result | {"asked": int(flags[flags.index("--num-prompts") + 1])}


def sweep(args: argparse.Namespace, cache: str, folder: Path, results: store.Store) -> None:
    """Run what is missing of one cache; start a server only if something is."""
    runs = [(s, n) for s in args.scenarios for n in args.concurrency if not results.has(f"{cache}-{s}", n)]
    if not runs:
        CONSOLE.print(f"{cache}: all there", highlight=False)
        return
    port = processes.choose_port(None)
    flags = servers.flags(cache, folder, args)
    with processes.running(processes.launch_command(flags, port), port, CONSOLE) as server:
        CONSOLE.print(f"{cache}: log in {server.log}", highlight=False)
        for scenario, concurrency in runs:
            with CONSOLE.status(f"{cache} {scenario} at {concurrency}"):
                found = run(server.url, folder, scenario, concurrency, args)
            head = {"cache": f"{cache}-{scenario}", "sessions": concurrency, "kv_cache": cache}
            results.save(found | head | {"scenario": scenario, "server_command": server.command})
            CONSOLE.print(f"{cache} {scenario} at {concurrency}: {found['duration']:.0f} s", highlight=False)


def table_rows(points: list[dict]) -> list[dict]:
    """Return one flat row per run, the fields of FIGURES and the hit rate."""
    rows = []
    for point in points:
        row = {"cache": point["kv_cache"], "scenario": point["scenario"], "concurrency": point["sessions"]}
        row |= {column: point[key] for column, key in FIGURES.items()}
        report = point.get("cache_report") or {}
        rows.append(row | {"hit_percent": report.get("cache_hit_rate_pct")})
    return rows


def show(rows: list[dict]) -> None:
    """Print the table, caches of a scenario below each other."""
    shown = ["cache", "scenario", "concurrency", "completed", "ttft_p50_ms", "ttft_p95_ms", "tpot_p50_ms"]
    shown += ["tpot_p95_ms", "output_tokens_per_second", "requests_per_second", "hit_percent"]
    table = Table(title="sglang.bench_serving")
    for name in shown:
        table.add_column(name.replace("_", " "), no_wrap=name == "scenario")
    order = {row["scenario"]: number for number, row in reversed(list(enumerate(rows)))}
    for row in sorted(rows, key=lambda row: (order[row["scenario"]], row["concurrency"])):
        table.add_row(*[f"{v:,.1f}" if isinstance(v := row[name], float) else str(v) for name in shown])
    Console(width=150).print(table)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    servers.add_arguments(parser)
    default = ["random-1024x1024", "random-16384x1024", "gsp"]
    parser.add_argument("--scenarios", nargs="+", default=default, help="default: all three")
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 8, 32], metavar="N")
    parser.add_argument("--prompts", type=int, help="of each run; default: four times the concurrency")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=1800, help="seconds for one run, default %(default)s")
    parser.add_argument("--output", type=Path, default=Path("serving-results"), help="default %(default)s")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the table and return its exit status: 1 if a server or a run failed."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda n, frame: sys.exit(128 + n))
    args = parse(arguments)
    status = 0
    try:
        for scenario in args.scenarios:
            scenario_flags(scenario, 1)
        folder = tokenizer.with_tokenizer(servers.model_folder(args.model), args.model)
        settings = {**servers.settings(args), "seed": args.seed, "prompts": args.prompts}
        results = store.Store(args.output, settings)
        for cache in args.caches:
            try:
                sweep(args, cache, folder, results)
            except RuntimeError as error:
                CONSOLE.print(f"{cache} failed: {error}", highlight=False, markup=False, soft_wrap=True)
                status = 1
            rows = table_rows(results.load(f"{c}-{s}" for c in args.caches for s in args.scenarios))
            store.write_csv(args.output / "serving.csv", rows)
    except ValueError as error:
        CONSOLE.print(str(error), highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        CONSOLE.print(f"stopped; the same command goes on in {args.output}", highlight=False)
        return 128 + signal.SIGINT
    show(rows)
    return status or int(any(row["completed"] < row["asked"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
