# SPDX-License-Identifier: Apache-2.0
"""A tiny Step 3.5 or 3.7 in transformers, which has the two as one model that sees, and in a folder as published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers

# model types, with the architectures that SGLang has for them: of Step 3.5 it loads the text part only
ARCHITECTURES = {"step3p5": "Step3p5ForCausalLM", "step3p7": "Step3p7ForConditionalGeneration"}
# what the text part differs in from `tiny_model.save`: query heads that differ between layers of both kinds, as do the
# bases of RoPE and how many channels it turns. The last entry of each list is of a layer that drafts, without weights
TEXT: dict[str, Any] = {
    "model_type": "step3p5",
    "num_hidden_layers": 2,
    "num_nextn_predict_layers": 1,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "rope_theta": [1e4, 1e6, 1e4],
    "partial_rotary_factors": [1.0, 0.5, 1.0],
    "yarn_only_types": [],
    "use_head_wise_attn_gate": True,
    # a mixture of all experts: a choice among them could change by a last bit
    "moe_layers_enum": "1",
    "moe_num_experts": 2,
    "moe_top_k": 2,
    "moe_intermediate_size": 64,
    "share_expert_dim": 64,
    "moe_router_scaling_factor": 1.5,
    "need_fp32_gate": True,
    "use_moe_router_bias": True,
    # 0: no limit. SGLang applies that of routed experts on GPUs only
    "swiglu_limits": [0.0] * 3,
    "swiglu_limits_shared": [1.0, 0.5, 0.0],
    # of experts
    "initializer_range": 0.08,
    "pad_token_id": 0,
}
_VISION = {"width": 16, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}


def make(shape: dict[str, Any]) -> Any:
    """Return a model of both architectures; shape: fields of the text part, KV heads by their name in transformers."""
    return _model_class()(_configuration(_published(shape), _VISION))


def publish(folder: Path, family: str, shape: dict[str, Any]) -> None:
    """Write the configuration as published into a folder with the weights of `make`, which have published names."""
    text = _published(shape)
    whole = {"text_config": text, "vision_config": _VISION | {"model_type": "perception_encoder"}}
    found = text if family == "step3p5" else whole
    # SGLang asks transformers before its own code for the number of query heads, of which transformers has none for all
    # layers; published models bring code of their own for that (--trust-remote-code)
    text["allow_global_per_layer_attribute_access"] = True
    chosen = {"architectures": [ARCHITECTURES[family]], "model_type": family}
    (folder / "config.json").write_text(json.dumps(found | chosen))


def in_transformers(published: dict[str, Any]) -> tuple[type, Any]:
    """Return the class, and the configuration with which it computes what SGLang does with the published one."""
    text, vision = published.get("text_config", published), published.get("vision_config", _VISION)
    # SGLang hands its backends the window as the tokens before the query's own
    return _model_class(), _configuration(text | {"sliding_window": text["sliding_window"] + 1}, vision)


def _model_class() -> Any:
    return transformers.Step3p7ForConditionalGeneration


def _configuration(text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return _model_class().config_class(text_config=dict(text), vision_config=dict(vision))


def _published(shape: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration of the text part by the names of published ones."""
    text = {name: value for name, value in shape.items() if name != "num_key_value_heads"}
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    sliding = {"attention_type": "sliding_attention", "num_attention_heads": heads // 2 * 3}
    other = sliding | {"num_attention_groups": kv_heads, "head_dim": shape["head_dim"]}
    return text | {"num_attention_groups": kv_heads, "attention_other_setting": other}
