# SPDX-License-Identifier: Apache-2.0
"""How many drafts of speculative decoding a served model accepts with each cache.

    python -m benchmarks.generation.bench_drafts --output benchmarks/results/drafts_cpu.csv
    python -m benchmarks.generation.bench_drafts --caches bf16 kvarn kvarn_k4v4_g128 --drafts NGRAM=8

A model goes on from pieces of texts (quality.texts), greedily, from many places of the second half of each. Every cache
gets the same places, and drafts of the same origin:

NGRAM        the piece itself, whose second half repeats the first: what follows there the last tokens of an answer
STANDALONE   the model without two of its layers, on a 16-bit cache; nothing in a piece is repeated

The figure is the mean number of drafts accepted in a verify step, of the D - 1 that a chain of D has besides its root.
Answers are short, since another token in one changes all drafts behind it. The ratio to the first cache's figure has a
95 % interval, that of the bootstrap over pieces. On a CPU the model runs in float32 and bf16 is a bfloat16 cache; torch
takes the place of SGLang's kernels that draft and accept (tests/support), which needs the packages of the extra [test].
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import caches, cli, launch, models
from benchmarks.common.rows import Figure, Rows
from benchmarks.generation.acceptance import Steps, accepted, ratio
from benchmarks.quality import texts

MODULE = "benchmarks.generation.bench_drafts"
SUPPORT = Path(__file__).parents[2] / "tests" / "support"
# of several kinds: names of quality.sources, and files of the standard library
TEXTS = ("manual", "code", "changelog", "page", "table")
FILES = ("difflib.py", "doctest.py", "mailbox.py", "optparse.py", "pickletools.py", "tarfile.py", "turtle.py")


@contextlib.contextmanager
def stand_ins() -> Iterator[None]:
    """Let engines that are started inside draft and accept on a CPU."""
    import torch

    if torch.cuda.is_available():
        yield
        return
    from pytest import MonkeyPatch

    with tempfile.TemporaryDirectory() as folder, MonkeyPatch.context() as patch:
        patch.syspath_prepend(SUPPORT)
        import drafts_on_cpu

        drafts_on_cpu.prepare(patch, Path(folder))
        drafts_on_cpu.draft_chains(patch)
        yield


def pieces(args: argparse.Namespace, tokenizer: Any, algorithm: str) -> list[list[int]]:
    """Return --pieces of each of --texts, tokens that go on behind the last place."""
    half, found = args.context // 2, []
    for name, seed in ((name, args.seed + n) for n in range(args.pieces) for name in args.texts):
        if algorithm == models.NGRAM:
            found.append((texts.load(name, half, seed, tokenizer).tokens * 3)[: args.context + args.new_tokens])
        else:
            found.append(texts.load(name, args.context + args.new_tokens, seed, tokenizer).tokens)
    return found


def places(args: argparse.Namespace, number: int) -> list[int]:
    """Return from where a piece is gone on: numbers of its tokens, half of the context at least."""
    half = args.context // 2
    # the first tokens of a repetition cannot be seen to be one
    return sorted(random.Random(f"{args.seed} {number}").sample(range(half + 16, args.context), args.prompts_per_piece))


def engine_arguments(args: argparse.Namespace, corpus: Path, algorithm: str, drafts: int) -> dict[str, Any]:
    """Return the arguments of sglang.Engine for the cache of this process."""
    import torch
    from sglang_kvarn import compat

    chosen: dict[str, Any] = {
        "dtype": args.dtype,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "log_level": "info",
        "max_running_requests": args.prompts_per_piece,
    }
    backend = args.bf16_backend
    if torch.cuda.is_available():
        chosen["mem_fraction_static"] = args.mem_fraction_static
    else:
        backend = "triton"
    chosen |= models.arguments(args.model) | models.draft_arguments(args.model, algorithm, drafts)
    chosen |= caches.engine_arguments(args.one, backend)
    if args.dtype == "float32":
        # that of the model would be a 32-bit cache
        if args.one == caches.BF16:
            chosen["kv_cache_dtype"] = "bf16"
        elif compat.has_argument("speculative_draft_kv_cache_dtype"):
            chosen["speculative_draft_kv_cache_dtype"] = "bf16"
    if algorithm == models.NGRAM:
        chosen |= {
            "speculative_ngram_external_corpus_path": str(corpus),
            # no drafts of what was answered before
            "speculative_ngram_external_sam_budget": drafts - 1,
        }
    return chosen


def go_on(engine: Any, args: argparse.Namespace, algorithm: str, found: list[list[int]]) -> Steps:
    """Return (verify steps, drafts accepted) of the answers from all places, piece by piece."""
    steps = []
    for number, piece in enumerate(found):
        launch.report_progress(f"{algorithm}, piece {number + 1} of {len(found)}")
        sampling = {"temperature": 0, "max_new_tokens": args.new_tokens, "ignore_eos": True}
        # the pages of all prompts, once
        engine.generate(input_ids=piece[: args.context], sampling_params=sampling | {"max_new_tokens": 1})
        prompts = [piece[:place] for place in places(args, number)]
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        facts = [answer["meta_info"] for answer in answers]
        totals = (sum(fact[name] for fact in facts) for name in ("spec_verify_ct", "spec_num_correct_drafts"))
        steps.append((*totals,))
    return steps


def run_one(args: argparse.Namespace) -> None:
    """Run one cache in this process, an engine for each of --drafts, and report its steps."""
    import sglang
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.folder(args.model))
    steps = []
    with tempfile.TemporaryDirectory() as folder, stand_ins():
        corpus = Path(folder) / "pieces.jsonl"
        for algorithm, drafts in args.drafts:
            found = pieces(args, tokenizer, algorithm)
            corpus.write_text("".join(f"{json.dumps(tokenizer.decode(piece))}\n" for piece in found))
            engine = sglang.Engine(**engine_arguments(args, corpus, algorithm, drafts))
            steps.append(go_on(engine, args, algorithm, found))
            engine.shutdown()
    launch.report_result({"steps": steps})


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    option = parser.add_argument
    cli.add_model(parser, models.SMOLLM2)
    cli.add_caches(parser, [caches.BF16, "kvarn"])
    names = [models.NGRAM, models.STANDALONE]
    text = f"Speculate with chains of D drafts, one after the other: {' or '.join(f'{name}=D' for name in names)}."
    option("--drafts", nargs="+", type=cli.drafts, default=[(name, 4) for name in names], metavar="A=D", help=text)
    default = [*TEXTS, *FILES]
    option("--texts", nargs="+", default=default, metavar="T", help="Files, or kinds of text, as of bench_quality.")
    option("--pieces", type=int, default=1, metavar="N", help="Pieces of each text.")
    option("--context", type=int, default=1024, metavar="N", help="Tokens of a piece.")
    option("--prompts-per-piece", type=int, default=16, metavar="N", help="Places from which a piece is gone on.")
    option("--new-tokens", type=int, default=16, metavar="N", help="Tokens of an answer.")
    cli.add_seed(parser, "pieces and places")
    cli.add_engines(parser, 3600)
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if args.one:
        run_one(args)
        return 0
    written = Rows(args.output, "drafts")
    first: list[Steps] | None = None
    done = 0
    for cache, result in launch.run_each(MODULE, args.caches, args.timeout, "drafts"):
        done += 1
        first = first or result["steps"]
        for (algorithm, drafts), own, base in zip(args.drafts, result["steps"], first, strict=True):
            settings = {
                "model": args.model, "dtype": args.dtype, "seed": args.seed, "drafts": f"{algorithm}={drafts}",
                "context": args.context, "new_tokens": args.new_tokens, "pieces": len(own),
                "prompts": len(own) * args.prompts_per_piece, "steps": sum(steps for steps, _ in own),
            }  # fmt: skip
            figures = [Figure("accepted_per_step", accepted(own), "drafts")]
            if cache != args.caches[0]:
                names = ("accepted_to_first", "accepted_to_first_low", "accepted_to_first_high")
                figures += [Figure(*pair) for pair in zip(names, ratio(own, base), strict=True)]
            written.append(cache, settings, figures)
            shown = ", ".join(f"{figure.metric} {figure.value:.4f}" for figure in figures)
            launch.CONSOLE.print(f"{cache}, {algorithm}={drafts}: {shown}", highlight=False)
    return int(done < len(args.caches))


if __name__ == "__main__":
    sys.exit(main())
