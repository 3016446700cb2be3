# SPDX-License-Identifier: Apache-2.0
"""What each preset costs in accuracy: a model's predictions with it against those with an unquantised cache.

    python benchmarks/bench_quality.py [--model smollm2|DIR] [--text NAME|FILE ...] [--preset P ...]
        [--context N] [--judge-from N] [--window N ...] [--csv FILE] [--plot FILE] [--json]
    python benchmarks/bench_quality.py --hard --dtype bfloat16 [--unbalanced]
    python benchmarks/bench_quality.py --head-dim 128 256
    python benchmarks/bench_quality.py --code-error

Texts are fed token by token in effect (teacher-forced: the position rule makes one pass over a text read what
token by token would read). Presets run the encode and attention path of a server, the kernels on a GPU and
the torch form on a CPU; fp8, the published method and plain min / max codes are simulated beside it. The
model runs in float32, so that only the cache makes a difference; q, k and v enter the cache in --dtype.

--hard and --head-dim measure the same model in forms that compute the same (quality.hard, quality.heads), each cache
beside itself on the model as it is. Presets have the weights that a server gives them (sglang_kvarn.balance), with
--unbalanced also those of the checkpoint. --hard in float16 leaves out what only bfloat16 can hold. --code-error prints
the squared error of keys and values themselves instead.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from engines import model_folder
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig, preset_names
from quality import caches, code_error, compare, frames, hard, heads, texts
from quality.model import Model
from quality.scores import Scores

ALIASES = {name: KVarNConfig.from_preset(name).name for name in preset_names()}
FIELDS = (
    *("cache", "bytes_per_token", "context", "positions", "kl_mean", "kl_median", "kl_p99", "flips"),
    *("perplexity", "perplexity_16bit", "kl_of_fp8", "kl_of_fp8_low", "kl_of_fp8_high", "texts", "seconds"),
)
FP8 = "fp8_e4m3"


def check(rows: list[caches.Cache], device: torch.device) -> None:
    """Compare the presets' attention with the oracle, and the simulation with torch's, on 500 random tokens.

    Raises:
        SystemExit: they differ, so no figure would mean anything.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(500, heads, 64, device=device).half() for heads in (6, 2, 2))
    heads_first = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    causal = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    pairs = [("16-bit", caches.unquantised().attend(q, k, v, 0.125), causal[0].transpose(0, 1))]
    for row in rows:
        if row.config is not None:
            pairs.append((row.name, row.attend(q, k, v, 0.125), reference.attention(q, k, v, row.config)))
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


def collect(
    rows: list[caches.Cache],
    scores: dict[tuple[str, str], Scores],
    head_dim: int,
    context: int,
    judge_from: int,
) -> list[dict[str, Any]]:
    """Return one record per row on the untouched model: the judged positions, and every bucket of positions."""
    own = {row.name: scores[frames.UNTOUCHED.name, row.name] for row in rows}

    def of_fp8(row: caches.Cache) -> dict[str, float]:
        if FP8 not in own:
            return {}
        names = ("kl_of_fp8", "kl_of_fp8_low", "kl_of_fp8_high")
        return dict(zip(names, own[row.name].ratio(own[FP8], judge_from, context), strict=True))

    return [
        {
            "cache": row.name,
            "bytes_per_token": row.bytes_per_token(head_dim),
            "context": context,
            "positions": f"{judge_from}-{context}",
            **own[row.name].summary(judge_from, context),
            **of_fp8(row),
            "texts": len(own[row.name].divergence),
            "buckets": own[row.name].buckets(context),
            "seconds": round(own[row.name].seconds, 2),
        }
        for row in rows
    ]


def show(results: list[dict[str, Any]], title: str) -> None:
    """Print the judged figures, and KL by bucket of positions."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    buckets = list(results[0]["buckets"])
    columns = ("cache", "B/token/head", "KL mean", "median", "p99", "flips", "ppl", "ppl vs 16-bit")
    for column in (*columns, "KL / fp8's (95 %)"):
        table.add_column(column, justify="left" if column == "cache" else "right", no_wrap=True)
    for bucket in buckets:
        table.add_column(f"KL {bucket}", justify="right", no_wrap=True)
    for row in results:
        table.add_row(
            row["cache"],
            f"{row['bytes_per_token']:g}",
            *(f"{row[key]:.5f}" for key in ("kl_mean", "kl_median", "kl_p99")),
            f"{row['flips']:.2%}",
            f"{row['perplexity']:.4f}",
            f"{row['perplexity'] / row['perplexity_16bit'] - 1:+.2%}",
            "{kl_of_fp8:.2f} ({kl_of_fp8_low:.2f}-{kl_of_fp8_high:.2f})".format(**row) if "kl_of_fp8" in row else "-",
            *(f"{row['buckets'][bucket]['kl_mean']:.5f}" for bucket in buckets),
        )
    Console(width=200).print(table)


def plot(results: list[dict[str, Any]], title: str, target: Path) -> None:
    """Draw KL against bytes per token."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for row in results:
        name = row["cache"]
        marker = "o" if name in ALIASES else "s" if name.startswith("fp8") else "x"
        colour = "tab:blue" if name in ALIASES else "tab:orange" if name.startswith("fp8") else "tab:grey"
        axes.plot(row["bytes_per_token"], row["kl_mean"], marker, color=colour)
        label = name.removeprefix("kvarn_").replace("_g128", "")
        # presets and what they are compared with lie close to each other
        side = {"xytext": (6, -3)} if colour != "tab:grey" else {"xytext": (-6, -3), "ha": "right"}
        place = {**side, "textcoords": "offset points", "fontsize": 8}
        axes.annotate(label, (row["bytes_per_token"], row["kl_mean"]), **place)
    axes.set(xlabel="bytes per token and KV head", ylabel="mean KL to the 16-bit cache (nats)", yscale="log")
    axes.set_title(title, fontsize=9)
    axes.margins(x=0.2)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(target, dpi=120)


