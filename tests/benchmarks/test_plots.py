# SPDX-License-Identifier: Apache-2.0
"""The pictures are drawn from the rows in benchmarks/results."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.common import rows
from benchmarks.kernels import plot_decode, plot_prefill

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_the_decode_plot_draws_the_published_rows(tmp_path):
    gpu, figures = plot_decode.read(RESULTS / "decode.csv")
    assert "NVIDIA" in gpu and figures["kvarn"].keys() == figures["flashinfer_bf16"].keys()
    # rows of other heads stand in the same file
    assert figures["kvarn"]["64 x 16,320"]["time"] > 350
    plot_decode.draw(gpu, figures, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    (tmp_path / "empty.csv").write_text(",".join(rows.COLUMNS))
    with pytest.raises(ValueError, match="expected rows"):
        plot_decode.read(tmp_path / "empty.csv")


def test_the_prefill_plot_draws_the_published_rows(tmp_path):
    title, times = plot_prefill.read(RESULTS / "engine_short_8b.csv")
    assert "NVIDIA H" in title and list(times) == ["bf16", "kvarn"] and "2048+32768" in times["kvarn"]
    plot_prefill.draw(title, times, tmp_path / "prefill.png")
    assert (tmp_path / "prefill.png").stat().st_size > 10_000


def test_the_prefill_plot_refuses_a_cache_without_a_baseline(tmp_path):
    settings = {"model": "8b", "new": 2048, "cached": 0}
    figure = rows.Figure("time_to_first_token", 60.5, "ms")
    rows.Rows(tmp_path / "one.csv", "engine").append("kvarn", settings, [figure])
    with pytest.raises(ValueError, match="expected the same shapes of bf16"):
        plot_prefill.read(tmp_path / "one.csv")
