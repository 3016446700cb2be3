# SPDX-License-Identifier: Apache-2.0
"""How many of your own questions a served model answers right with each cache.

    python -m benchmarks.generation.bench_answers gsm8k.jsonl --model ~/Qwen3-8B --caches bf16 kvarn fp8_e4m3
    python -m benchmarks.generation.bench_answers aime.jsonl --model ~/Qwen2.5-7B-Instruct --new-tokens 8192
    python -m benchmarks.generation.bench_answers capitals.jsonl --match exact --new-tokens 16 --examples 4

A file has one JSON object a line, with "question" and "answer" (GSM8K as it is published), or "problem" and "answer"
(AIME as it is published; also with capitals). Every cache gets an engine of its own in a process of its own, and the
same prompts, all at once. What an answer gives as its result stands behind the last "Answer:", "####" or "\\boxed{",
or is its last number or line; --match says how it is compared.

An answer that reaches --new-tokens counts as it stands. Two caches are compared question by question: how many only
one of them had right, and the difference of their shares with a 95 % interval, that of the bootstrap over questions.
Greedy answers of one cache differ between runs, too, in the rounding of another batch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import caches, cli, launch, models, paired
from benchmarks.common.rows import Figure, Rows
from benchmarks.generation import questions, runs

MODULE = "benchmarks.generation.bench_answers"


def ask(args: argparse.Namespace) -> None:
    """Ask all questions in an engine of this process, and report (right, tokens, cut) of each answer."""
    import sglang
    from transformers import AutoTokenizer

    folder = str(models.folder(args.model))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    shown, asked = _split(args)
    prompts = [questions.prompt(tokenizer, question, shown, args.instruction) for question in asked]
    is_right = questions.matcher(args.match)
    engine = sglang.Engine(**runs.engine_arguments(args, folder))
    launch.report_progress(f"{len(asked)} questions, {args.samples} answers each")
    sampling = {
        "temperature": args.temperature,
        "top_p": args.top_p,
        "max_new_tokens": args.new_tokens,
        "stop_token_ids": [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id],
    }
    answers = []
    for _ in range(args.samples):
        outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
        for question, output in zip(asked, outputs, strict=True):
            text = tokenizer.decode(output["output_ids"], skip_special_tokens=True)
            cut = output["meta_info"]["finish_reason"]["type"] == "length"
            answers.append((is_right(text, question.answer), len(output["output_ids"]), cut, text))
    launch.report_result({"answers": answers})
    engine.shutdown()


def _split(args: argparse.Namespace) -> tuple[list[questions.Question], list[questions.Question]]:
    """Return (those that are shown as examples, those that are asked)."""
    limit = None if args.first is None else args.first + args.examples
    found = questions.load(args.questions, limit)
    return found[: args.examples], found[args.examples :]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    option = parser.add_argument
    option("questions", type=Path, metavar="JSONL", help="Questions with their answers, one JSON object a line.")
    cli.add_model(parser, models.SMOLLM2)
    cli.add_caches(parser, [caches.BF16, caches.FP8, "kvarn"])
    option("--match", default=questions.NUMERIC, choices=questions.MATCHES, help="How results are compared.")
    option("--first", type=int, metavar="N", help="Ask only so many. Without it all.")
    option("--examples", type=int, default=0, metavar="N", help="First lines that are shown with their answers.")
    option("--instruction", default=questions.INSTRUCTION, metavar="TEXT", help="What a prompt begins with.")
    option("--new-tokens", type=int, default=1024, metavar="N", help="Most tokens of an answer.")
    option("--samples", type=int, default=1, metavar="N", help="Answers to each question.")
    option("--temperature", type=float, default=0.0, metavar="T", help="Temperature; 0 is greedy.")
    option("--top-p", type=float, default=1.0, metavar="P", help="Share of the probability that samples come from.")
    cli.add_seed(parser, "samples")
    cli.add_engines(parser, 36000)
    option("--answers", type=Path, metavar="JSONL", help="Append every answer to this file. Without it none.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.one:
        ask(args)
        return 0
    try:
        _, asked = _split(args)
    except (OSError, ValueError) as error:
        raise SystemExit(str(error)) from None
    written = Rows(args.output, "answers")
    settings = {
        "model": args.model, "dtype": args.dtype, "questions": args.questions.name, "asked": len(asked),
        "samples": args.samples, "temperature": args.temperature, "top_p": args.top_p, "seed": args.seed,
        "new_tokens": args.new_tokens, "examples": args.examples, "match": args.match,
    }  # fmt: skip
    first: list[bool] | None = None
    found: dict[str, dict[str, Figure]] = {}
    for cache, result in launch.run_each(MODULE, args.caches, args.timeout, "answers"):
        right, tokens, cut, texts = (list(column) for column in zip(*result["answers"], strict=True))
        figures = [
            Figure("right", 100 * sum(right) / len(right), "%"),
            Figure.of("answer", tokens, "tokens"),
            Figure("cut", 100 * sum(cut) / len(cut), "%"),
        ]
        if first is not None:
            figures += paired.compare(right, first, len(asked))
        first = first or right
        written.append(cache, settings, figures)
        if args.answers:
            keep(args.answers, cache, asked, right, texts)
        found[cache] = {figure.metric: figure for figure in figures}
        launch.CONSOLE.print(f"{cache}: {sum(right)} of {len(right)} right", highlight=False)
    show(found, f"{args.model}, {args.questions.name}, {len(asked)} questions, {args.samples} answers each")
    return int(len(found) < len(args.caches))


def show(found: dict[str, dict[str, Figure]], title: str) -> None:
    """Print a line for each cache."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in ("cache", "right", "tokens", "cut", "right less first (95 %)", "only this right", "only first right"):
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    for cache, own in found.items():
        value = {metric: figure.value for metric, figure in own.items()}
        cells = [f"{value['right']:.1f} %", f"{value['answer']:.0f}", f"{value['cut']:.1f} %"]
        if "right_less_first" in value:
            low, high = value["right_less_first_low"], value["right_less_first_high"]
            cells += [f"{value['right_less_first']:+.1f} % ({low:+.1f} to {high:+.1f})"]
            cells += [f"{value['only_this_right']}", f"{value['only_first_right']}"]
        table.add_row(cache, *cells)
    Console(width=160).print(table)


def keep(path: Path, cache: str, asked: list[questions.Question], right: list[bool], texts: list[str]) -> None:
    """Append every answer to a file, one JSON object a line."""
    with path.open("a") as file:
        for number, (is_right, text) in enumerate(zip(right, texts, strict=True)):
            question = asked[number % len(asked)].text
            file.write(json.dumps({"cache": cache, "question": question, "right": is_right, "answer": text}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
