# SPDX-License-Identifier: Apache-2.0
"""All benchmarks write one kind of row, and say where it comes from."""

from __future__ import annotations

import pytest

from benchmarks.common import provenance, rows
from benchmarks.common.rows import Figure


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
