# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: sglang_kvarn -> kvarn_kernels -> torch, triton; only compat reaches SGLang."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import kvarn_kernels
import pytest
import sglang_kvarn

PLUGIN = Path(sglang_kvarn.__file__).parent
KERNELS = Path(kvarn_kernels.__file__).parent
SOURCES = sorted([*PLUGIN.rglob("*.py"), *KERNELS.rglob("*.py")])


def imported_roots(source: str) -> set[str]:
    """Return the top-level packages that a source text imports anywhere."""
    nodes = list(ast.walk(ast.parse(source)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: f"{p.parent.name}/{p.name}")
def test_sources_import_one_way(path):
    roots = imported_roots(path.read_text())
    assert "sglang" not in roots
    if KERNELS in path.parents:
        assert "sglang_kvarn" not in roots
    if path.parent == PLUGIN and path.name != "compat.py":
        # a dotted path handed to a resolver is an import too
        assert "importlib.import_module" not in path.read_text()


def test_import_of_the_plugin_is_light():
    heavy = ("torch", "triton", "sglang")
    code = f"import sys, sglang_kvarn; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
