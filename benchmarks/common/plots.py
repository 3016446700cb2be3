# SPDX-License-Identifier: Apache-2.0
"""What all pictures share: matplotlib without a screen, and the command line of a script that draws rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import cli


def pyplot() -> Any:
    """Return matplotlib.pyplot, which writes files only."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def parse(description: str | None, source: str, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed command line of a script that draws the rows of another one."""
    parser = cli.parser(description)
    parser.add_argument("csv", type=Path, help=f"Rows of {source}.")
    parser.add_argument("png", type=Path, help="The picture, written.")
    return parser.parse_args(arguments)
