# SPDX-License-Identifier: Apache-2.0
"""Draw the rows of `bench_decode.py --csv`: microseconds and bytes per second of each provider and shape.

    python benchmarks/plot_decode.py benchmarks/results/decode.csv benchmarks/results/decode.png

Rows of one GPU with 32/8 heads of 128, measured beside FlashInfer in bf16: the latest of each provider and
shape.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

HEADS, HEADS_DRAWN = ("qo_heads", "kv_heads", "head_dim"), ("32", "8", "128")
RATIO = "ratio_to_flashinfer_bf16"


def read(path: Path) -> tuple[str, dict[str, dict[str, dict[str, float]]]]:
    """Return (GPU of the last row, provider -> shape -> figures) of its rows.

    Raises:
        ValueError: no rows.
    """
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[RATIO] and tuple(row[name] for name in HEADS) == HEADS_DRAWN]
    if not rows:
        raise ValueError(f"expected rows of bench_decode.py --csv with 32/8 heads of 128, got none in {path}")
    figures: dict[str, dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["gpu"] == rows[-1]["gpu"]:
            numbers = {name: float(row[name]) for name in ("median_us", "gb_per_s", "copy_share")}
            figures.setdefault(row["provider"], {})[f"{row['batch']} x {int(row['context']):,}"] = numbers
    return rows[-1]["gpu"], figures


def draw(gpu: str, figures: dict[str, dict[str, dict[str, float]]], target: Path) -> None:
    """Draw a group of bars for each shape, the longest time first."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shapes = {shape for by_shape in figures.values() for shape in by_shape}
    times = {shape: max(x[shape]["median_us"] for x in figures.values() if shape in x) for shape in shapes}
    order = sorted(shapes, key=lambda shape: -times[shape])
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    width = 0.85 / len(figures)
    for axes, name in zip(panels, ("median_us", "gb_per_s"), strict=True):
        for n, (provider, by_shape) in enumerate(figures.items()):
            at = [i + (n - (len(figures) - 1) / 2) * width for i, shape in enumerate(order) if shape in by_shape]
            axes.bar(at, [by_shape[s][name] for s in order if s in by_shape], width, label=provider)
        axes.set_xticks(range(len(order)), order)
        axes.set_xlabel("requests x tokens of context")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(title="attention of one layer", ylabel="microseconds", yscale="log")
    one = next(iter(next(iter(figures.values())).values()))
    panels[1].axhline(one["gb_per_s"] / one["copy_share"], color="k", linestyle=":", label="device copy")
    panels[1].set(title="bytes of the cache read per second", ylabel="GB/s")
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"decode, 32/8 heads of 128, {gpu}")
    figure.savefig(target, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="rows of bench_decode.py")
    parser.add_argument("png", type=Path, help="the picture, written")
    args = parser.parse_args()
    draw(*read(args.csv), args.png)


if __name__ == "__main__":
    main()
