# SPDX-License-Identifier: Apache-2.0
"""The models of the benchmarks by name: small ones that are made here, an 8B shape of random weights, or a folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TINY, SMOLLM2, DUMMY, HYBRID = "tiny", "smollm2", "qwen3-8b-dummy", "qwen3.5-27b-half-dummy"
TINY_HYBRID = "tiny-hybrid"
# two layers of random weights, without a tokenizer; the second one has gated delta nets, and needs a GPU
TINY_ONES = (TINY, TINY_HYBRID)
GEMMA3, GPT_OSS = "gemma3-270m", "gpt-oss-20b-dummy"
# tokens of the longest request of a model without weights
DUMMY_CONTEXT = 140_000
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# the first 32 of the 64 layers of Qwen3.5-27B, so that one GPU has room for a cache; as text, which SGLang 0.5.23 knows
QWEN3_5_27B_HALF = {
    "architectures": ["Qwen3_5ForCausalLM"], "model_type": "qwen3_5_text", "hidden_size": 5120, "num_hidden_layers": 32,
    "num_attention_heads": 24, "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 17408,
    "vocab_size": 151936, "max_position_embeddings": 262144, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    "attention_bias": False, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "mamba_ssm_dtype": "float32",
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 8,
    "full_attention_interval": 4, "linear_num_key_heads": 16, "linear_num_value_heads": 48,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25},
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# gpt-oss-20b in bfloat16 instead of MXFP4: 42 GB of weights, half of the layers with windows of 128 tokens
GPT_OSS_20B = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "num_hidden_layers": 24,
    "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "intermediate_size": 2880,
    "vocab_size": 201088, "max_position_embeddings": 163840, "rms_norm_eps": 1e-5, "rope_theta": 150000,
    "hidden_act": "silu", "attention_bias": True, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "layer_types": ["sliding_attention", "full_attention"] * 12, "sliding_window": 128,
    "num_local_experts": 32, "num_experts_per_tok": 4, "experts_per_token": 4, "swiglu_limit": 7.0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
# who drafts for `draft_arguments`: text that was seen before, a head of random weights, a smaller model
DRAFTERS = NGRAM, EAGLE3, STANDALONE = "NGRAM", "EAGLE3", "STANDALONE"
# of the 30 layers of `SMOLLM2` those that its draft lacks; three of four tokens are still those of the whole model
DRAFT_LACKS = (12, 13)
# models that are a configuration and no weights
DUMMIES = {DUMMY: QWEN3_8B, HYBRID: QWEN3_5_27B_HALF, GPT_OSS: GPT_OSS_20B}


def _made(name: str) -> Path:
    return Path(tempfile.gettempdir()) / f"sglang-kvarn-bench-{name}"


def _described(name: str, config: dict[str, Any]) -> Path:
    """Return the folder of a model that is a configuration and no weights."""
    made = _made(name)
    made.mkdir(exist_ok=True)
    (made / "config.json").write_text(json.dumps(config))
    return made


def _tiny(name: str) -> Path:
    """Return the folder of a tiny model; it appears whole, so that several processes may ask at once."""
    from benchmarks.common import tiny_model

    made = _made(f"{name}-{hashlib.sha256(Path(tiny_model.__file__).read_bytes()).hexdigest()[:12]}")
    if not made.exists():
        with tempfile.TemporaryDirectory(dir=made.parent) as work:
            own = Path(work) / made.name
            if name == TINY:
                tiny_model.save(own)
            else:
                sizes = tiny_model.PUBLISHED_HEADS | tiny_model.PUBLISHED_DELTA
                # of 256 channels
                tiny_model.save(own, "qwen3_5_text", peak=tiny_model.STEADY_PEAK / 16, **sizes)
            # the slower of two drops its copy
            with contextlib.suppress(OSError):
                own.rename(made)
    return made


def _shortened(source: Path, lacks: Sequence[int]) -> Path:
    """Return the folder of a model of Llama's architecture without some of its layers, made once."""
    from safetensors.torch import load_file, save_file

    made = _made(f"{source.name}-without-{'-'.join(map(str, lacks))}")
    if made.exists():
        return made
    config = json.loads((source / "config.json").read_text())
    kept = [n for n in range(config["num_hidden_layers"]) if n not in lacks]
    weights = {}
    for name, weight in load_file(source / "model.safetensors").items():
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        if layer is None:
            weights[name] = weight
        elif (number := int(layer[1])) in kept:
            weights[f"model.layers.{kept.index(number)}.{name[layer.end() :]}"] = weight
    with tempfile.TemporaryDirectory(dir=made.parent) as work:
        own = Path(work) / made.name
        shutil.copytree(source, own, ignore=shutil.ignore_patterns("*.safetensors"))
        (own / "config.json").write_text(json.dumps(config | {"num_hidden_layers": len(kept)}))
        save_file(weights, own / "model.safetensors", metadata={"format": "pt"})
        # the slower of two drops its copy
        with contextlib.suppress(OSError):
            own.rename(made)
    return made


