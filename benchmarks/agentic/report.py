# SPDX-License-Identifier: Apache-2.0
"""Rows, cliffs and the picture of a sweep, on disk and on the terminal."""

from __future__ import annotations

import json

from rich.console import Console
from rich.table import Table

from benchmarks.agentic import plots, summary
from benchmarks.common.rows import Figure
from benchmarks.common.store import Store

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


# metric of a point or of the turns of one index -> unit
UNITS = {
    **dict.fromkeys(("requests", "failed", "server_requests", "retracted_requests"), "requests"),
    **dict.fromkeys(("seconds", "start_seconds"), "s"),
    **dict.fromkeys((f"{name}_{p}" for name in ("ttft", "tpot", "later_ttft") for p in ("p50", "p95")), "s"),
    **dict.fromkeys((f"{name}_tokens" for name in ("prompt", "cached", "theory", "output", "mean_prompt")), "tokens"),
    **dict.fromkeys((f"server_{name}_tokens" for name in ("prompt", "generated", "cached")), "tokens"),
    **dict.fromkeys(("evicted_tokens", "pool_tokens"), "tokens"),
    **dict.fromkeys((f"{name}_tokens_per_second" for name in ("output", "prompt", "computed")), "tokens/s"),
    **dict.fromkeys(("hit_rate", "theory_rate", "hit_share", "pool_usage_mean", "pool_usage_peak", "retractions"), ""),
    "requests_per_second": "requests/s",
    "sessions_resident": "sessions",
    "cut_turns": "turns",
    "pool_gib": "GiB",
}
# of a point, in no summary
HIDDEN = ("turns", "by_turn", "server_command", "error_messages")


def _figures(found: dict) -> list[Figure]:
    return [Figure(name, found[name], unit) for name, unit in UNITS.items() if found.get(name) is not None]


def rows(point: dict) -> list[tuple[dict, list[Figure]]]:
    """Return settings and figures of a point, and of its turns by index."""
    head = {"sessions": point["sessions"]}
    return [(head, _figures(point)), *((head | {"turn": turn["turn"]}, _figures(turn)) for turn in point["by_turn"])]


def cliffs(points: list[dict]) -> dict[str, int | None]:
    """Return the cliff of every cache."""
    return {
        cache: summary.cliff({p["sessions"]: p["hit_share"] for p in points if p["cache"] == cache})
        for cache in dict.fromkeys(point["cache"] for point in points)
    }


def write(results: Store, caches: list[str]) -> list[dict]:
    """Write summary.json and agentic.png of all points; return the points."""
    points = results.load(caches)
    shown = [{key: value for key, value in point.items() if key not in HIDDEN} for point in points]
    whole = {"cliff": cliffs(points), "against_bf16": summary.against(points, "bf16"), "points": shown}
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
