# SPDX-License-Identifier: Apache-2.0
"""Draft models for the tiny models: configurations, and the arguments of engines that draft with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import known_drafts

from benchmarks.common import tiny_model

# of servers on a CPU that draft
STAND_INS = ("drafts_on_cpu", "known_drafts")
# tokens that a model of DFLASH drafts at once, the root included
BLOCK = 4
_HEAD = {
    "model_type": "llama",
    "num_hidden_layers": 1,
    "draft_vocab_size": tiny_model.VOCABULARY,
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [0, 1]},
    "num_aux_hidden_states": 2,
}
_KINDS: dict[str, dict[str, Any]] = {
    "EAGLE": _HEAD | {"architectures": ["LlamaForCausalLMEagle"]},
    "EAGLE3": _HEAD | {"architectures": ["LlamaForCausalLMEagle3"]},
    "DFLASH": {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "num_hidden_layers": 2,
        "block_size": BLOCK,
        "num_target_layers": 2,
        "dflash_config": {"target_layer_ids": [0], "mask_token_id": tiny_model.VOCABULARY - 1},
    },
}


def arguments(
    algorithm: str, folder: Path, *, model: str | None = None, heads: int = 4, head_dim: int = 64
) -> dict[str, Any]:
    """Return the arguments of an engine that drafts with a model.

    Args:
        folder: a new one, for the draft model's configuration.
        model: that drafts for STANDALONE; heads: of the queries of another one, which has two of keys and values.
    """
    if algorithm == "NEXTN":
        # the model itself, whose checkpoint has no head
        return {"speculative_algorithm": algorithm, "speculative_draft_load_format": "dummy"}
    if algorithm == "STANDALONE":
        assert model is not None, "a model that drafts"
        return {"speculative_algorithm": algorithm, "speculative_draft_model_path": model}
    shape = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": heads, "num_key_value_heads": 2}
    shape |= {"head_dim": head_dim, "vocab_size": tiny_model.VOCABULARY, "max_position_embeddings": 4096}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shape | _KINDS[algorithm]))
    return {
        "speculative_algorithm": algorithm,
        "speculative_draft_model_path": str(folder),
        "speculative_draft_load_format": "dummy",
    }


def of_a_pair(algorithm: str, folder: Path) -> dict[str, str]:
    """Return what `server_pair.start` takes for a server that drafts: options of the command line, and its environment.

    Args:
        folder: a new one; the server drafts the texts in its file.
    """
    chosen = arguments(algorithm, folder / "draft")
    known = {known_drafts.TEXTS: str(folder / known_drafts.FILE)}
    return {key.replace("_", "-"): value for key, value in chosen.items()} | known
