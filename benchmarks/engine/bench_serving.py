# SPDX-License-Identifier: Apache-2.0
"""SGLang's own `python -m sglang.bench_serving`, the same requests for every cache, in one table.

    python -m benchmarks.engine.bench_serving --scenarios random-1024x1024 random-16384x1024 gsp \\
        --concurrency 1 8 64 --folder serving-8b
    python -m benchmarks.engine.bench_serving --model tiny --caches kvarn --scenarios random-64x8 \\
        --concurrency 2 --requests 2

Starts a stock SGLang server per cache, the same but for --kv-cache-dtype. Scenarios: random-INxOUT (random
token ids, exact lengths; equal seeds give equal prompts) and gsp-GROUPSxSYSTEMxQUESTIONxOUT (SGLang's
generated-shared-prefix; "gsp" is gsp-8x4096x512x256). The cache is emptied before each run. The dummy and the
tiny model get a tokenizer of one word per token, so that a prompt of n words has n tokens.

--folder keeps SGLang's own result of every run as one JSON; those that are there are not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.common import cli, launch, store, sweeps, word_tokenizer
from benchmarks.common.launch import CONSOLE
from benchmarks.common.rows import Figure, Rows

GSP = "gsp-8x4096x512x256"
# figure -> (field of SGLang's result, unit)
FIGURES = {
    "asked": ("asked", "requests"),
    "completed": ("completed", "requests"),
    "seconds": ("duration", "s"),
    "requests_per_second": ("request_throughput", "requests/s"),
    "input_tokens_per_second": ("input_throughput", "tokens/s"),
    "output_tokens_per_second": ("output_throughput", "tokens/s"),
    "ttft_p50": ("median_ttft_ms", "ms"),
    "ttft_p95": ("p95_ttft_ms", "ms"),
    "tpot_p50": ("median_tpot_ms", "ms"),
    "tpot_p95": ("p95_tpot_ms", "ms"),
    "itl_p95": ("p95_itl_ms", "ms"),
    "input_tokens": ("total_input_tokens", "tokens"),
    "output_tokens": ("total_output_tokens", "tokens"),
}


def scenario_flags(scenario: str, requests: int) -> list[str]:
    """Return the flags of bench_serving for a scenario with that many requests.

    Raises:
        ValueError: the scenario is spelt otherwise.
    """
    kind, _, numbers = (GSP if scenario == "gsp" else scenario).partition("-")
    lengths = numbers.split("x")
    if kind == "random" and len(lengths) == 2:
        names = ["--random-input-len", "--random-output-len"]
        flags = ["--dataset-name", "random-ids", "--random-range-ratio", "1.0", "--tokenize-prompt"]
        flags += ["--num-prompts", str(requests)]
    elif kind == "gsp" and len(lengths) == 4:
        names = ["--gsp-num-groups", "--gsp-system-prompt-len", "--gsp-question-len", "--gsp-output-len"]
        per_group = max(1, requests // int(lengths[0]))
        flags = ["--dataset-name", "generated-shared-prefix", "--gsp-prompts-per-group", str(per_group)]
        flags += ["--num-prompts", str(per_group * int(lengths[0]))]
    else:
        raise ValueError(f"expected random-INxOUT or gsp-GROUPSxSYSTEMxQUESTIONxOUT, got {scenario!r}")
    return flags + [part for pair in zip(names, lengths, strict=True) for part in pair]


def run(url: str, folder: Path, scenario: str, concurrency: int, args: argparse.Namespace) -> dict:
    """Run bench_serving once and return its result.

    Raises:
        RuntimeError: it failed, or took longer than --timeout.
    """
    requests = args.requests or 4 * concurrency
    partial = args.folder / "running.jsonl"
    partial.unlink(missing_ok=True)
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang", "--base-url", url]
    command += ["--model", str(folder), "--max-concurrency", str(concurrency), "--seed", str(args.seed)]
    command += ["--flush-cache", "--cache-report", "--disable-tqdm", "--output-file", str(partial)]
    flags = scenario_flags(scenario, requests)
    command += flags
    # it keeps prompts under the home folder by the class of the tokenizer, which says nothing of its words
    home = args.folder / "home"
    home.mkdir(exist_ok=True)
    hub = os.environ.get("HF_HOME", str(Path.home() / ".cache" / "huggingface"))
    env = os.environ | {"HOME": str(home.resolve()), "HF_HOME": hub}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=args.timeout)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{scenario} at {concurrency} took more than {args.timeout} s") from None
    if done.returncode or not partial.exists():
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-20:])
        raise RuntimeError(f"`{' '.join(command)}` ended with code {done.returncode}:\n{tail}")
    result = json.loads(partial.read_text().splitlines()[-1])
    partial.unlink()
    result.pop("server_info", None)
    return result | {"asked": int(flags[flags.index("--num-prompts") + 1])}


def measure(args: argparse.Namespace, cache: str, folder: Path, results: store.Store, rows: Rows) -> None:
    """Run what is missing of one cache; start a server only if something is."""
    runs = [(s, n) for s in args.scenarios for n in args.concurrency if not results.has(f"{cache}-{s}", n)]
    if not runs:
        CONSOLE.print(f"{cache}: all there", highlight=False)
        return
    given = {name: value for name, value in sweeps.settings(args).items() if value != ""}
    with launch.running(sweeps.flags(cache, args)) as server:
        CONSOLE.print(f"{cache}: log in {server.log}", highlight=False)
        for scenario, concurrency in runs:
            with CONSOLE.status(f"{cache} {scenario} at {concurrency}"):
                found = run(server.url, folder, scenario, concurrency, args)
            head = {"cache": f"{cache}-{scenario}", "sessions": concurrency, "kv_cache": cache}
            point = found | head | {"scenario": scenario, "server_command": server.command}
            settings = {"scenario": scenario, "concurrency": concurrency} | given
            rows.append(cache, settings, figures_of(point))
            results.save(point)
            CONSOLE.print(f"{cache} {scenario} at {concurrency}: {found['duration']:.0f} s", highlight=False)


def figures_of(point: dict) -> list[Figure]:
    """Return the figures of a run: FIGURES and the share of prompt tokens that were cached."""
    found = [Figure(name, point[field], unit) for name, (field, unit) in FIGURES.items()]
    hits = (point.get("cache_report") or {}).get("cache_hit_rate_pct")
    return found if hits is None else [*found, Figure("hits", hits, "%")]


def table_rows(points: list[dict]) -> list[dict]:
    """Return one flat row per run for the table."""
    heads = ({"cache": p["kv_cache"], "scenario": p["scenario"], "concurrency": p["sessions"]} for p in points)
    found = ({figure.metric: figure.value for figure in figures_of(point)} for point in points)
    return [head | figures for head, figures in zip(heads, found, strict=True)]


def show(rows: list[dict]) -> None:
    """Print the table, caches of a scenario below each other."""
    shown = ["cache", "scenario", "concurrency", "completed", "ttft_p50", "ttft_p95", "tpot_p50"]
    shown += ["tpot_p95", "output_tokens_per_second", "requests_per_second", "hits"]
    table = Table(title="sglang.bench_serving, times in ms")
    for name in shown:
        table.add_column(name.replace("_", " "), no_wrap=name == "scenario")
    order = {row["scenario"]: number for number, row in reversed(list(enumerate(rows)))}
    for row in sorted(rows, key=lambda row: (order[row["scenario"]], row["concurrency"])):
        table.add_row(*[f"{v:,.1f}" if isinstance(v := row.get(name), float) else str(v) for name in shown])
    Console(width=150).print(table)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    cli.add_sweep(parser, [1, 8, 32], "serving-results")
    default = ["random-1024x1024", "random-16384x1024", "gsp"]
    text = "What is sent: random-INxOUT, gsp or gsp-GROUPSxSYSTEMxQUESTIONxOUT."
    parser.add_argument("--scenarios", nargs="+", default=default, metavar="S", help=text)
    text = "Requests of each run; without it four times the concurrency."
    parser.add_argument("--requests", type=int, metavar="N", help=text)
    cli.add_seed(parser, "the prompts")
    cli.add_timeout(parser, 1800, "one run")
    cli.add_output(parser, "Without it rows.csv in --folder.")
    return parser.parse_args(arguments)


def run_all(args: argparse.Namespace) -> int:
    """Run the table and return the exit status: 1 if a server or a run failed."""
    rows = Rows(args.output or args.folder / "rows.csv", "serving")
    for scenario in args.scenarios:
        scenario_flags(scenario, 1)
    folder = word_tokenizer.with_tokenizer(args.model)
    results = store.Store(args.folder, {**sweeps.settings(args), "seed": args.seed, "requests": args.requests})
    status = sweeps.each(args.caches, lambda cache: measure(args, cache, folder, results, rows))
    shown = table_rows(results.load(f"{c}-{s}" for c in args.caches for s in args.scenarios))
    show(shown)
    return status or int(any(row["completed"] < row["asked"] for row in shown))


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    return sweeps.run(lambda: run_all(args), args.folder)


if __name__ == "__main__":
    sys.exit(main())
