# SPDX-License-Identifier: Apache-2.0
"""All benchmarks write one kind of row, and say where it comes from."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from benchmarks.common import provenance, rows
from benchmarks.common.rows import Figure

ROOT = Path(__file__).resolve().parents[2]
# metrics of rows that two columns of the table of commands show
PER_TOKEN = {"time_per_token", "tpot_p50", "accepted_per_step"}
FIRST = {"time_to_first_token", "time_to_first_token_reloaded", "ttft_p50"}
# units of the table, in units of rows
UNITS = {"ms": {"ms": 1, "s": 1e3}, "s": {"ms": 1e-3, "s": 1}, "drafts": {"drafts": 1}}


def test_rows_are_appended_under_their_own_columns_only(tmp_path):
    path = tmp_path / "figures.csv"
    rows.Rows(None, "decode").append("kvarn", {}, [Figure("time", 1)])
    for value in (1, 2):
        rows.Rows(path, "decode").append("kvarn", {"batch": 64}, [Figure("time", value, "us")])
    assert path.read_text().splitlines()[0] == ",".join(rows.COLUMNS)
    assert [row["value"] for row in rows.read(path, "decode")] == ["1", "2"]
    path.write_text("gpu,value\nH100,1\n")
    with pytest.raises(SystemExit, match=r"expected .*figures.csv to have the columns .*metric.*, got gpu,value"):
        rows.Rows(path, "decode")
    assert path.read_text() == "gpu,value\nH100,1\n"


def test_the_commit_of_a_row_is_that_of_the_checkout():
    name = provenance.commit()
    assert name == "" or len(name.rstrip("+")) >= 7


def test_a_row_says_device_versions_and_command():
    found = provenance.provenance()
    assert tuple(found) == provenance.FIELDS and all(found[name] for name in ("device", "torch", "command"))
    assert found["command"].startswith("python ")


def test_settings_are_read_as_they_were_written():
    settings = {"task": "needle, 512 tokens", "flags": "--x=y", "batch": 64, "missing": None}
    text = rows.format_settings(settings)
    assert rows.parse_settings(text) == {"task": "needle, 512 tokens", "flags": "--x=y", "batch": "64"}
    with pytest.raises(ValueError, match="expected a setting without"):
        rows.format_settings({"task": "a; b"})


def test_a_figure_of_measurements_is_their_median_with_its_spread():
    figure = Figure.of("time", [5.0, 1.0, 3.0, 2.0, 4.0], "us")
    assert figure == ("time", 3.0, "us", 2.0, 5.0)


def commands() -> list[list[str]]:
    """Return the cells of the lines of the table of commands."""
    section = (ROOT / "benchmarks" / "README.md").read_text().split("## Commands\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def rows_of(cells: list[str]) -> dict[str, list[dict[str, str]]]:
    """Return the rows of the device, the SGLang and the flags of a line, by the cache that they are of."""
    device, version = cells[1].replace(" only", "").split(", ")
    wanted = dict(re.findall(r"--(mem-fraction-static|max-running-requests|hicache-size) (\S+?)[ `]", cells[2]))
    wanted = {name.replace("-", "_").removesuffix("_size"): value for name, value in wanted.items()}
    with (ROOT / "benchmarks" / re.search(r"\((.*?)\)", cells[6])[1]).open() as file:
        found = [row for row in csv.DictReader(file) if device in row["device"] and row["sglang"] == version]
    found = [row for row in found if wanted.items() <= rows.parse_settings(row["settings"]).items()]
    # without those of servers with more flags
    found = [row for row in found if "kvarn_args" not in row["settings"]]
    return {cache: [row for row in found if row["provider"] == cache] for cache in ("kvarn", "bf16")}


def has_figure(found: list[dict[str, str]], metrics: set[str], figure: str, unit: str) -> bool:
    digits = len(figure.partition(".")[2])
    shown = [row for row in found if row["metric"] in metrics and row["unit"] in UNITS[unit]]
    return any(f"{float(row['value']) * UNITS[unit][row['unit']]:.{digits}f}" == figure for row in shown)


def figures(cell: str) -> list[tuple[str, str, str]]:
    """Return (of kvarn, of bf16 or "", unit) of each figure."""
    return re.findall(r"([\d.]+)(?: / ([\d.]+))? (ms|s|drafts)\b", cell)


@pytest.mark.parametrize("cells", commands(), ids=lambda cells: f"{cells[1]} {cells[6]}")
def test_the_table_of_commands_shows_figures_of_its_rows(cells):
    found = rows_of(cells)
    if pool := re.match(r"[\d.]+", cells[3]):
        ((ours,), (theirs,)) = (
            {row["value"] for row in found[cache] if row["metric"] == "pool"} for cache in ("kvarn", "bf16")
        )
        assert f"{float(ours) / float(theirs):.2f}" == pool[0]
    shown = [(metrics, each) for metrics, cell in ((PER_TOKEN, cells[4]), (FIRST, cells[5])) for each in figures(cell)]
    assert shown or pool
    for metrics, (ours, theirs, unit) in shown:
        assert has_figure(found["kvarn"], metrics, ours, unit), f"no row says {ours} {unit}"
        assert not theirs or has_figure(found["bf16"], metrics, theirs, unit), f"no row says {theirs} {unit}"
