# SPDX-License-Identifier: Apache-2.0
"""SGLang with the plugin loaded, as every process of a server has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_table import LLAMA
from sglang_kvarn import compat, plugin
from sglang_kvarn.cpu import platform


@pytest.fixture(scope="session", autouse=True)
def plugins() -> None:
    """Load SGLang's plugins once in this process."""
    platform.prepare_environment()
    compat.load_plugins()
    plugin.register_rest()


@pytest.fixture(autouse=True)
def no_server(monkeypatch) -> None:
    """Hide the arguments that a test before has published in this process, as a server does; those of this one, too."""
    monkeypatch.setattr(compat.resolve("sglang.srt.runtime_context.get_context")(), "_server_args", None)


@pytest.fixture(scope="session")
def server_args():
    """Return a function that makes ServerArgs and resolves them, as a launch does before it spawns a process."""

    def make(**arguments):
        args = compat.resolve("sglang.srt.server_args.ServerArgs")(**arguments)
        if hasattr(args, "resolve_once"):
            args.resolve_once()
        return args

    return make


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    """Return a function that makes a model folder with a configuration and no weights.

    Its fields stand beside those of LLAMA, or alone (`plain=False`): then defaults of the model's class fill the rest.
    """

    def make(*, plain: bool = True, **changes) -> str:
        folder: Path = tmp_path_factory.mktemp("model")
        (folder / "config.json").write_text(json.dumps(LLAMA | changes if plain else changes))
        return str(folder)

    return make
