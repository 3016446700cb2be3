# SPDX-License-Identifier: Apache-2.0
"""Texts that every machine with Python has, of several kinds, and files that the user names."""

from __future__ import annotations

import hashlib
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STDLIB = Path(sysconfig.get_paths()["stdlib"])
# kind -> file of the standard library; "manual" is the language reference behind help()
KINDS = {
    "manual": "pydoc_data/topics.py",
    "code": "argparse.py",
    "changelog": "idlelib/NEWS.txt",
    "page": "idlelib/help.html",
    "table": "html/entities.py",
}
DEFAULT = ("manual", "code", "changelog")


@dataclass(frozen=True)
class Text:
    """A piece of a file: its tokens and where they come from.

    Attributes:
        name: kind or path. source: file, first character and hash, so that the piece can be found again.
        tokens: token ids, exactly as many as asked for.
    """

    name: str
    source: str
    tokens: list[int]


def _content(name: str) -> tuple[Path, str]:
    if name not in KINDS:
        path = Path(name) if Path(name).exists() else STDLIB / name
        return path, path.read_text(errors="replace")
    path = STDLIB / KINDS[name]
    if name == "manual":
        from pydoc_data import topics

        return path, "\n\n".join(topics.topics[topic] for topic in sorted(topics.topics))
    return path, path.read_text(errors="replace")


def load(name: str, length: int, seed: int, tokenizer: Any) -> Text:
    """Return a piece of a text, beginning at a line chosen by the seed.

    Args:
        name: one of `KINDS`, or a path, which may begin in the folder of the standard library.
        length: tokens wanted, with those that the model was trained to begin a text with.

    Raises:
        ValueError: the text is shorter than that.
    """
    path, content = _content(name)
    # a token of these texts has two characters or more, so this many always hold enough tokens
    latest = max(0, len(content) - 12 * length)
    offset = random.Random(f"{seed} {Path(name).name}").randrange(latest + 1)
    start = content.rfind("\n", 0, offset) + 1
    # Gemma 3 stutters without the one that begins every text
    first = tokenizer("").input_ids
    tokens = tokenizer(content[start : start + 16 * length], add_special_tokens=False).input_ids
    tokens = [*first, *tokens][:length]
    if len(tokens) < length:
        raise ValueError(f"expected {name} to hold {length} tokens, got {len(tokens)}: lower --context")
    digest = hashlib.sha256(content.encode()).hexdigest()[:12]
    return Text(name, f"{path} from character {start} (sha256 {digest})", tokens)
