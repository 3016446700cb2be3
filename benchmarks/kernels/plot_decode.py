# SPDX-License-Identifier: Apache-2.0
"""Draw the rows of `bench_decode --output`: microseconds and bytes per second of each provider and shape.

    python -m benchmarks.kernels.plot_decode benchmarks/results/decode.csv benchmarks/results/decode.png

Rows of one GPU with 32/8 heads of 128, measured beside FlashInfer in bf16: the latest of each provider and
shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import plots, rows
from benchmarks.kernels.timing import SPEEDUP_OVER

HEADS = {"num_qo_heads": "32", "num_kv_heads": "8", "head_dim": "128"}


def read(path: Path) -> tuple[str, dict[str, dict[str, dict[str, float]]]]:
    """Return (GPU of the last row, provider -> shape -> metric -> value) of its rows.

    Raises:
        ValueError: no rows.
    """
    # the figures of one provider, shape and run follow each other, the speedup over a baseline last
    found: list[tuple[str, str, str, dict[str, float]]] = []
    figures: dict[str, float] = {}
    for row in rows.read(path, "decode"):
        if row["metric"] == "time":
            figures = {}
        figures[row["metric"]] = float(row["value"])
        settings = row["settings"]
        if row["metric"].startswith(SPEEDUP_OVER) and "bandwidth" in figures and HEADS.items() <= settings.items():
            shape = f"{settings['batch']} x {int(settings['context']):,}"
            found.append((row["device"], row["provider"], shape, figures))
    if not found:
        raise ValueError(f"expected rows of bench_decode --output with 32/8 heads of 128, got none in {path}")
    gpu = found[-1][0]
    by_provider: dict[str, dict[str, dict[str, float]]] = {}
    for device, provider, shape, figures in found:
        if device == gpu:
            by_provider.setdefault(provider, {})[shape] = figures
    return gpu, by_provider


def draw(gpu: str, figures: dict[str, dict[str, dict[str, float]]], target: Path) -> None:
    """Draw a group of bars for each shape, the longest time first."""
    pyplot = plots.pyplot()
    shapes = {shape for by_shape in figures.values() for shape in by_shape}
    times = {shape: max(x[shape]["time"] for x in figures.values() if shape in x) for shape in shapes}
    order = sorted(shapes, key=lambda shape: -times[shape])
    figure, panels = pyplot.subplots(1, 2, figsize=(13, 5), layout="constrained")
    width = 0.85 / len(figures)
    for axes, name in zip(panels, ("time", "bandwidth"), strict=True):
        for n, (provider, by_shape) in enumerate(figures.items()):
            at = [i + (n - (len(figures) - 1) / 2) * width for i, shape in enumerate(order) if shape in by_shape]
            axes.bar(at, [by_shape[s][name] for s in order if s in by_shape], width, label=provider)
        axes.set_xticks(range(len(order)), order)
        axes.set_xlabel("requests x tokens of context")
        axes.grid(axis="y", alpha=0.3)
    panels[0].set(title="attention of one layer", ylabel="microseconds", yscale="log")
    one = next(iter(next(iter(figures.values())).values()))
    panels[1].axhline(one["bandwidth"] / one["copy_share"], color="k", linestyle=":", label="device copy")
    panels[1].set(title="bytes of the cache read per second", ylabel="GB/s")
    handles = panels[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=5, fontsize=8)
    figure.suptitle(f"decode, 32/8 heads of 128, {gpu}")
    figure.savefig(target, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    args = plots.parse(__doc__, "bench_decode", arguments)
    draw(*read(args.csv), args.png)


if __name__ == "__main__":
    main()
