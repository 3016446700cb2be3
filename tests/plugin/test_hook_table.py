# SPDX-License-Identifier: Apache-2.0
"""The README of the plugin lists every hook, where it runs, why it is there and what would replace it."""

from __future__ import annotations

from sglang_kvarn import compat, plugin
from sglang_kvarn.commands import hook_table


def test_the_readme_has_the_table_of_the_hooks():
    written = hook_table.README.read_text() == hook_table.text()
    assert written, "run `python -m sglang_kvarn.commands.hook_table`"


def test_the_table_names_every_hook_once():
    shown = hook_table.table()
    for hook in plugin.HOOKS:
        target = compat.RESOLUTION_TARGETS[0] if hook.target == compat.resolution_target() else hook.target
        assert shown.count(f"`{target}`") == sum(other.target == hook.target for other in plugin.HOOKS)
        assert f"| {hook.why} |" in shown and (hook.replaced_by or "it stays") in shown
