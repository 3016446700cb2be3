# SPDX-License-Identifier: Apache-2.0
"""Tiny models in which some layers keep states: those that the installed SGLang serves, and prompts for them."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from sglang_kvarn import compat

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import prompt

PRESET = "kvarn_canonical"
# A layer of states sums in another order than transformers does, so that a key can fall on the other side of a rounding
# edge: a logit moves by up to 2e-3. Prompts are those whose answer does not hang on as little.
MARGIN = 0.02
# dense layers, which 0.5.16 knows only as a part of a model that sees; a mixture of experts in every layer
DELTA = "qwen3_5_text" if compat.has_argument("attn_dp_size") else "qwen3_next"
# state spaces; SGLang's code of the last one is wrong until 0.5.20
MAMBA2 = ["nemotron_h", "falcon_h1", *(["granitemoehybrid"] if compat.has_argument("attn_dp_size") else [])]
# heads that two ranks can share, where the tiny model has too few
_DELTA_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
_DELTA_HEADS |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
TWO_RANKS = {"qwen3_5_text": _DELTA_HEADS, "qwen3_next": _DELTA_HEADS}
# tokens of a step, so that a prompt can end amid one
STEP = 384
HAS_PREFIX_CACHE = compat.saves_states_at_page_ends()
OPTIONS = {
    "max_mamba_cache_size": 40,
    "chunked_prefill_size": STEP,
    "disable_radix_cache": not HAS_PREFIX_CACHE,
}


def steady(
    folder: str, length: int, *, after: Sequence[int] = (), preset: str = PRESET, **options: Any
) -> tuple[list[int], list[int]]:
    """Return a prompt of so many tokens that begins with others, and the oracle's answer by a wide enough margin.

    Args:
        options: of `tiny_model.expected`.
    """
    for seed in itertools.count(length):
        tokens = [*after, *prompt(length - len(after), seed)]
        found, margin = tiny_model.expected_with_margin(folder, tokens, preset, **options)
        if margin > MARGIN:
            return tokens, found


def with_large_keys(folder: str, target: Path, channels: list[int]) -> str:
    """Copy a model whose norms of keys are of Gemma's form; it computes the same with channels of 256 times the size.

    Args:
        channels: of the keys of every head, those that RoPE turns together both or none.
    """
    shutil.copytree(folder, target)
    weights = load_file(target / "model.safetensors")
    for end, factor in (("q_norm.weight", 1 / 256), ("k_norm.weight", 256)):
        for name in (name for name in weights if name.endswith(end)):
            # these norms multiply by the weight and one
            weights[name][channels] += factor - 1
            assert (weights[name] + 1).max() == max(factor, 1), "a new model's norms multiply by one"
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)
