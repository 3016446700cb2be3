# SPDX-License-Identifier: Apache-2.0
"""What bench_quality found, as records, as a table, as a picture and as rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvarn_kernels.config import KVarNConfig, preset_names

from benchmarks.common import plots
from benchmarks.common.caches import FP8
from benchmarks.common.rows import Figure
from benchmarks.quality import caches, code_error, frames
from benchmarks.quality.scores import Scores

ALIASES = {name: KVarNConfig.from_preset(name).name for name in preset_names()}
# metric -> unit
UNITS = {
    "bytes_per_token": "bytes",
    "kl_mean": "nats",
    "kl_median": "nats",
    "kl_p99": "nats",
    "kl_ratio": "",
    "kl_of_fp8": "",
    "flips": "",
    "perplexity": "",
    "perplexity_16bit": "",
    "finite": "",
    "seconds": "s",
}
# bounds of the 95 % interval of a metric
INTERVALS = {"kl_of_fp8": ("kl_of_fp8_low", "kl_of_fp8_high")}


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
    figure, axes = plots.pyplot().subplots(figsize=(8, 5), layout="constrained")
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


def show_code_errors(shares: dict[tuple[str, str, int], float]) -> None:
    """Print what `code_error.shares` found."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "encoder", *(f"{bits} bits" for bits in code_error.BITS), title="squared error / variance")
    for side, encoder in dict.fromkeys(key[:2] for key in shares):
        table.add_row(side, encoder, *(f"{shares[side, encoder, bits]:.4f}" for bits in code_error.BITS))
    Console().print(table)


def figures(record: dict[str, Any]) -> list[Figure]:
    """Return the rows of a record of `collect` or `compare.collect`, interval bounds as metrics of their own."""
    found = []
    for metric, unit in UNITS.items():
        for name in (metric, *INTERVALS.get(metric, ())):
            if (value := record.get(name)) is not None:
                found.append(Figure(name, int(value) if isinstance(value, bool) else value, unit))
    return found


def rows(records: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], list[Figure]]]:
    """Return (cache, settings, figures) of the judged positions, and of each bucket of positions, of every record."""
    found = []
    for record in records:
        for positions, own in [(record["positions"], record), *record.get("buckets", {}).items()]:
            settings = {"inputs": record.get("inputs"), "context": record["context"], "positions": positions}
            found.append((record["cache"], settings, figures(own)))
    return found
