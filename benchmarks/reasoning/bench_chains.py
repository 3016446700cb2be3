# SPDX-License-Identifier: Apache-2.0
"""How long the reasoner's chains stay right with each cache: do errors add up over a long answer?

    python -m benchmarks.reasoning.train reasoner-qwen3
    python -m benchmarks.reasoning.bench_chains reasoner-qwen3 --output chains.csv --plot chains.png
    python -m benchmarks.reasoning.bench_chains reasoner-qwen3 --caches bf16 fp8_e4m3 kvarn kvarn_canonical

Chains of reasoning.tasks are written freely by a served model, --at-a-time side by side, in --turns requests each. All
but the first begin with what the model has written so far, and find it in the prefix cache. --retract makes the
scheduler take requests back every so many steps and compute them again. A chain is right if every token is. Two caches
are compared chain by chain, with the 95 % interval of the difference, that of the bootstrap over chains.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarn_kernels.config import preset_names

from benchmarks.common import caches, cli, launch, paired, plots
from benchmarks.common.rows import Figure, Rows
from benchmarks.generation import runs
from benchmarks.reasoning import tasks, training
from benchmarks.reasoning.train import HELD_OUT

MODULE = "benchmarks.reasoning.bench_chains"
# of one problem
TOGETHER = 4


def make_chains(args: argparse.Namespace, task: str, tokens: int) -> list[tasks.Chain]:
    """Return --chains of a task, `TOGETHER` of each problem, no problem among those of training."""
    most = training.TINY.most if args.tiny else None
    return [
        chain
        for number in range(-(-args.chains // TOGETHER))
        for chain in tasks.chains(task, tokens, TOGETHER, f"{HELD_OUT} {args.seed} {number}", most=most)
    ][: args.chains]


def check_folder(folder: Path) -> None:
    """Refuse a folder without a model.

    Raises:
        SystemExit: names it.
    """
    if not (folder / "config.json").exists():
        raise SystemExit(f"expected a folder with a model, got {folder}: make it with benchmarks.reasoning.train")


def write(args: argparse.Namespace) -> None:
    """Let an engine of this process write all chains, and report the first wrong step of each."""
    import sglang

    if args.retract:
        os.environ |= {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": str(args.retract)}
    arguments = runs.engine_arguments(args, str(args.model)) | {"max_running_requests": args.at_a_time}
    engine = sglang.Engine(**arguments)
    found: dict[str, dict[str, Any]] = {}
    tokens = max(args.lengths)
    for task in args.tasks:
        launch.report_progress(f"{task}, {tokens:,} tokens")
        launch.flush(engine)
        chains = make_chains(args, task, tokens)
        answers, cached = write_chains(engine, chains, args.turns)
        right = [tasks.right_tokens(chain, answer) for chain, answer in zip(chains, answers, strict=True)]
        found[task] = {
            "right": right,
            "steps": [tasks.right_steps(c, own) for c, own in zip(chains, right, strict=True)],
            "tokens": [len(chain.answer) for chain in chains],
            "cached": cached,
        }
    launch.report_result({"cells": found})
    engine.shutdown()


def write_chains(engine: Any, chains: list[tasks.Chain], turns: int) -> tuple[list[list[int]], int]:
    """Let an engine write chains in so many requests each.

    Returns:
        (the tokens of each answer, how many tokens of all prompts were in the prefix cache)
    """
    answers: list[list[int]] = [[] for _ in chains]
    cached = 0
    for turn in range(1, turns + 1):
        ends = [len(chain.answer) * turn // turns for chain in chains]
        # a chain may be shorter than there are turns
        due = [n for n, end in enumerate(ends) if end > len(answers[n])]
        sampling = [{"temperature": 0, "max_new_tokens": ends[n] - len(answers[n]), "ignore_eos": True} for n in due]
        prompts = [chains[n].prompt + answers[n] for n in due]
        for n, output in zip(due, engine.generate(input_ids=prompts, sampling_params=sampling), strict=True):
            answers[n] += output["output_ids"]
            cached += output["meta_info"]["cached_tokens"]
    return answers, cached


def figures(cell: dict[str, Any], first: dict[str, Any] | None, tokens: int) -> list[Figure]:
    """Return what the chains of a cell come to after so many tokens, beside those of the first cache."""

    def right(own: dict[str, Any]) -> list[bool]:
        # a multiplication may end before
        return [there >= min(tokens, whole) for there, whole in zip(own["right"], own["tokens"], strict=True)]

    found = [Figure("right", 100 * sum(right(cell)) / len(cell["right"]), "%")]
    if first is not None:
        found += paired.compare(right(cell), right(first), len(cell["right"]))
    return found


def whole(cell: dict[str, Any]) -> list[Figure]:
    """Return what all steps of a cell come to."""
    wrong = sum(there < tokens for there, tokens in zip(cell["right"], cell["tokens"], strict=True))
    return [
        Figure("wrong_steps", 1e6 * wrong / (sum(cell["steps"]) + wrong), "of a million"),
        Figure("cached", cell["cached"], "tokens"),
    ]


def plot(shares: dict[str, dict[tuple[str, int], float]], title: str, target: Path) -> None:
    """Draw the share of right chains against their length, a picture for each task, a line for each cache."""
    names = list(dict.fromkeys(task for own in shares.values() for task, _ in own))
    figure, axes = plots.pyplot().subplots(
        1, len(names), figsize=(4 * len(names), 3.5), layout="constrained", sharey=True, squeeze=False
    )
    for task, axis in zip(names, axes[0], strict=True):
        for cache, own in shares.items():
            points = sorted((tokens, share) for (name, tokens), share in own.items() if name == task)
            axis.plot(*zip(*points, strict=True), "o-", label=cache, markersize=3)
        axis.set(title=task, xlabel="tokens of a chain", xscale="log")
        axis.grid(alpha=0.3)
    axes[0][0].set(ylabel="chains right to the last token, %")
    axes[0][0].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(target, dpi=120)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    option = parser.add_argument
    option("model", type=Path, help="Folder that reasoning.train has made.")
    cli.add_caches(parser, [caches.BF16, caches.FP8, *preset_names()])
    option("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS, metavar="T", help="Tasks.")
    lengths = list(training.FULL.lengths)
    option("--lengths", nargs="+", type=int, default=lengths, metavar="N", help="Tokens at which chains are judged.")
    option("--chains", type=int, default=1000, metavar="N", help="Chains of each task and length.")
    option("--at-a-time", type=int, default=32, metavar="N", help="Chains that are written at a time.")
    text = "Requests that write a chain, one after the other; from the second on they hit the prefix cache."
    option("--turns", type=int, default=4, metavar="N", help=text)
    option("--retract", type=int, default=0, metavar="N", help="Take requests back every N steps; 0 for never.")
    option("--tiny", action="store_true", help="Problems of the size that train --tiny is trained on.")
    cli.add_seed(parser, "chains")
    cli.add_engines(parser, 7200)
    option("--plot", type=Path, metavar="PNG", help="Draw right chains against their length. Without it nothing.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.one:
        write(args)
        return 0
    check_folder(args.model)
    written = Rows(args.output, "chains")
    common = {"model": args.model.name, "dtype": args.dtype, "seed": args.seed, "chains": args.chains}
    common |= {"at_a_time": args.at_a_time, "turns": args.turns, "retract": args.retract}
    first: dict[str, dict[str, Any]] | None = None
    shares: dict[str, dict[tuple[str, int], float]] = {}
    for cache, result in launch.run_each(MODULE, args.caches, args.timeout, "chains"):
        cells = result["cells"]
        for task, cell in cells.items():
            for tokens in args.lengths:
                own = figures(cell, None if first is None else first[task], tokens)
                if tokens == max(args.lengths):
                    own += whole(cell)
                written.append(cache, common | {"task": task, "tokens": tokens}, own)
                shares.setdefault(cache, {})[task, tokens] = float(own[0].value)
                shown = ", ".join(f"{figure.metric} {figure.value:.4g} {figure.unit}" for figure in own)
                launch.CONSOLE.print(f"{cache}, {task}, {tokens:,} tokens: {shown}", highlight=False, soft_wrap=True)
        first = first or cells
    if args.plot:
        plot(shares, f"{args.model.name}, {args.chains} chains a point, {written.provenance['device']}", args.plot)
    return int(len(shares) < len(args.caches))


if __name__ == "__main__":
    sys.exit(main())
