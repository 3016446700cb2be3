# SPDX-License-Identifier: Apache-2.0
"""What each preset costs in accuracy: a model's predictions with it against those with an unquantised cache.

    python -m benchmarks.quality.bench_quality --output quality.csv --plot quality.png
    python -m benchmarks.quality.bench_quality --texts held-out --caches fp8_e4m3 kvarn kvarn_k4v3_g128 --context 3072
    python -m benchmarks.quality.bench_quality --hard --dtype bfloat16 --unbalanced
    python -m benchmarks.quality.bench_quality --head-dims 128 256
    python -m benchmarks.quality.bench_quality --code-error

Texts are fed token by token in effect (teacher-forced: the position rule makes one pass over a text read what
token by token would read). Presets run the encode and attention path of a server, the kernels on a GPU and
the torch form on a CPU; fp8, the published method and plain min / max codes are simulated beside it. The
model runs in float32, so that only the cache makes a difference; q, k and v enter the cache in --dtype.

--hard and --head-dims measure the same model in forms that compute the same (quality.hard, quality.heads), each cache
beside itself on the model as it is. Presets have the weights that a server gives them (kvarn_kernels.balance), with
--unbalanced also those of the checkpoint. --hard in float16 leaves out what only bfloat16 can hold. --code-error prints
the squared error of keys and values themselves instead.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from kvarn_kernels import reference

from benchmarks.common import cli, models
from benchmarks.common.rows import Rows
from benchmarks.quality import caches, code_error, compare, frames, hard, heads, report, sources, texts
from benchmarks.quality.model import Model
from benchmarks.quality.report import ALIASES
from benchmarks.quality.scores import Scores

# of --texts
HELD_OUT = "held-out"


def check(rows: list[caches.Cache], device: torch.device) -> None:
    """Compare the presets' attention with the oracle, and the simulation with torch's, on 500 random tokens.

    Raises:
        SystemExit: they differ, so no figure would mean anything.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(500, heads, 64, device=device).half() for heads in (6, 2, 2))
    heads_first = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    causal = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    pairs = [("16-bit", caches.unquantised().attend(q, k, v, 0.125, 0), causal[0].transpose(0, 1))]
    for row, window in product(rows, (0, 200)):
        if row.config is not None:
            expected = reference.attention(q, k, v, row.config, sliding_window=window)
            pairs.append((row.name, row.attend(q, k, v, 0.125, window), expected))
    for name, got, expected in pairs:
        error = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
        # 4e-4 is the rounding of an fp16 output
        if not error < 1e-3:
            raise SystemExit(f"expected the attention of {name} to agree with the oracle, relative RMS {error:.2e}")


def measure(
    model: Model, rows: list[caches.Cache], inputs: list[frames.Frame], pieces: list[texts.Text], progress: Any
) -> tuple[dict[tuple[str, str], Scores], float]:
    """Return the scores of each frame and row over all texts, and the seconds of the unquantised passes."""
    scores = {(frame.name, row.name): Scores() for frame in inputs for row in rows}
    exact_seconds = 0.0
    for piece in pieces:
        tokens = torch.tensor(piece.tokens, device=model.device)
        progress.update(f"{piece.name}: 16-bit")
        started = perf_counter()
        exact = model.logits(piece.tokens, caches.unquantised().attend)
        exact_seconds += perf_counter() - started
        for frame, row in product(inputs, rows):
            what = f"{piece.name}, {frame.name}: {row.name}"
            progress.update(what)
            with model.form(frame, row.balanced):
                started, own = perf_counter(), scores[frame.name, row.name]
                logits = model.logits(piece.tokens, row.attend)
            own.seconds += perf_counter() - started
            own.add(exact, logits, tokens)
            progress.console.print(f"{what} {perf_counter() - started:.1f} s", highlight=False)
    return scores, exact_seconds


