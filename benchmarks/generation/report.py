# SPDX-License-Identifier: Apache-2.0
"""A table with a column per cache."""

from __future__ import annotations

from typing import Any

COLUMNS = (
    *("device", "torch", "sglang", "model", "dtype", "seed", "cache", "task", "mode", "prompts", "prompt_tokens"),
    *("cached_tokens", "quantity", "value", "of", "unit"),
)


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print what each cache came to: rows as `COLUMNS` names them, a line per task, mode and quantity."""
    from rich.console import Console
    from rich.table import Table

    caches = list(dict.fromkeys(row["cache"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = (row["task"], row["mode"], f"{row['quantity']}, {row['unit']}")
        lines.setdefault(key, {})[row["cache"]] = row
    table = Table(title=title, title_justify="left")
    for column in ("task", "mode", "what, unit", "prompt tokens"):
        table.add_column(column, no_wrap=True)
    for cache in caches:
        table.add_column(cache, justify="right", no_wrap=True)
    for key, found in lines.items():
        first = next(iter(found.values()))
        tokens = f"{first['prompt_tokens']:,} ({first['cached_tokens']:,} cached)"
        cells = (f"{row['value']:g} of {row['of']:g}" if (row := found.get(cache)) else "" for cache in caches)
        table.add_row(*key, tokens, *cells)
    Console(width=200).print(table)
