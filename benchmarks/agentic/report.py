# SPDX-License-Identifier: Apache-2.0
"""Tables, cliffs and the picture of a sweep, on disk and on the terminal."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from agentic import plots, store, summary

# heading -> field, factor, digits
FIGURES = {
    "TTFT p50 s": ("ttft_p50", 1, 2),
    "p95 s": ("ttft_p95", 1, 2),
    "later turns p95 s": ("later_ttft_p95", 1, 2),
    "TPOT p50 ms": ("tpot_p50", 1e3, 1),
    "p95 ms": ("tpot_p95", 1e3, 1),
    "hit": ("hit_rate", 1, 3),
    "of theory": ("hit_share", 1, 3),
    "tokens/s": ("output_tokens_per_second", 1, 0),
    "req/s": ("requests_per_second", 1, 2),
    "evicted": ("evicted_tokens", 1, 0),
    "retract.": ("retractions", 1, 0),
    "pool peak": ("pool_usage_peak", 1, 2),
    "failed": ("failed", 1, 0),
    "cut": ("cut_turns", 1, 0),
}


def cliffs(points: list[dict]) -> dict[str, int | None]:
    """Return the cliff of every cache."""
    return {
        cache: summary.cliff({p["sessions"]: p["hit_share"] for p in points if p["cache"] == cache})
        for cache in dict.fromkeys(point["cache"] for point in points)
    }


def write(results: store.Store, caches: list[str]) -> list[dict]:
    """Write points.csv, turns.csv, summary.json and agentic.png of all points; return the points."""
    points = results.load(caches)
    rows = store.point_rows(points)
    store.write_csv(results.folder / "points.csv", rows)
    store.write_csv(results.folder / "turns.csv", store.turn_rows(points))
    whole = {"cliff": cliffs(points), "against_bf16": summary.against(points, "bf16"), "points": rows}
    (results.folder / "summary.json").write_text(json.dumps(whole, indent=1))
    if any(point["requests"] for point in points):
        title = f"{points[0]['model']} on {points[0]['device']}, SGLang {points[0]['sglang']}"
        plots.draw(points, results.folder / "agentic.png", title)
    return points


def show(points: list[dict]) -> None:
    """Print one line per point, the cliffs, and what each cache gains over bf16."""
    table = Table("cache", "N", title="agents")
    for heading in FIGURES:
        table.add_column(heading, justify="right")
    for point in points:
        cells = []
        for key, factor, digits in FIGURES.values():
            value = point.get(key)
            cells.append("-" if value is None else f"{value * factor:,.{digits}f}")
        table.add_row(point["cache"], str(point["sessions"]), *cells)
    Console(width=150).print(table)
    for cache, held in cliffs(points).items():
        print(f"{cache}: cliff at N = {held}" if held else f"{cache}: beyond its cliff at every N")
    for cache, figures in summary.against(points, "bf16").items():
        print(f"{cache} against bf16: " + ", ".join(f"{name} {value:.2f}" for name, value in figures.items()))
