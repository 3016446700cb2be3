# SPDX-License-Identifier: Apache-2.0
"""What the repository and the distribution promise: folders, entry points, contents of the wheel."""

from __future__ import annotations

import importlib
import importlib.util
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from sglang_kvarn import compat

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
KERNELS = ROOT / "kernels" / "kvarn_kernels"
PLUGIN = ROOT / "python" / "sglang_kvarn"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def tracked_files() -> list[str]:
    """Return the files that git tracks, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "-c", "safe.directory=*", "ls-files"]
    return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def test_repository_top_level_is_the_agreed_list():
    expected = {
        *("python", "kernels", "tests", "benchmarks", "patches", "pyproject.toml", "README.md", "LICENSE"),
        *(".ci", ".gitignore", ".pre-commit-config.yaml"),
    }
    assert {name.split("/")[0] for name in tracked_files()} == expected


def test_repository_has_no_package_that_shadows_one_of_sglang():
    # SGLang imports a package called `kernels`, and its own tests are called `sglang`
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "python" / "__init__.py").exists()
    assert not (ROOT / "tests" / "sglang").exists()


def test_every_source_file_names_its_licence():
    sources = [n for n in tracked_files() if n.endswith(".py") and (ROOT / n).read_text()]
    without = [
        n for n in sources if not (ROOT / n).read_text().startswith("# SPDX-License-Identifier: Apache-2.0\n")
    ]
    assert sources and not without


def test_no_file_changes_where_python_looks_for_modules():
    # not in one piece, or this file would be found
    change = "sys.path" + ".insert"
    sources = [n for n in tracked_files() if n.endswith(".py")]
    assert sources and not [n for n in sources if change in (ROOT / n).read_text()]


@pytest.mark.parametrize("name, folder", [("kvarn_kernels", KERNELS), ("sglang_kvarn", PLUGIN)])
def test_tests_run_the_packages_of_this_checkout(name, folder):
    specification = importlib.util.find_spec(name)
    assert specification is not None, 'install the checkout: pip install -e ".[test]"'
    assert Path(specification.origin or "").parent == folder


@pytest.mark.parametrize(
    "group, name", [("sglang.srt.plugins", "kvarn"), ("sglang.srt.platforms", "kvarn_cpu")]
)
def test_entry_point_names_a_function_of_the_plugin(group, name):
    module, function = PROJECT["entry-points"][group][name].split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_base_dependencies_are_torch_triton_and_numpy_with_lower_bounds_only():
    requirements = [requirement.split(";")[0].strip() for requirement in PROJECT["dependencies"]]
    assert {re.split("[<>=!~ ]", requirement)[0] for requirement in requirements} == {"numpy", "torch", "triton"}
    assert all(re.fullmatch(r"\w+>=[\d.]+", requirement) for requirement in requirements)


def test_extras_of_the_readme_exist():
    assert {"sglang", "demo", "test"} <= set(PROJECT["optional-dependencies"])


def test_extra_sglang_takes_the_versions_that_compat_takes_and_no_other():
    (requirement,) = PROJECT["optional-dependencies"]["sglang"]
    versions = [f"0.5.{minor}" for minor in range(30)]
    accepted = tuple(SpecifierSet(requirement.removeprefix("sglang")).filter(versions))
    assert accepted == tuple(sorted(compat.TESTED_VERSIONS + compat.BOOTED_VERSIONS))


def test_wheel_holds_both_packages_and_nothing_else(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    if importlib.util.find_spec("hatchling"):
        command.append("--no-build-isolation")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        info = f"sglang_kvarn-{PROJECT['version']}.dist-info"
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    packages = [
        (root.parent, file) for root in (KERNELS, PLUGIN) for file in root.rglob("*") if file.is_file()
    ]
    files = {str(file.relative_to(parent)) for parent, file in packages if file.suffix != ".pyc"}
    assert files <= names
    assert {name.split("/")[0] for name in names} == {"kvarn_kernels", "sglang_kvarn", info}
    assert f"{info}/licenses/LICENSE" in names
    assert "[sglang.srt.plugins]\nkvarn = sglang_kvarn:register" in entry_points


def test_ci_runs_the_commands_of_the_readme():
    script, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    assert 'pip install -e ".[test]" && pytest' in readme
    assert '-e ".[test]"' in script and "step pytest" in script


def test_ci_and_readme_name_the_tested_versions():
    script, readme = (ROOT / ".ci" / "run").read_text(), (ROOT / "README.md").read_text()
    for version in compat.TESTED_VERSIONS:
        assert version in script and f"| {version} |" in readme
    for version in compat.BOOTED_VERSIONS:
        assert version not in script and f"| {version} |" in readme
