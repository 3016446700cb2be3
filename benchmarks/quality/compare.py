# SPDX-License-Identifier: Apache-2.0
"""Caches on hard inputs or other heads, beside themselves on the untouched model."""

from __future__ import annotations

from typing import Any

from benchmarks.quality.caches import Cache
from benchmarks.quality.frames import UNTOUCHED, Frame
from benchmarks.quality.scores import Scores

# beside the 16-bit cache
CACHES = ("kvarn_k4v2_g128", "kvarn_k4v4_g128", "kvarn_k2v2_g128", "fp8_e4m3")


def collect(
    scores: dict[tuple[str, str], Scores],
    rows: list[Cache],
    frames: list[Frame],
    head_dim: int,
    judged: tuple[int, int],
) -> list[dict[str, Any]]:
    """Return one record per frame and cache.

    Args:
        scores: by frame and cache name, the untouched ones among them.
        head_dim: of the model; a wide frame has its own.
        judged: first judged position and the one after the last.

    Returns:
        `kl_ratio` is the mean KL over that of the same cache on the untouched model, None for the 16-bit cache.
    """
    results = []
    for frame in frames:
        for row in rows:
            own, base = (scores[name, row.name] for name in (frame.name, UNTOUCHED.name))
            figures, untouched = own.summary(*judged), base.summary(*judged)["kl_mean"]
            results.append(
                {
                    "inputs": frame.name,
                    "cache": row.name,
                    "bytes_per_token": row.bytes_per_token(frame.head_dim or head_dim),
                    "context": judged[1],
                    "positions": f"{judged[0]}-{judged[1]}",
                    "finite": own.finite,
                    "kl_ratio": figures["kl_mean"] / untouched if untouched > 0 else None,
                    **figures,
                    "seconds": round(own.seconds, 2),
                }
            )
    return results


def show(results: list[dict[str, Any]], title: str) -> None:
    """Print one line per frame and cache."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    columns = ("inputs", "cache", "B/token/head", "finite", "KL mean (nats)", "of untouched", "p99", "flips")
    for column in (*columns, "ppl vs 16-bit"):
        table.add_column(column, justify="left" if column in ("inputs", "cache") else "right", no_wrap=True)
    for row in results:
        ratio = row["kl_ratio"]
        table.add_row(
            row["inputs"],
            row["cache"],
            f"{row['bytes_per_token']:g}",
            "yes" if row["finite"] else "NO",
            f"{row['kl_mean']:.5f}",
            "-" if ratio is None else f"{ratio:.2f} x",
            f"{row['kl_p99']:.4f}",
            f"{row['flips']:.2%}",
            f"{row['perplexity'] / row['perplexity_16bit'] - 1:+.2%}",
        )
    Console(width=160).print(table)