def folder(model: str) -> Path:
    """Return the folder of a model; those with a name are written or downloaded on the way.

    Args:
        model: one of `TINY_ONES`, `SMOLLM2`, `GEMMA3`, one of `DUMMIES`, or a folder.
    """
    if model in TINY_ONES:
        return _tiny(model)
    if model in DUMMIES:
        return _described(model, DUMMIES[model])
    if model == SMOLLM2:
        from sglang_kvarn.demo.model import prepare

        return prepare()
    if model == GEMMA3:
        from sglang_kvarn.demo import gemma3

        return gemma3.prepare()
    return Path(model)


def arguments(model: str) -> dict[str, Any]:
    """Return what SGLang has to be told to load a model, by the names of its ServerArgs."""
    found: dict[str, Any] = {"model_path": str(folder(model))}
    return found | ({"load_format": "dummy", "context_length": DUMMY_CONTEXT} if model in DUMMIES else {})


def draft_arguments(model: str, algorithm: str, drafts: int) -> dict[str, Any]:
    """Return what makes SGLang speculate with chains, by the names of its ServerArgs.

    Args:
        algorithm: one of `DRAFTERS`; EAGLE3 is a head of random weights for `DUMMY`, with the sizes of those that are
            published for Qwen3-8B: one layer, 32,000 tokens it can draft. STANDALONE is `SMOLLM2` without two layers,
            for the whole of it.
        drafts: tokens of a request that a step verifies.

    Raises:
        ValueError: a head or a draft for another model.
    """
    chosen: dict[str, Any] = {"speculative_algorithm": algorithm, "speculative_num_draft_tokens": drafts}
    if algorithm == NGRAM:
        return chosen | {"speculative_ngram_max_bfs_breadth": 1}
    chain = {"speculative_eagle_topk": 1, "speculative_num_steps": drafts - 1}
    if algorithm == STANDALONE:
        if model != SMOLLM2:
            raise ValueError(f"expected {SMOLLM2} for {STANDALONE}, got {model}: other models have no draft here")
        return chosen | chain | {"speculative_draft_model_path": str(_shortened(folder(model), DRAFT_LACKS))}
    if model != DUMMY:
        raise ValueError(f"expected {DUMMY} for {EAGLE3}, got {model}: other models have no head here")
    head = QWEN3_8B | {
        "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
        "draft_vocab_size": 32000, "num_aux_hidden_states": 3,
    }  # fmt: skip
    made = _described(f"{model}-{algorithm.lower()}", head)
    chosen |= {"speculative_draft_model_path": str(made), "speculative_draft_load_format": "dummy"}
    return chosen | chain


def vocabulary(path: Path) -> int:
    """Return the number of tokens of the model in a folder."""
    config = json.loads((path / "config.json").read_text())
    return config.get("vocab_size") or config["text_config"]["vocab_size"]
