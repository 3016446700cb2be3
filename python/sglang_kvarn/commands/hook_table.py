# SPDX-License-Identifier: Apache-2.0
"""Write the table of hooks in a checkout's ``python/README.md``: ``python -m sglang_kvarn.commands.hook_table``."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from sglang_kvarn import compat, plugin
from sglang_kvarn.hook import Hook

README = Path(__file__).parents[2] / "README.md"
HEADER = "| where | hook below `sglang.srt` | without it | with the registry of `patches` |\n|---|---|---|---|\n"


def table() -> str:
    """Return a row for each run of hooks that have the same reason and replacement, with one target a line."""
    rows = []
    for (where, kind, why, replaced_by), group in groupby(
        plugin.ALL_HOOKS, lambda h: (h.where, h.kind, h.why, h.replaced_by)
    ):
        targets = "<br>".join(_shown(hook) for hook in group)
        rows.append(f"| {where} | {targets} ({kind}) | {why} | {replaced_by or 'it stays'} |\n")
    return HEADER + "".join(rows)


def text() -> str:
    """Return the README with the table of the installed package."""
    before, rows = README.read_text().split(HEADER)
    # the table ends at an empty line
    return before + table() + rows[rows.index("\n\n") + 1 :]


def _shown(hook: Hook) -> str:
    if hook.target not in compat.RESOLUTION_TARGETS:
        return f"`{hook.target}`" + (f", from {hook.since} on" if hook.since != "0" else "")
    earlier, later = compat.RESOLUTION_TARGETS
    return f"`{earlier}`, from 0.5.20 on `.{later.rpartition('.')[2]}`"


if __name__ == "__main__":
    README.write_text(text())
