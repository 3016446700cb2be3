# SPDX-License-Identifier: Apache-2.0
"""Rows of figures that a benchmark adds to those of earlier runs."""

from __future__ import annotations

import csv
import subprocess
from pathlib import Path
from typing import Any


def commit() -> str:
    """Return the short commit of this checkout, with a plus if it was changed; empty outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def check_columns(path: Path | None, columns: list[str]) -> None:
    """Refuse a CSV file that has other columns; call it before anything is measured.

    Raises:
        SystemExit: names the columns.
    """
    if path is None or not path.exists():
        return
    with path.open(newline="") as file:
        found = next(csv.reader(file), columns)
    if found != columns:
        wanted, others = ",".join(columns), ",".join(found)
        raise SystemExit(f"expected {path} to have the columns {wanted}, got {others}: name another file")


def append(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file; a new or empty file gets its header first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerows(rows)
