# SPDX-License-Identifier: Apache-2.0
"""What the engine tests on a GPU allow as near ties is no excuse for an answer to something else."""

from __future__ import annotations

import contextlib

import pytest
import tiny_engines
import torch
from near_ties import Tally

from benchmarks.common.tiny_model import expected, prompt

NEW, PRESET = 12, "kvarn"


def test_near_ties_are_no_excuse_for_an_answer_to_something_else(tmp_path):
    # with the widest bounds
    dtype = torch.bfloat16
    model = tiny_engines.save(tmp_path / "model", dtype=dtype)
    right, hit, other = (Tally(model, PRESET, dtype) for _ in range(3))
    for seed in range(2):
        tokens = prompt(300, seed)
        answer = expected(model, tokens, PRESET, new_tokens=NEW)
        right.judge(tokens, answer)
        with contextlib.suppress(AssertionError):
            hit.judge(tokens, answer, cached=256)
        # one page of another prompt
        with pytest.raises(AssertionError, match="below the oracle's best"):
            other.judge(tokens[:128] + prompt(128, seed=99) + tokens[256:], answer)
    right.close()
    assert max(right.below) == 0
    with pytest.raises(AssertionError, match="below the oracle's best"):
        hit.close()