def load_texts(options: argparse.Namespace, tokenizer: Any) -> list[texts.Text]:
    """Return a piece of each of --texts.

    Raises:
        SystemExit: a text is too short.
    """
    names = [own for name in options.texts for own in (sources.HELD_OUT if name == HELD_OUT else [name])]
    try:
        return [texts.load(name, options.context, options.seed, tokenizer) for name in names]
    except ValueError as error:
        raise SystemExit(str(error)) from None


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    cli.add_model(parser, models.SMOLLM2)
    text = f"Files, or names of texts: {', '.join(sources.ALL)}; {HELD_OUT} is all of them that nothing was chosen on."
    parser.add_argument("--texts", nargs="+", default=texts.DEFAULT, metavar="T", help=text)
    known = list(dict.fromkeys([*ALIASES, *caches.all_caches(0)]))
    cli.add_caches(parser, None, known, "Without it all, or some of them beside --hard and --head-dims.")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="Tokens of a text.")
    text = "First judged position; without it half of the context."
    parser.add_argument("--judge-from", type=int, metavar="N", help=text)
    cli.add_seed(parser, "the place where a text begins")
    text = "Data type of q, k and v."
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help=text)
    parser.add_argument("--hard", action="store_true", help="Also measure inputs that are hard to quantise.")
    text = "Also measure the presets on the weights of the checkpoint."
    parser.add_argument("--unbalanced", action="store_true", help=text)
    text = "Also measure the model with heads of that many channels, 128 or 256."
    parser.add_argument("--head-dims", type=int, nargs="+", default=[], metavar="D", help=text)
    text = "Also measure the presets with that many exact pages before the query's own."
    parser.add_argument("--windows", type=int, nargs="+", default=[], metavar="N", help=text)
    text = "Print the squared error of codes as a share of the variance, and no KL."
    parser.add_argument("--code-error", action="store_true", help=text)
    text = "Draw KL against bytes per token to this file; without it nothing is drawn."
    parser.add_argument("--plot", type=Path, metavar="PNG", help=text)
    parser.add_argument("--json", action="store_true", help="Print one JSON object instead of a table.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def choose_rows(options: argparse.Namespace, judge_from: int) -> list[caches.Cache]:
    """Return the caches to measure; beside other inputs, the 16-bit cache is a row of its own."""
    known = caches.all_caches(prompt=-(-judge_from // caches.PAGE) * caches.PAGE)
    compared = options.hard or options.head_dims
    names = options.caches or (compare.CACHES if compared else known)
    rows = [known[name] for name in dict.fromkeys(ALIASES.get(name, name) for name in names)]
    windows = [caches.kvarn(row.name, n) for row in rows if row.config is not None for n in options.windows]
    rows += [row for row in windows if row.config != known[row.name.split()[0]].config]
    if options.unbalanced:
        rows += [caches.unbalanced(row) for row in rows if row.balanced]
    return [caches.unquantised(), *rows] if compared else rows


def choose_inputs(options: argparse.Namespace, model: Model) -> list[frames.Frame]:
    """Return the forms of the model to measure, the untouched one first.

    Raises:
        SystemExit: a form changes what the model computes, so no figure would mean anything.
    """
    made = hard.frames(model.kv_heads, model.head_dim) if options.hard else []
    made += [heads.widened(model.head_dim, width) for width in options.head_dims]
    for frame in made:
        # the greatest biases move scores by some hundred, in float64
        if not (error := frames.error(frame, model.kv_heads, model.head_dim)) < 1e-9:
            raise SystemExit(f"expected {frame.name} to leave attention as it is, relative RMS {error:.2e}")
        for balanced in (False, True):
            # in float32; the greatest bias of values costs SmolLM2 2e-5, factors nothing
            if frame.reweigh is not None and not (error := model.error(frame, balanced)) < 2e-4:
                raise SystemExit(f"expected {frame.name} to leave the model as it is, relative RMS {error:.2e}")
    fitting = [frame for frame in made if options.dtype == "bfloat16" or not frame.needs_bf16]
    return [frames.UNTOUCHED, *fitting]


def main() -> None:
    """Check, measure, and write what was asked for."""
    options = parse()
    written = Rows(options.output, "quality")
    from rich.console import Console

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge_from = options.context // 2 if options.judge_from is None else options.judge_from
    rows = choose_rows(options, judge_from)
    with Console(file=sys.stderr).status("load") as progress:
        folder = models.folder(options.model)
        model = Model.load(str(folder), device, getattr(torch, options.dtype))
        pieces = load_texts(options, model.tokenizer)
        if options.code_error:
            progress.update("squared errors")
            report.show_code_errors(code_error.shares(model, pieces))
            return
        progress.update("check")
        check(rows, device)
        inputs = choose_inputs(options, model)
        scores, exact_seconds = measure(model, rows, inputs, pieces, progress)
    title = f"{folder.name}, {len(pieces)} texts of {options.context} tokens, judged from {judge_from}"
    if compared := len(inputs) > 1:
        title += f", q, k and v in {options.dtype}"
        results = compare.collect(scores, rows, inputs, model.head_dim, (judge_from, options.context))
    else:
        results = report.collect(rows, scores, model.head_dim, options.context, judge_from)
    common = {"model": options.model, "dtype": options.dtype, "texts": len(pieces), "seed": options.seed}
    for cache, settings, figures in report.rows(results):
        written.append(cache, common | settings, figures)
    if options.plot:
        report.plot(results, title, options.plot)
    if options.json:
        facts = written.provenance | {"dtype": options.dtype, "model": str(folder)}
        sources = {piece.name: piece.source for piece in pieces}
        seconds = {"seconds_16bit": round(exact_seconds, 2)}
        print(json.dumps({"title": title, **facts, **seconds, "texts": sources, "rows": results}))
    else:
        (compare.show if compared else report.show)(results, title)
        for piece in pieces:
            print(f"{piece.name}: {piece.source}")


if __name__ == "__main__":
    main()
