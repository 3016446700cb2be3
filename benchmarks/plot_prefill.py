# SPDX-License-Identifier: Apache-2.0
"""Draw the rows of `bench_engine.py --prefills --csv`: time to first token of each cache, and against the first.

    python benchmarks/plot_prefill.py benchmarks/results/engine_fa3_8b.csv benchmarks/results/engine_fa3_8b.png

The baseline is bf16; shapes are NEW+CACHED tokens.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

BASELINE, QUANTITY = "bf16", " time to first token"


def read(path: Path) -> tuple[str, dict[str, dict[str, float]]]:
    """Return (device and model of the rows, cache -> NEW+CACHED -> milliseconds), the baseline first.

    Raises:
        ValueError: a cache lacks a shape that the baseline has, or there is no baseline.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["quantity"].endswith(QUANTITY)]
    times: dict[str, dict[str, float]] = {BASELINE: {}}
    for row in rows:
        times.setdefault(row["cache"], {})[row["quantity"].removesuffix(QUANTITY)] = float(row["value"])
    for cache, by_shape in times.items():
        if not by_shape or by_shape.keys() != times[BASELINE].keys():
            raise ValueError(
                f"expected the same shapes of {BASELINE} and every other cache in {path}, got "
                f"{', '.join(times[BASELINE]) or 'none'} and {', '.join(by_shape) or 'none'} of {cache}: measure both"
            )
    return f"{rows[0]['model']} on {rows[0]['device']}", times


def draw(title: str, times: dict[str, dict[str, float]], target: Path) -> None:
    """Draw a group of bars for each shape; above those of a cache stands its time as a multiple of the baseline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="rows of bench_engine.py")
    parser.add_argument("png", type=Path, help="the picture, written")
    args = parser.parse_args()
    draw(*read(args.csv), args.png)


if __name__ == "__main__":
    main()
