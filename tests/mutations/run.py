# SPDX-License-Identifier: Apache-2.0
"""Apply the mutations to a copy of the repository, one at a time, and show that the tests catch each.

    python -m tests.mutations.run [name ...]     # from the root; all of them take about an hour on 2 cores

Exit status 1 if a bug survives; 2 if one no longer applies to the code, or a test fails without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from . import MUTATIONS
from .mutation import Mutation

ROOT = Path(__file__).resolve().parents[2]
# of the tests of one bug; without any bug all of them run
LIMIT_SECONDS, LIMIT_SECONDS_OF_ALL = 600, 3600


def apply(mutation: Mutation, folder: Path) -> None:
    """Write the mutated file into the copy.

    Raises:
        ValueError: the old text is not there exactly once.
    """
    path = folder / mutation.file
    text = (ROOT / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"expected {mutation.old!r} once in {mutation.file}, found it {text.count(mutation.old)} times: "
            f"rewrite the mutation {mutation.name!r}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def run_tests(folder: Path, tests: tuple[str, ...], limit: int = LIMIT_SECONDS) -> tuple[int | None, str]:
    """Run tests on the copy; return pytest's exit status (None: out of time) and the first failing test."""
    environment = os.environ | {
        "PYTHONPATH": f"{folder / 'kernels'}:{folder / 'python'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "KVARN_FUZZ_SEED": "1",
        "KVARN_FUZZ_STEPS": "3000",
        "KVARN_FUZZ_SHRINK": "0",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return None, f"no result in {limit} s"
    # logs have lines that begin so too
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")) and "::" in line]
    return done.returncode, failed[0].split(" ")[1].split("::")[-1] if failed else done.stdout[-200:].strip()


def main(names: list[str]) -> int:
    """Run the chosen mutations (all by default) and print one line for each."""
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survived, stale = [], []
    with tempfile.TemporaryDirectory(prefix="kvarn-mutations-") as temporary:
        folder = Path(temporary)
        for name in ("kernels", "python", "tests", "benchmarks", "pyproject.toml"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "results")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(
                source, folder / name
            )
        tests = tuple(sorted({t for m in chosen for t in m.tests}))
        status, detail = run_tests(folder, tests, LIMIT_SECONDS_OF_ALL)
        if status != 0:
            print(f"expected the tests to pass without a bug, got {detail}: mend them first")
            return 2
        for mutation in chosen:
            started = time.monotonic()
            try:
                apply(mutation, folder)
            except ValueError as error:
                stale.append(mutation)
                print(f"STALE     {mutation.name}: {error}", flush=True)
                continue
            status, detail = run_tests(folder, mutation.tests)
            shutil.copy(ROOT / mutation.file, folder / mutation.file)
            # 1 is "tests failed"; anything else would be no evidence
            caught = status == 1
            survived += [] if caught else [mutation]
            seconds = time.monotonic() - started
            print(
                f"{'caught' if caught else 'SURVIVED':9} {mutation.name} | {detail} | {seconds:.0f} s",
                flush=True,
            )
    caught_count = len(chosen) - len(survived) - len(stale)
    print(f"{caught_count} of {len(chosen)} caught, {len(survived)} survived, {len(stale)} stale")
    return 2 if stale else int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
