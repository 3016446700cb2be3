# SPDX-License-Identifier: Apache-2.0
"""Ways to damage a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


# gone, with another bit amid its content, without its content, without its last byte, and without anything
DAMAGES: dict[str, Callable[[Path], object]] = {
    "gone": Path.unlink,
    "flipped": _flip,
    "zeroed": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "emptied": lambda file: file.write_bytes(b""),
}
