# SPDX-License-Identifier: Apache-2.0
"""What a figure must name to be comparable with another one: device, versions, commit, command."""

from __future__ import annotations

import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path

FIELDS = ("device", "torch", "triton", "sglang", "flashinfer", "commit", "command")
# field -> distribution on PyPI; torch names its CUDA version in the module only
_DISTRIBUTIONS = {"triton": "triton", "sglang": "sglang", "flashinfer": "flashinfer-python"}


def commit() -> str:
    """Return the short commit of this checkout, with a plus if it was changed; empty outside of git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--exclude=*", "--dirty=+"]
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def provenance() -> dict[str, str]:
    """Return the `FIELDS` of this process; a package that is not installed has an empty version."""
    import torch

    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        **{field: _version(distribution) for field, distribution in _DISTRIBUTIONS.items()},
        "commit": commit(),
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
    }
