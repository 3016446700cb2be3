# SPDX-License-Identifier: Apache-2.0
"""Train the reasoner: a small transformer that writes long chains of steps (reasoning.tasks), from scratch.

    python -m benchmarks.reasoning.train reasoner-qwen3 --minutes 14 --workers 12
    python -m benchmarks.reasoning.train reasoner-qwen2 --variant qwen2 --minutes 14 --workers 12
    python -m benchmarks.reasoning.train reasoner-tiny --tiny        # minutes on a CPU: six nodes, chains of 24 tokens

The folder gets weights and configuration as SGLang serves them, without a tokenizer: chains are token ids. At the end
the share of chains that the model has right, teacher-forced in its own dtype, is printed for each task and length.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.common import cli
from benchmarks.common.rows import Figure, Rows
from benchmarks.reasoning import tasks, training

# seeds of chains that are judged; those of training are numbers
HELD_OUT = "held out"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    option = parser.add_argument
    option("folder", type=Path, help="Folder of the model; it must not be there yet.")
    option("--variant", default=training.VARIANTS[0], choices=training.VARIANTS, help="Whose attention the model has.")
    option("--tiny", action="store_true", help="A model and chains for a CPU.")
    option("--steps", type=int, default=6000, metavar="N", help="Steps of training.")
    option("--minutes", type=float, metavar="M", help="End after so many minutes instead. Without it after --steps.")
    option("--judged", type=int, default=100, metavar="N", help="Chains of each task and length that are judged.")
    option("--workers", type=int, default=0, metavar="N", help="Processes that make chains.")
    cli.add_seed(parser, "weights and chains")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.folder.exists():
        raise SystemExit(f"expected a folder that is not there yet, got {args.folder}: name another one")
    from rich.console import Console

    console = Console(stderr=True)
    written = Rows(args.output, "reasoner")
    size = training.TINY if args.tiny else training.FULL
    device = training.device()
    if device == "cpu":
        # products as small as those of the tiny model take longer on two cores, ten times as long on busy ones
        torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    network = training.model(args.variant, size).to(device)
    started = time.monotonic()

    def report(step: int, losses: dict[str, float]) -> None:
        speed = (step + 1) * size.batch / (time.monotonic() - started)
        shown = ", ".join(f"{task} {loss:.5f}" for task, loss in losses.items())
        console.print(f"step {step:,}: loss of {shown}; {speed:,.0f} tokens/s", highlight=False, soft_wrap=True)

    options = {"workers": args.workers, "minutes": args.minutes}
    steps = training.train(network, size, args.steps, args.seed, report, **options)
    seconds = time.monotonic() - started
    if device == "cuda":
        training.round_weights(network)
    network.save_pretrained(args.folder)
    common = {"variant": args.variant, "steps": steps, "seed": args.seed} | asdict(size)
    written.append("bf16" if device == "cuda" else "float32", common, [Figure("training", seconds, "s")])
    for task in tasks.TASKS:
        for tokens in size.lengths:
            seeds = (f"{HELD_OUT} {number}" for number in range(args.judged))
            chains = [tasks.chains(task, tokens, 1, seed, most=size.most)[0] for seed in seeds]
            share = 100 * training.right(network, chains)
            console.print(f"{task}, {tokens:,} tokens: {share:.1f} % of {args.judged} chains right", highlight=False)
            settings = common | {"task": task, "tokens": tokens, "chains": args.judged}
            written.append("bf16" if device == "cuda" else "float32", settings, [Figure("right", share, "%")])
    return 0


if __name__ == "__main__":
    sys.exit(main())
