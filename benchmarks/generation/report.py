# SPDX-License-Identifier: Apache-2.0
"""The records of all caches as rows and as a table with a column per cache."""

from __future__ import annotations

from typing import Any

from benchmarks.common.rows import Figure

SETTINGS = ("task", "mode", "prompts", "prompt_tokens", "cached_tokens", "of")


def row(record: dict[str, Any]) -> tuple[dict[str, Any], Figure]:
    """Return settings and figure of a record of `scoring.summarise`."""
    figure = Figure(record["quantity"].replace(" ", "_"), record["value"], record["unit"])
    return {name: record[name] for name in SETTINGS}, figure


def totals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row per cache and mode with the right answers of all tasks; prompt tokens are means over prompts."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        if row["quantity"] == "correct":
            groups.setdefault((row["cache"], row["mode"]), []).append(row)
    made = []
    for group in groups.values():
        prompts = sum(row["prompts"] for row in group)
        means = {
            key: round(sum(row[key] * row["prompts"] for row in group) / prompts)
            for key in ("prompt_tokens", "cached_tokens")
        }
        sums = {key: sum(row[key] for row in group) for key in ("value", "of")}
        made.append(group[0] | {"task": "all of these", "prompts": prompts} | means | sums)
    return made


def show(rows: list[dict[str, Any]], title: str) -> None:
    """Print records, a line per task, mode and quantity, and the totals of each mode."""
    from rich.console import Console
    from rich.table import Table

    caches = list(dict.fromkeys(row["cache"] for row in rows))
    lines: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for row in [*rows, *totals(rows)]:
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
