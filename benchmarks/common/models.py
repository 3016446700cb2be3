# SPDX-License-Identifier: Apache-2.0
"""The models of the benchmarks by name: small ones that are made here, an 8B shape of random weights, or a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

TINY, SMOLLM2, DUMMY = "tiny", "smollm2", "qwen3-8b-dummy"
# tokens of the longest request of the dummy
DUMMY_CONTEXT = 140_000
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def _made(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"sglang-kvarn-bench-{name}"


def _tiny() -> Path:
    """Return the folder of the tiny model; it appears whole, so that several processes may ask at once."""
    from benchmarks.common import tiny_model

    made = _made(f"{TINY}-{hashlib.sha256(Path(tiny_model.__file__).read_bytes()).hexdigest()[:12]}")
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as work:
            own = Path(work) / made.name
            tiny_model.save(own)
            # the slower of two drops its copy
            with contextlib.suppress(OSError):
                own.rename(made)
    return made


def folder(model: str) -> Path:
    """Return the folder of a model; those with a name are written or downloaded on the way.

    Args:
        model: `TINY` (random weights, two layers), `SMOLLM2`, `DUMMY` (the shape of Qwen3-8B without weights), or a
            folder.
    """
    if model == TINY:
        return _tiny()
    if model == DUMMY:
        made = _made(model)
        made.mkdir(exist_ok=True)
        (made / "config.json").write_text(json.dumps(QWEN3_8B))
        return made
    if model == SMOLLM2:
        from sglang_kvarn.demo.model import prepare

        return prepare()
    return Path(model)


def arguments(model: str) -> dict[str, Any]:
    """Return what SGLang has to be told to load a model, by the names of its ServerArgs."""
    found: dict[str, Any] = {"model_path": str(folder(model))}
    return found | ({"load_format": "dummy", "context_length": DUMMY_CONTEXT} if model == DUMMY else {})


def vocabulary(path: Path) -> int:
    """Return the number of tokens of the model in a folder."""
    config = json.loads((path / "config.json").read_text())
    return config.get("vocab_size") or config["text_config"]["vocab_size"]
