# SPDX-License-Identifier: Apache-2.0
"""Every script speaks one vocabulary of flags, and its help is sentences with defaults."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "benchmarks").rglob("*.py")
    if re.search(r"^if __name__ == ", path.read_text(), re.MULTILINE)
)
# flag -> flags that would say the same
SYNONYMS = {
    "--output": {"--csv", "--out"},
    "--presets": {"--kvarn"},
    "--repeats": {"--rounds", "--replays"},
    "--timeout": {"--limit", "--seconds"},
    "--max-running-requests": {"--max-requests", "--rows"},
    "--mem-fraction-static": {"--mem-fraction"},
    "--chunked-prefill-size": {"--chunk"},
    "--max-total-tokens": {"--pool"},
}


class Parsed(Exception):
    """Carries the parser of a script."""


@pytest.fixture(params=SCRIPTS)
def parser(request, monkeypatch) -> argparse.ArgumentParser:
    """Return the parser of a script."""

    def parse_args(self, arguments=None):
        raise Parsed(self)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    module = importlib.import_module(request.param)
    with pytest.raises(Parsed) as found:
        (module.parse if hasattr(module, "parse") else module.main)([])
    return found.value.args[0]


def options(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [a for a in parser._actions if a.help != argparse.SUPPRESS and not isinstance(a, argparse._HelpAction)]


def test_every_flag_is_explained_by_a_sentence_with_its_default(parser):
    shown = " ".join(parser.format_help().split())
    for action in options(parser):
        assert action.help and action.help[0].isupper() and action.help.rstrip().endswith("."), action
        if not action.option_strings:
            continue
        if action.default in (None, ""):
            assert re.search("[Ww]ithout it", action.help), action
        elif action.nargs != 0 and not isinstance(action.default, (list, tuple)):
            assert f"Default: {action.default}." in shown, action


def test_no_flag_has_two_names(parser):
    flags = {flag for action in options(parser) for flag in action.option_strings}
    assert not flags & set().union(*SYNONYMS.values())


def test_the_docstring_says_how_to_run_the_script_from_the_root(parser):
    commands = re.findall(r"^    python (.*)", parser.description, re.MULTILINE)
    assert commands and all(command.startswith("-m benchmarks.") for command in commands)
    modules = [command.split()[1] for command in commands]
    assert set(modules) <= set(SCRIPTS)


def test_documented_commands_are_understood():
    texts = [(ROOT / "benchmarks" / "README.md").read_text()]
    texts += [importlib.import_module(script).__doc__ for script in SCRIPTS]
    joined = re.sub(r"\\\n *", " ", "\n".join(texts))
    commands = re.findall(r"python -m (benchmarks[\w.]+)([^\n`#]*)", joined)
    assert len(commands) > 20
    for name, flags in commands:
        assert name in SCRIPTS
        module = importlib.import_module(name)
        if hasattr(module, "parse") and not {"...", "--help"} & set(flags.split()):
            module.parse(shlex.split(flags))
