# SPDX-License-Identifier: Apache-2.0
"""What served models write with each cache: right answers, and how long greedy answers agree with the first cache's.

    python -m benchmarks.generation.bench_generation --output benchmarks/results/generation_cpu.csv
    python -m benchmarks.generation.bench_generation --needle-tokens 4096 8000 --depths 0.1 0.5 0.9

Every cache gets an engine of its own in a process of its own, and the same prompts, which a seeded generator makes
(generation.tasks, generation.chats); texts to go on from are pieces of files of Python (quality.texts).

needle          a number in filler, at --depths and several lengths
conversation    the same in turns, with the earlier ones in the prefix cache (hit), and again with it empty (miss)
table           a number from a table
sums            with a fixed second number, after examples
instruction     first, last or all words of a list, or the animal in it, after examples
go on           no right answer: only how many leading tokens equal the first cache's

An answer is correct if it is the expected one to the letter. Prompts are the same in every run, and greedy answers but
for the rounding of another batch; samples differ from run to run, although seeded (generation.runs). On a CPU the
model runs in float32, the bf16 cache holds bfloat16 all the same, and the presets' exact tokens are float32, where a
GPU's are 16 bit.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from time import monotonic
from typing import Any

from benchmarks.common import caches, cli, launch, models
from benchmarks.common.rows import Rows
from benchmarks.generation import chats, report, runs, tasks
from benchmarks.generation.scoring import Answer, summarise

MODULE = "benchmarks.generation.bench_generation"
KINDS = ("manual", "code", "changelog")


def encoder(tokenizer: Any) -> tasks.Encode:
    """Return what makes token ids of a piece of a prompt."""
    return lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def make_tasks(args: argparse.Namespace, tokenizer: Any) -> list[tasks.Task]:
    """Return all tasks but the conversations, section by section; each section has a generator of its own."""
    encode = encoder(tokenizer)

    def draw(section: object) -> random.Random:
        return random.Random(f"{args.seed} {section}")

    made = []
    for length in args.needle_tokens:
        own = draw(length)
        made += [tasks.needle(encode, length, depth, own) for depth in args.depths for _ in range(args.needles)]
    for name, make in (
        ("table", lambda own: tasks.table(encode, 40, own)),
        *((f"sums {n}", lambda own, n=n: tasks.sums(encode, n, 50, own)) for n in (1, 10)),
        *((name, lambda own, name=name: tasks.instruction(encode, name, 30, own)) for name in tasks.RULES),
    ):
        own = draw(name)
        made += [make(own) for _ in range(args.prompts_per_task)]
    if args.go_on:
        made += [tasks.continuation(tokenizer, kind, args.go_on, 64, args.seed) for kind in KINDS]
    return made


def make_conversations(args: argparse.Namespace, tokenizer: Any) -> list[list[tasks.Task]]:
    """Return --conversations of --turns turns."""
    own = random.Random(f"{args.seed} conversations")
    return [chats.conversation(encoder(tokenizer), args.turns, 200, own) for _ in range(args.conversations)]


def run_one(args: argparse.Namespace) -> None:
    """Run one cache in this process and report its answers."""
    import sglang
    from transformers import AutoTokenizer

    folder = str(models.folder(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    started = monotonic()
    engine = sglang.Engine(**runs.engine_arguments(args, folder))
    answers = runs.answer_tasks(engine, tokenizer, make_tasks(args, tokenizer), args.samples, args.temperature)
    answers += runs.hold_conversations(engine, tokenizer, make_conversations(args, tokenizer))
    seconds = monotonic() - started
    launch.report_result({"answers": [asdict(answer) for answer in answers], "seconds": seconds})
    engine.shutdown()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    import torch

    cuda = torch.cuda.is_available()
    parser = cli.parser(__doc__)
    option = parser.add_argument
    cli.add_model(parser, models.SMOLLM2)
    cli.add_caches(parser, [caches.BF16, "kvarn", "kvarn_k4v4_g128", "kvarn_k2v2_g128", caches.FP8])
    lengths = [1024, 2048, 4096, 8000] if cuda else [512, 1024, 2048]
    option(
        "--needle-tokens", type=int, nargs="*", default=lengths, metavar="N", help="Tokens of prompts with a needle."
    )
    text = "Where needles lie, from 0, the beginning, to 1."
    option("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], metavar="D", help=text)
    option("--needles", type=int, default=4 if cuda else 1, metavar="N", help="Prompts for each length and depth.")
    option("--prompts-per-task", type=int, default=32 if cuda else 5, metavar="N", help="Prompts of every other task.")
    option("--go-on", type=int, default=1024, metavar="N", help="Tokens of a text to go on from; 0: none.")
    option("--samples", type=int, default=4 if cuda else 1, metavar="N", help="Samples for each prompt.")
    option("--temperature", type=float, default=0.7, metavar="T", help="Temperature of samples.")
    option("--conversations", type=int, default=16 if cuda else 3, metavar="N", help="Conversations side by side.")
    option("--turns", type=int, default=3, metavar="N", help="Turns of a conversation.")
    cli.add_seed(parser, "prompts and samples")
    cli.add_engines(parser, 3600)
    option("--json", action="store_true", help="Print one JSON object, with every answer, instead of a table.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def measure(args: argparse.Namespace, written: Rows) -> tuple[dict[str, list[Answer]], list[dict[str, Any]]]:
    """Run every cache and return answers and records; a cache without a result is left out.

    The rows of a cache are in --output as soon as it is done.

    Raises:
        SystemExit: the first cache gave no answers, so there is nothing to compare with.
    """
    found: dict[str, list[Answer]] = {}
    records = []
    common = {"model": args.model, "dtype": args.dtype, "seed": args.seed}
    for cache, result in launch.run_each(MODULE, args.caches, args.timeout, "answers"):
        found[cache] = [Answer(**answer) for answer in result["answers"]]
        for record in summarise(found[cache], found[args.caches[0]]):
            records.append({"cache": cache} | record)
            settings, figure = report.row(record)
            written.append(cache, common | settings, [figure])
        launch.CONSOLE.print(f"{cache}: {len(found[cache])} answers, {result['seconds']:.0f} s", highlight=False)
    return found, records


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.one:
        run_one(args)
        return 0
    written = Rows(args.output, "generation")
    found, records = measure(args, written)
    if args.json:
        answers = {cache: [asdict(answer) for answer in own] for cache, own in found.items()}
        print(json.dumps(written.provenance | {"model": args.model, "rows": records, "answers": answers}))
    else:
        report.show(records, f"{args.model}, {written.provenance['device']}, {args.dtype}, seed {args.seed}")
    return int(len(found) < len(args.caches))


if __name__ == "__main__":
    sys.exit(main())
