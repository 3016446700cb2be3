# SPDX-License-Identifier: Apache-2.0
"""Imports go one way: sglang_kvarn -> kvarn_kernels -> torch, triton, and down the rooms of the kernels; only compat
reaches SGLang."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "kvarn_kernels"
PLUGIN = ROOT / "python" / "sglang_kvarn"
# rooms of the kernels from the ground up, each with what stands on the same floor
FLOORS = (
    {"device"},
    {"record"},
    {"config", "shape", "memory", "batch", "balance"},
    {"write", "read", "dense", "reference", "transfer"},
    {"extend_choice", "warm_up", "torch_form"},
    {"attention"},
)
# inside a function, for hosts where SGLang brought it; and for arithmetic on the host, slow in torch
OPTIONAL = {"dense/paged_calls.py": {"flashinfer", "sgl_kernel"}, "dense/segments.py": {"numpy"}}


def sources(package: Path) -> list[str]:
    """Return the files of a package, relative to it."""
    return sorted(str(path.relative_to(package)) for path in package.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, anywhere in it, by statement or by importlib."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"expected no relative import in {path}"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("import_module", "importlib.import_module"):
            (argument,) = node.args
            found.add(str(argument.value) if isinstance(argument, ast.Constant) else "dynamic")
    return found


def roots(path: Path) -> set[str]:
    """Return the top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def rooms(path: Path) -> set[str]:
    """Return the rooms of the kernels that a file imports from: a folder, or a file beside the folders."""
    return {name.split(".")[1] for name in imported(path) if name.startswith("kvarn_kernels.")}


def modules(path: Path) -> set[str]:
    """Return the files of the kernels that a file imports, relative to the package."""
    found = set()
    for name in imported(path):
        parts = name.split(".")[1:] if name.startswith("kvarn_kernels.") else []
        # the last part may be a name in the module
        candidates = ["/".join(parts[:n]) + ".py" for n in range(1, len(parts) + 1)]
        found.update(candidate for candidate in candidates if (KERNELS / candidate).is_file())
    return found


def room_of(source: str) -> str:
    return source.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("source", sources(KERNELS))
def test_kernels_import_torch_triton_and_in_one_place_each_the_optional_ones(source):
    third_party = roots(KERNELS / source) - set(sys.stdlib_module_names)
    assert third_party <= {"kvarn_kernels", "torch", "triton"} | OPTIONAL.get(source, set())


@pytest.mark.parametrize("source", sources(PLUGIN))
def test_plugin_reaches_sglang_only_in_compat(source):
    found = roots(PLUGIN / source)
    assert "sglang" not in found, "compat resolves dotted paths when they are asked for"
    # a dotted path handed to a resolver is an import too
    assert source == "compat.py" or not {"dynamic", "pkgutil"} & found


@pytest.mark.parametrize("source", [source for source in sources(KERNELS) if source != "__init__.py"])
def test_kernels_import_from_their_own_floor_and_below(source):
    own = next(n for n, floor in enumerate(FLOORS) if room_of(source) in floor)
    above = set().union(*FLOORS[own + 1 :])
    assert not rooms(KERNELS / source) & above


def test_kernels_have_no_import_circle():
    files = {source: modules(KERNELS / source) for source in sources(KERNELS)}
    folders: dict[str, set[str]] = {}
    for source in files:
        folders.setdefault(room_of(source), set()).update(rooms(KERNELS / source) - {room_of(source)})
    for graph in (files, folders):
        # raises CycleError, which names the circle
        TopologicalSorter(graph).prepare()


def test_oracle_rests_on_the_record_and_serves_the_torch_form_alone():
    for source in sources(KERNELS):
        imports = rooms(KERNELS / source)
        if room_of(source) == "reference":
            assert imports <= {"record", "config", "reference"}, source
        else:
            assert "reference" not in imports or source == "torch_form.py", source
    for source in sources(PLUGIN):
        assert "reference" not in rooms(PLUGIN / source), source


def test_import_of_the_plugin_is_light():
    heavy = ("torch", "triton", "sglang")
    code = f"import sys, sglang_kvarn; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_kernels_do_not_load_sglang():
    names = ["kvarn_kernels.attention", "kvarn_kernels.reference", "kvarn_kernels.torch_form"]
    code = f"import sys, {', '.join(names)}; print([m for m in sys.modules if m.startswith('sglang')])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_attention_loads_without_the_libraries_of_long_steps():
    code = "import sys; sys.modules |= {'flashinfer': None, 'sgl_kernel': None}; import kvarn_kernels.attention"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
