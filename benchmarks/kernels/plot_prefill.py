# SPDX-License-Identifier: Apache-2.0
"""Draw the rows of `bench_engine --prefills --output`: time to first token of each cache, and against the first.

    python -m benchmarks.kernels.plot_prefill benchmarks/results/engine_short_8b.csv \
        benchmarks/results/engine_short_8b.png

The baseline is bf16; shapes are NEW+CACHED tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import plots, rows

BASELINE, METRIC = "bf16", "time_to_first_token"


def read(path: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Return (device and model of the rows, cache -> NEW+CACHED -> milliseconds), the baseline first.

    Raises:
        ValueError: a cache lacks a shape that the baseline has, or there is no baseline.
    """
    times: dict[str, dict[str, float]] = {BASELINE: {}}
    title = ""
    for row in rows.read(path, "engine"):
        settings = row["settings"]
        if row["metric"] == METRIC and "new" in settings:
            shape = f"{settings['new']}+{settings['cached']}"
            times.setdefault(row["provider"], {})[shape] = float(row["value"])
            title = title or f"{settings['model']} on {row['device']}"
    for cache, by_shape in times.items():
        if not by_shape or by_shape.keys() != times[BASELINE].keys():
            raise ValueError(
                f"expected the same shapes of {BASELINE} and every other cache in {path}, got "
                f"{', '.join(times[BASELINE]) or 'none'} and {', '.join(by_shape) or 'none'} of {cache}: measure both"
            )
    return title, times


def draw(title: str, times: dict[str, dict[str, float]], target: Path) -> None:
    """Draw a group of bars for each shape; above those of a cache stands its time as a multiple of the baseline's."""
    pyplot = plots.pyplot()
    shapes = list(times[BASELINE])
    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    width = 0.8 / len(times)
    for n, (cache, by_shape) in enumerate(times.items()):
        at = [i + (n - (len(times) - 1) / 2) * width for i in range(len(shapes))]
        bars = axes.bar(at, [by_shape[shape] for shape in shapes], width, label=cache)
        if cache != BASELINE:
            ratios = [f"{by_shape[shape] / times[BASELINE][shape]:.2f}" for shape in shapes]
            axes.bar_label(bars, ratios, padding=2, fontsize=8)
    labels = ["{:,}\non {:,}".format(*map(int, shape.split("+"))) for shape in shapes]
    axes.set_xticks(range(len(shapes)), labels)
    axes.set(xlabel="new tokens on cached tokens", ylabel="time to first token, ms", yscale="log", title=title)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    args = plots.parse(__doc__, "bench_engine", arguments)
    draw(*read(args.csv), args.png)


if __name__ == "__main__":
    main()
