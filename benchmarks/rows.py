# SPDX-License-Identifier: Apache-2.0
"""Rows of figures that a benchmark adds to those of earlier runs."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any


def append(path: Path, columns: list[str], rows: list[dict[str, Any]]) -> None:
    """Append rows to a CSV file; a new file gets its header first."""
    is_new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