def parse_arguments() -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", default="smollm2", help="folder of a model (default: %(default)s)")
    kinds = ", ".join(texts.KINDS)
    parser.add_argument("--text", nargs="+", default=texts.DEFAULT, help=f"files, or kinds of: {kinds}")
    rows = dict.fromkeys([*ALIASES, *caches.all_caches(0)])
    parser.add_argument("--preset", nargs="+", choices=rows, metavar="P", help="default: all rows")
    parser.add_argument("--context", type=int, default=1024, help="tokens of a text (default: %(default)s)")
    parser.add_argument("--judge-from", type=int, help="first judged position; default: half of the context")
    parser.add_argument("--seed", type=int, default=0, help="where a text begins (default: %(default)s)")
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"), help="of q, k and v")
    parser.add_argument("--csv", type=Path, help="write one line per row and bucket here")
    parser.add_argument("--hard", action="store_true", help="also with inputs that are hard to quantise")
    parser.add_argument("--unbalanced", action="store_true", help="the presets also on the weights of the checkpoint")
    parser.add_argument(
        "--head-dim", type=int, nargs="+", default=[], metavar="D", help="also with heads of 128 or 256 channels"
    )
    parser.add_argument(
        "--window", type=int, nargs="+", default=[], metavar="N", help="the presets also with N pages read exactly"
    )
    parser.add_argument(
        "--code-error", action="store_true", help="print the squared error of codes as a share of the variance, no KL"
    )
    parser.add_argument("--plot", type=Path, help="draw KL against bytes per token here")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser.parse_args()


def write_csv(results: list[dict[str, Any]], target: Path) -> None:
    """Write the judged positions and each bucket of every row."""
    with target.open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS, extrasaction="ignore")
        writer.writeheader()
        for row in results:
            writer.writerow(row)
            for positions, figures in row["buckets"].items():
                writer.writerow({**row, "positions": positions, **figures})


def choose_rows(options: argparse.Namespace, judge_from: int) -> list[caches.Cache]:
    """Return the caches to measure; beside other inputs, the 16-bit cache is a row of its own."""
    known = caches.all_caches(prompt=-(-judge_from // caches.PAGE) * caches.PAGE)
    compared = options.hard or options.head_dim
    names = options.preset or (compare.CACHES if compared else known)
    rows = [known[name] for name in dict.fromkeys(ALIASES.get(name, name) for name in names)]
    windows = [caches.kvarn(row.name, n) for row in rows if row.config is not None for n in options.window]
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
    made += [heads.widened(model.head_dim, width) for width in options.head_dim]
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


def show_code_errors(shares: dict[tuple[str, str, int], float]) -> None:
    """Print what `code_error.shares` found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "encoder", *(f"{bits} bits" for bits in code_error.BITS), title="squared error / variance")
    for side, encoder in dict.fromkeys(key[:2] for key in shares):
        table.add_row(side, encoder, *(f"{shares[side, encoder, bits]:.4f}" for bits in code_error.BITS))
    Console().print(table)


def main() -> None:
    """Check, measure, and write what was asked for."""
    options = parse_arguments()
    from rich.console import Console

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge_from = options.context // 2 if options.judge_from is None else options.judge_from
    rows = choose_rows(options, judge_from)
    with Console(file=sys.stderr).status("load") as progress:
        folder = model_folder(options.model)
        model = Model.load(folder, device, getattr(torch, options.dtype))
        pieces = [texts.load(name, options.context, options.seed, model.tokenizer) for name in options.text]
        if options.code_error:
            progress.update("squared errors")
            show_code_errors(code_error.shares(model, pieces))
            return
        progress.update("check")
        check(rows, device)
        inputs = choose_inputs(options, model)
        scores, exact_seconds = measure(model, rows, inputs, pieces, progress)
    title = f"{Path(folder).name}, {len(pieces)} texts of {options.context} tokens, judged from {judge_from}"
    if compared := len(inputs) > 1:
        title += f", q, k and v in {options.dtype}"
        results = compare.collect(scores, rows, inputs, model.head_dim, (judge_from, options.context))
    else:
        results = collect(rows, scores, model.head_dim, options.context, judge_from)
    if options.csv and compared:
        compare.write_csv(results, options.dtype, options.csv)
    elif options.csv:
        write_csv(results, options.csv)
    if options.plot:
        plot(results, title, options.plot)
    if options.json:
        name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
        facts = {"torch": torch.__version__, "device": name, "dtype": options.dtype, "model": folder}
        sources = {piece.name: piece.source for piece in pieces}
        seconds = {"seconds_16bit": round(exact_seconds, 2)}
        print(json.dumps({"title": title, **facts, **seconds, "texts": sources, "rows": results}))
    else:
        (compare.show if compared else show)(results, title)
        for piece in pieces:
            print(f"{piece.name}: {piece.source}")


if __name__ == "__main__":
    main()
