# SPDX-License-Identifier: Apache-2.0
"""``python -m sglang_kvarn`` says ok, or what is wrong."""

from __future__ import annotations

import json

import pytest
from kvarn_kernels.config import preset_names
from sglang_kvarn import __main__ as command
from sglang_kvarn import compat, plugin


def run(capsys, *options: str) -> tuple[int, str]:
    return command.main([*options]), capsys.readouterr().out


def test_main_ends_with_ok(capsys):
    code, out = run(capsys)
    assert code == 0 and out.splitlines()[-1] == "ok"
    assert all(name in out for name in preset_names())
    assert "kernels        encode, decode and extends by torch\n" in out
    # one line per function: some have several hooks
    assert out.count("hook ok") == len({hook.path for hook in plugin.HOOKS})


def test_main_prints_one_json_object(capsys):
    code, out = run(capsys, "--json")
    facts = json.loads(out)
    assert code == 0 and facts["problems"] == []
    assert facts["bytes_per_token_and_head"]["kvarn"] == {"64": 59, "128": 112, "256": 218}
    assert facts["versions"]["sglang"] == compat.version()


@pytest.mark.parametrize(("version", "word"), [("0.6.0", "found 0.6.0"), (None, "found none")])
def test_main_names_the_problem(monkeypatch, capsys, version, word):
    monkeypatch.setattr(compat, "version", lambda: version)
    code, out = run(capsys)
    assert code == 1
    assert out.splitlines()[-1].startswith("problem: ") and word in out.splitlines()[-1]
