# SPDX-License-Identifier: Apache-2.0
"""The rows of all benchmarks: one figure a row, in the same columns whatever was measured.

Example: the time of a decode layer is a row of the benchmark "decode" with the provider "kvarn", the settings
"batch=64; context=16320; num_qo_heads=32; ...", the metric "time", the median as value, the unit "us", p20 and p80.

A file may hold rows of several runs and benchmarks: runs append, and the latest row of a figure counts.
"""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common import provenance

COLUMNS = [*provenance.FIELDS, "benchmark", "provider", "settings", "metric", "value", "unit", "p20", "p80"]
_BETWEEN = "; "


class Figure(NamedTuple):
    """Hold one measured figure.

    Attributes:
        value: the median where there are p20 and p80, the 20th and 80th percentile.
        unit: empty for a number without one.
    """

    metric: str
    value: float | str
    unit: str = ""
    p20: float | str = ""
    p80: float | str = ""

    @classmethod
    def of(cls, metric: str, values: Iterable[float], unit: str) -> Figure:
        """Return the median of measurements with their spread."""
        ordered = sorted(values)
        p20, p80 = ordered[len(ordered) // 5], ordered[len(ordered) * 4 // 5]
        return cls(metric, statistics.median(ordered), unit, p20, p80)


def format_settings(settings: Mapping[str, Any]) -> str:
    """Return settings as "name=value; name=value", None left out.

    Raises:
        ValueError: a value holds the separator.
    """
    parts = [f"{name}={value}" for name, value in settings.items() if value is not None]
    for part in parts:
        if _BETWEEN in part:
            raise ValueError(f"expected a setting without {_BETWEEN!r}, got {part!r}: write it in another way")
    return _BETWEEN.join(parts)


def parse_settings(text: str) -> dict[str, str]:
    """Return what `format_settings` made, values as text."""
    pairs = (part.split("=", 1) for part in text.split(_BETWEEN) if part)
    return {name: value for name, value in pairs}


def check_columns(path: Path) -> None:
    """Refuse a file with other columns.

    Raises:
        ValueError: names the file.
    """
    with path.open(newline="") as file:
        found = next(csv.reader(file), COLUMNS)
    if found != COLUMNS:
        wanted, others = ",".join(COLUMNS), ",".join(found)
        raise ValueError(f"expected {path} to have the columns {wanted}, got {others}: name another file")


class Rows:
    """Append the figures of one run of a benchmark to a CSV file.

    Make it before anything is measured, so that a run does not end with rows that nobody takes.

    Args:
        path: the file; None: nothing is written.
        benchmark: what the rows are called.

    Raises:
        SystemExit: the file has other columns.
    """

    def __init__(self, path: Path | None, benchmark: str) -> None:
        self.path, self.benchmark = path, benchmark
        if path is not None and path.exists():
            try:
                check_columns(path)
            except ValueError as error:
                raise SystemExit(str(error)) from None
        self.provenance = provenance.provenance()

    def append(self, provider: str, settings: Mapping[str, Any], figures: Iterable[Figure]) -> None:
        """Append a row for each figure; a new or empty file gets its header first."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        first = {**self.provenance, "benchmark": self.benchmark, "provider": provider}
        first["settings"] = format_settings(settings)
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if file.tell() == 0:
                writer.writeheader()
            writer.writerows(first | figure._asdict() for figure in figures)


def read(path: Path, benchmark: str) -> list[dict[str, Any]]:
    """Return the rows of a benchmark in a file, oldest first, with their settings as a dict.

    Raises:
        ValueError: the file has other columns.
    """
    check_columns(path)
    with path.open(newline="") as file:
        found = [row for row in csv.DictReader(file) if row["benchmark"] == benchmark]
    return [row | {"settings": parse_settings(row["settings"])} for row in found]
