# SPDX-License-Identifier: Apache-2.0
"""Pieces of texts: of those that `sources` names, and of files that the user names."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import sources

DEFAULT = tuple(sources.TUNED_ON)


@dataclass(frozen=True)
class Text:
    """A piece of a file: its tokens and where they come from.

    Attributes:
        name: kind or path. source: origin, first character and hash, so that the piece can be found again.
        tokens: token ids, exactly as many as asked for.
    """

    name: str
    source: str
    tokens: list[int]


def _content(name: str) -> tuple[str, str]:
    """Return (where a text comes from, the text)."""
    if name in sources.ALL:
        return sources.ALL[name].load()
    path = Path(name) if Path(name).exists() else sources.STDLIB / name
    return str(path), path.read_text(errors="replace")


def load(name: str, length: int, seed: int, tokenizer: Any) -> Text:
    """Return a piece of a text, beginning at a line chosen by the seed.

    Args:
        name: one of `sources.ALL`, or a path, which may begin in the folder of the standard library.
        length: tokens wanted, with those that the model was trained to begin a text with.

    Raises:
        ValueError: the text is shorter than that.
    """
    origin, content = _content(name)
    # a token of these texts has fewer than 12 characters on average, so these always hold enough tokens
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
    return Text(name, f"{origin} from character {start} (sha256 {digest})", tokens)
