# SPDX-License-Identifier: Apache-2.0
"""An SGLang plugin of the tests' own, in the processes of the engines that a test starts."""

from __future__ import annotations

from pathlib import Path

import pytest


def add_to_engines(patch: pytest.MonkeyPatch, folder: Path, function: str) -> None:
    """Let every process of an engine call a function when SGLang loads its plugins.

    An engine hands its processes the search path, on which this puts a folder that looks like an installed package.

    Args:
        function: ``module:name``, the module on the search path.
    """
    make(folder, function)
    patch.syspath_prepend(folder)


def make(folder: Path, function: str) -> None:
    """Let a folder look like an installed package whose plugin calls a function, as above."""
    module = function.partition(":")[0]
    info = folder / f"{module}-0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[sglang.srt.plugins]\n{module} = {function}\n")
