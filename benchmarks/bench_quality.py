# SPDX-License-Identifier: Apache-2.0
"""What each preset costs in accuracy: a model's predictions with it against those with an unquantised cache.

    python benchmarks/bench_quality.py [--model smollm2|DIR] [--text NAME|FILE ...] [--preset P ...]
        [--context N] [--judge-from N] [--csv FILE] [--plot FILE] [--json]

Texts are fed token by token in effect (teacher-forced: the position rule makes one pass over a text read what
token by token would read). Presets run the encode and attention path of a server, the kernels on a GPU and
the torch form on a CPU; fp8, the published method and plain min / max codes are simulated beside it. The
model runs in float32, so that only the cache makes a difference; q, k and v enter the cache in --dtype.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig, preset_names
from quality import caches, texts
from quality.scores import Scores

ATTENTION = "bench_quality"
ALIASES = {name: KVarNConfig.from_preset(name).name for name in preset_names()}
FIELDS = (
    *("cache", "bytes_per_token", "context", "positions", "kl_mean", "kl_median", "kl_p99", "flips"),
    *("perplexity", "perplexity_16bit", "seconds"),
)


class Model:
    """A causal language model whose attention can be given any cache."""

    def __init__(self, folder: str, device: torch.device, dtype: torch.dtype) -> None:
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

        AttentionInterface.register(ATTENTION, self._attention)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.network = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation=ATTENTION
        ).to(device)
        self.device, self.dtype = device, dtype
        self.attend = caches.unquantised().attend
        config = self.network.config.get_text_config()
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    def _attention(
        self,
        module: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: Any,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend [1, H, T, D] after RoPE with the cache in `self.attend`: [1, T, Hq, D]."""
        own = (x[0].transpose(0, 1).to(self.dtype).contiguous() for x in (q, k, v))
        return self.attend(*own, scaling)[None].to(q.dtype), None

    @torch.inference_mode()
    def logits(self, tokens: list[int], attend: caches.Attend) -> torch.Tensor:
        """Return the logits [T, V] of a text with a cache."""
        self.attend = attend
        ids = torch.tensor([tokens], device=self.device)
        return self.network(ids, use_cache=False).logits[0]


def check(rows: list[caches.Cache], device: torch.device) -> None:
    """Compare the presets' attention with the oracle, and the simulation with torch's, on 300 random tokens.

    Raises:
        SystemExit: they differ, so no figure would mean anything.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, 64, device=device).half() for heads in (6, 2, 2))
    heads_first = (x.float().transpose(0, 1)[None] for x in (q, k, v))
    causal = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True, enable_gqa=True)
    pairs = [("16-bit", caches.unquantised().attend(q, k, v, 0.125), causal[0].transpose(0, 1))]
    for row in rows:
        if row.name in ALIASES:
            config = KVarNConfig.from_preset(row.name)
            pairs.append((row.name, row.attend(q, k, v, 0.125), reference.attention(q, k, v, config)))
    for name, got, expected in pairs:
        error = ((got - expected).square().mean() / expected.square().mean()).sqrt().item()
        # 4e-4 is the rounding of an fp16 output
        if not error < 1e-3:
            raise SystemExit(
                f"expected the attention of {name} to agree with the oracle, relative RMS {error:.2e}"
            )


def measure(
    model: Model, rows: list[caches.Cache], pieces: list[texts.Text], progress: Any
) -> tuple[dict[str, Scores], float]:
    """Return the scores of each row over all texts, and the seconds of the unquantised passes."""
    scores = {row.name: Scores() for row in rows}
    exact_seconds = 0.0
    for piece in pieces:
        tokens = torch.tensor(piece.tokens, device=model.device)
        progress.update(f"{piece.name}: 16-bit")
        started = perf_counter()
        exact = model.logits(piece.tokens, caches.unquantised().attend)
        exact_seconds += perf_counter() - started
        for row in rows:
            progress.update(f"{piece.name}: {row.name}")
            started = perf_counter()
            logits = model.logits(piece.tokens, row.attend)
            scores[row.name].seconds += perf_counter() - started
            scores[row.name].add(exact, logits, tokens)
            seconds = perf_counter() - started
            progress.console.print(f"{piece.name}: {row.name} {seconds:.1f} s", highlight=False)
    return scores, exact_seconds


def collect(
    rows: list[caches.Cache], scores: dict[str, Scores], head_dim: int, context: int, judge_from: int
) -> list[dict[str, Any]]:
    """Return one record per row: the judged positions, and every bucket of positions."""
    return [
        {
            "cache": row.name,
            "bytes_per_token": row.bytes_per_token(head_dim),
            "context": context,
            "positions": f"{judge_from}-{context}",
            **scores[row.name].summary(judge_from, context),
            "buckets": scores[row.name].buckets(context),
            "seconds": round(scores[row.name].seconds, 2),
        }
        for row in rows
    ]


def show(results: list[dict[str, Any]], title: str) -> None:
    """Print the judged figures, and KL by bucket of positions."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    buckets = list(results[0]["buckets"])
    for column in ("cache", "B/token/head", "KL mean", "median", "p99", "flips", "ppl", "ppl vs 16-bit"):
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
        place = {"xytext": (6, -3), "textcoords": "offset points", "fontsize": 8}
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


def main() -> None:
    """Check, measure, and write what was asked for."""
    options = parse_arguments()
    from rich.console import Console

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    judge_from = options.context // 2 if options.judge_from is None else options.judge_from
    known = caches.all_caches(prompt=-(-judge_from // caches.PAGE) * caches.PAGE)
    wanted = dict.fromkeys(ALIASES.get(name, name) for name in options.preset or known)
    rows = [known[name] for name in wanted]
    with Console(file=sys.stderr).status("check") as progress:
        check(rows, device)
        folder = options.model
        if folder == "smollm2":
            from sglang_kvarn import smollm2

            folder = str(smollm2.prepare())
        model = Model(folder, device, getattr(torch, options.dtype))
        pieces = [texts.load(name, options.context, options.seed, model.tokenizer) for name in options.text]
        scores, exact_seconds = measure(model, rows, pieces, progress)
    results = collect(rows, scores, model.head_dim, options.context, judge_from)
    title = f"{Path(folder).name}, {len(pieces)} texts of {options.context} tokens, judged from {judge_from}"
    if options.csv:
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
        show(results, title)
        for piece in pieces:
            print(f"{piece.name}: {piece.source}")


if __name__ == "__main__":
    main()
