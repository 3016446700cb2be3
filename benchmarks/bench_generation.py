# SPDX-License-Identifier: Apache-2.0
"""What served models write with each cache: right answers, and how long greedy answers agree with the first cache's.

    python benchmarks/bench_generation.py [--model smollm2|DIR] [--caches bf16 kvarn ...] [--needle-tokens N ...]
        [--needles N] [--prompts N] [--samples N] [--temperature T] [--turns N] [--csv FILE] [--json]
    python benchmarks/bench_generation.py --needle-tokens 4096 8000 --depths 0.1 0.5 0.9

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
from dataclasses import asdict
from pathlib import Path
from time import monotonic
from typing import Any

import engines
from generation import chats, report, runs, tasks
from generation.scoring import Answer, summarise
from rows import append, check_columns

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
        made += [make(own) for _ in range(args.prompts)]
    for kind in KINDS:
        made.append(tasks.continuation(tokenizer, kind, args.go_on, 64, args.seed))
    return made


def make_conversations(args: argparse.Namespace, tokenizer: Any) -> list[list[tasks.Task]]:
    """Return --conversations of --turns turns."""
    own = random.Random(f"{args.seed} conversations")
    return [chats.conversation(encoder(tokenizer), args.turns, 200, own) for _ in range(args.conversations)]


def engine_arguments(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the arguments of sglang.Engine for the cache of this process."""
    import torch

    chosen: dict[str, Any] = {
        "model_path": folder,
        "dtype": args.dtype,
        "random_seed": args.seed,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "log_level": "info",
    }
    if torch.cuda.is_available():
        chosen["mem_fraction_static"] = args.mem_fraction
    chosen |= engines.cache_arguments(args.one, args.bf16_backend)
    if args.one == "bf16" and args.dtype == "float32":
        # the dtype of the model would make it a 32-bit cache
        chosen["kv_cache_dtype"] = "bf16"
    return chosen


def run_one(args: argparse.Namespace) -> None:
    """Run one cache in this process and report its answers."""
    import sglang
    from transformers import AutoTokenizer

    folder = engines.model_folder(args.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    started = monotonic()
    engine = sglang.Engine(**engine_arguments(args, folder))
    answers = runs.answer_tasks(engine, tokenizer, make_tasks(args, tokenizer), args.samples, args.temperature)
    answers += runs.hold_conversations(engine, tokenizer, make_conversations(args, tokenizer))
    seconds = monotonic() - started
    engines.report_result({"answers": [asdict(answer) for answer in answers], "seconds": seconds})
    engine.shutdown()


def parse() -> argparse.Namespace:
    import torch

    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    option = parser.add_argument
    option("--model", default="smollm2", help="smollm2 or a folder, default %(default)s")
    caches = ["bf16", "kvarn", "kvarn_k4v4_g128", "kvarn_k2v2_g128", "fp8_e4m3"]
    option("--caches", nargs="+", default=caches, choices=engines.CACHES, metavar="C", help="default %(default)s")
    lengths = [1024, 2048, 4096, 8000] if cuda else [512, 1024, 2048]
    option("--needle-tokens", type=int, nargs="*", default=lengths, help="prompt tokens, default %(default)s")
    option("--depths", type=float, nargs="+", default=[0.1, 0.5, 0.9], help="default %(default)s")
    option("--needles", type=int, default=4 if cuda else 1, help="per length and depth, default %(default)s")
    option("--prompts", type=int, default=32 if cuda else 5, help="of every other task, default %(default)s")
    option("--go-on", type=int, default=1024, help="tokens of a text to go on from, default %(default)s")
    option("--samples", type=int, default=4 if cuda else 1, help="per prompt, default %(default)s")
    option("--temperature", type=float, default=0.7, help="of samples, default %(default)s")
    option("--conversations", type=int, default=16 if cuda else 3, help="default %(default)s")
    option("--turns", type=int, default=3, help="of a conversation, default %(default)s")
    option("--seed", type=int, default=0, help="of prompts and samples, default %(default)s")
    dtype = "bfloat16" if cuda else "float32"
    option("--dtype", default=dtype, help="of the model, default %(default)s")
    option("--mem-fraction", type=float, default=0.8, help="of a GPU, default %(default)s")
    option("--bf16-backend", help="attention backend of bf16 and fp8, default SGLang's")
    option("--timeout", type=float, default=3600, help="seconds for one cache, default %(default)s")
    option("--csv", type=Path, help="append rows to this file")
    option("--json", action="store_true", help="print one JSON object, with every answer, instead of a table")
    option("--one", choices=engines.CACHES, help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, common: dict[str, Any]) -> tuple[dict[str, list[Answer]], list[dict[str, Any]]]:
    """Run every cache and return answers and rows; a cache without a result is left out.

    The rows of a cache are in --csv as soon as it is done.

    Raises:
        SystemExit: the first cache gave no answers, so there is nothing to compare with.
    """
    from rich.console import Console

    console = Console(stderr=True)
    found: dict[str, list[Answer]] = {}
    rows = []
    for cache in args.caches:
        with console.status(cache) as status:
            result = engines.run_alone(cache, args.timeout, lambda text, s=status, c=cache: s.update(f"{c}: {text}"))
        if result is None and not found:
            raise SystemExit(f"expected answers of {cache}, the first cache, got none: see its log")
        if result is None:
            continue
        found[cache] = [Answer(**answer) for answer in result["answers"]]
        own = summarise(found[cache], found[args.caches[0]])
        rows += [common | {"cache": cache} | row for row in own]
        if args.csv:
            append(args.csv, list(report.COLUMNS), rows[-len(own) :])
        console.print(f"{cache}: {len(found[cache])} answers, {result['seconds']:.0f} s", highlight=False)
    return found, rows


def main() -> int:
    args = parse()
    if args.one:
        run_one(args)
        return 0
    check_columns(args.csv, list(report.COLUMNS))
    common = engines.device_facts() | {"model": args.model, "dtype": args.dtype, "seed": args.seed}
    found, rows = measure(args, common)
    if args.json:
        answers = {cache: [asdict(answer) for answer in own] for cache, own in found.items()}
        print(json.dumps(common | {"rows": rows, "answers": answers}))
    else:
        report.show(rows, f"{args.model}, {common['device']}, {args.dtype}, seed {args.seed}")
    return int(len(found) < len(args.caches))


if __name__ == "__main__":
    sys.exit(main())
