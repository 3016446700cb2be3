# SPDX-License-Identifier: Apache-2.0
"""The README of the patches lists every hook, why it is there and what replaces it."""

from __future__ import annotations

import sys
from pathlib import Path

from sglang_kvarn import compat, hooks

sys.path.insert(0, str(Path(__file__).parents[2] / "patches"))

import hook_table


def test_the_readme_has_the_table_of_the_hooks():
    assert hook_table.README.read_text() == hook_table.text(), "run `python patches/hook_table.py`"


def test_the_table_names_every_hook_once():
    shown = hook_table.table()
    for hook in hooks.HOOKS:
        target = compat.RESOLUTION_TARGETS[0] if hook.target == compat.resolution_target() else hook.target
        assert shown.count(f"`{target}`") == sum(other.target == hook.target for other in hooks.HOOKS)
        assert f"| {hook.why} |" in shown and (hook.replaced_by or "nothing, it stays") in shown
