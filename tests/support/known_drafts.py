# SPDX-License-Identifier: Apache-2.0
"""Drafts of known texts in the processes of an engine, whoever drafts there and on whatever device.

Heads of random weights propose nothing that is accepted. Where a request goes on as a known text does, its drafts are
what the text says, so that a step accepts all of them.
"""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import pytest
import torch
from engine_plugin import add_to_engines
from sglang_kvarn import compat

# a file with texts, lists of tokens; a test may change it while an engine runs
TEXTS = "KVARN_TEST_KNOWN_TEXTS"
# its name
FILE = "texts.json"


class Texts:
    """The texts that the engines of a test know."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.know([])

    def know(self, texts: list[list[int]]) -> None:
        """Let the engines draft these texts from now on: tokens of a prompt, and of the answer behind it."""
        written = self._file.with_suffix(".new")
        written.write_text(json.dumps(texts))
        written.replace(self._file)


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> Texts:
    """Let the engines that this process starts draft texts, none at first.

    Args:
        folder: for the texts and the plugin of the test.
    """
    add_to_engines(patch, folder, "known_drafts:install")
    file = folder / FILE
    patch.setenv(TEXTS, str(file))
    return Texts(file)


def install() -> None:
    """Put the texts into what a target model is to verify, for good."""
    for name in ("eagle_info.EagleVerifyInput", "dflash_info.DFlashVerifyInput"):
        verified = compat.resolve(f"sglang.srt.speculative.{name}")
        verified.__post_init__ = _with_texts(verified.__post_init__)


def _with_texts(made):
    """Return what ends the constructor of a verify step, with drafts of the texts where they fit."""

    @functools.wraps(made)
    def with_texts(step) -> None:
        made(step)
        # steps that are captured have no drafts, or none that may be looked at
        captured = torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        if captured or step.draft_token is None or len(step.draft_token) == 0:
            return
        texts = json.loads(Path(os.environ[TEXTS]).read_text())
        drafts = step.draft_token.view(-1, step.draft_token_num)
        places = step.positions.view(drafts.shape)[:, 0].tolist()
        for own, place, root in zip(drafts, places, drafts[:, 0].tolist(), strict=True):
            for text in texts:
                if place < len(text) and text[place] == root:
                    known = text[place + 1 : place + len(own)]
                    own[1 : 1 + len(known)] = torch.tensor(known, dtype=own.dtype, device=own.device)

    return with_texts
