# SPDX-License-Identifier: Apache-2.0
"""The picture: time to first token and hit rate against the number of sessions, all caches."""

from __future__ import annotations

from pathlib import Path

from benchmarks.agentic.summary import CLIFF_SHARE, cliff
from benchmarks.common import plots


def _columns(points: list[dict], cache: str) -> dict[str, list]:
    mine = [point for point in points if point["cache"] == cache]
    keys = (
        "sessions",
        "ttft_p50",
        "ttft_p95",
        "hit_rate",
        "theory_rate",
        "hit_share",
        "output_tokens_per_second",
    )
    return {key: [point[key] for point in mine] for key in keys}


def draw(points: list[dict], path: Path, title: str) -> None:
    """Draw three panels and write them to a file; points without a finished turn have no place in them."""
    pyplot = plots.pyplot()
    points = [point for point in points if point["requests"]]
    figure, (times, hits, speed) = pyplot.subplots(1, 3, figsize=(15, 4.6), constrained_layout=True)
    for number, cache in enumerate(dict.fromkeys(point["cache"] for point in points)):
        colour, data = f"C{number}", _columns(points, cache)
        n = data["sessions"]
        held = cliff(dict(zip(n, data["hit_share"], strict=True)))
        label = f"{cache}, cliff at {held}" if held else f"{cache}, beyond its cliff"
        times.plot(n, data["ttft_p95"], "o-", color=colour, label=f"{cache} p95")
        times.plot(n, data["ttft_p50"], "o:", color=colour, label=f"{cache} p50")
        hits.plot(n, data["hit_rate"], "o-", color=colour, label=label)
        speed.plot(n, data["output_tokens_per_second"], "o-", color=colour, label=cache)
        if held:
            hits.axvline(held, color=colour, linewidth=0.8, linestyle=":")
    theory: dict[int, float] = {}
    for point in points:
        # smaller pages find a little more
        theory[point["sessions"]] = max(point["theory_rate"], theory.get(point["sessions"], 0.0))
    hits.plot(sorted(theory), [theory[n] for n in sorted(theory)], "k--", linewidth=1, label="nothing evicted")
    times.set(title="time to first token", ylabel="seconds", yscale="log")
    hits.set(title=f"prompt tokens found (cliff: {CLIFF_SHARE} of theory)", ylabel="share", ylim=(0, 1.02))
    speed.set(title="output", ylabel="tokens/s", ylim=(0, None))
    for axes in (times, hits, speed):
        axes.set(xlabel="concurrent sessions", xscale="log")
        axes.set_xticks(sorted(theory), [str(n) for n in sorted(theory)])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
