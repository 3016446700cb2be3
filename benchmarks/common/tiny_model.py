# SPDX-License-Identifier: Apache-2.0
"""Tiny random models whose answers depend on the whole context, and what they must answer.

The expected tokens come from the oracle of `kvarn_kernels`: the same weights in transformers, with every
attention call replaced by `reference.attention`; SGLang, pool, ring and page table have no part in them.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY = 512
_GDN = {
    "num_hidden_layers": 4,
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "full_attention_interval": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "linear_num_key_heads": 1,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
}
# what models of a family differ in from `save`
FAMILIES: dict[str, dict[str, Any]] = {"qwen3_5_text": _GDN, "qwen3_next": _GDN | _EXPERTS}
_ATTENTION = "kvarn_oracle"


def save(folder: Path, family: str = "llama") -> str:
    """Write a model to a folder and return its name: float32, 2 layers, 4 query and 2 KV heads, D = 64.

    Args:
        family: a model_type of transformers; those of FAMILIES differ in more than their name.
    """
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "eos_token_id": None,
        "bos_token_id": None,
    }
    model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
    config = model_class.config_class(**shape | FAMILIES.get(family, {}))
    torch.manual_seed(0)
    model = model_class(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2:
                # attention is to be peaked, and to weigh as much as the token itself
                weight.normal_(0, 0.12 if "q_proj" in name or "k_proj" in name else 0.08)
            elif name.endswith("bias"):
                # so large that the plugin keeps that of the values out of the cache
                weight.normal_(0, 0.5)
    model.save_pretrained(folder)
    return str(folder)


def load(folder: str | Path, **options: Any) -> Any:
    """Return a model of `save` in transformers, in float32.

    By class: in a process that has loaded SGLang, the names of transformers give configurations of SGLang's, and
    `from_pretrained` leaves what is not saved, the frequencies of RoPE, as the memory was.
    """
    (architecture,) = json.loads((Path(folder) / "config.json").read_text())["architectures"]
    model_class = getattr(transformers, architecture)
    model = model_class.from_pretrained(folder, dtype=torch.float32, **options)
    made = dict(model_class(model.config).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(made[name])
    return model


def prompt(length: int, seed: int) -> list[int]:
    """Return random token ids."""
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(folder: str, token_ids: list[int], preset: str, *, cached: int = 0, new_tokens: int) -> list[int]:
    """Return the greedy answer by the position rule.

    Args:
        cached: tokens of the prompt that come from the prefix cache.
    """
    return expected_with_margin(folder, token_ids, preset, cached=cached, new_tokens=new_tokens)[0]


def expected_with_margin(
    folder: str, token_ids: list[int], preset: str, *, cached: int = 0, new_tokens: int
) -> tuple[list[int], float]:
    """Return `expected` and by how much the best logit was above the second best, at the closest step."""
    config = KVarNConfig.from_preset(preset)

    def attend(module, query, key, value, mask, scaling, **kwargs):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        # the cached tokens were computed by a request that found nothing in the cache
        parts = [(q[cached:], k, v, cached), (q[:cached], k[:cached], v[:cached], 0)]
        outs = [
            reference.attention(*qkv, config, exact_start=start, sm_scale=scaling)
            for *qkv, start in parts
            if len(qkv[0])
        ]
        return torch.cat(outs[::-1]).to(query.dtype)[None], None

    # threads of this process and of the engine would wait for each other
    torch.set_num_threads(1)
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
    model = load(folder, attn_implementation=_ATTENTION)
    tokens, margins = list(token_ids), []
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            best, second = logits.topk(2).values.tolist()
            margins.append(best - second)
            tokens.append(int(logits.argmax()))
    return tokens[len(token_ids) :], min(margins)


def fail(signum: int, frame: Any) -> None:
    """Fail the test when a process of the engine dies; SGLang's own handler would kill pytest."""
    raise RuntimeError("a process of the engine died, see its log")


def flush(engine: Any) -> None:
    """Empty the prefix cache; SGLang refuses while a request is in flight, its last step included."""
    for _ in range(100):
        if engine.flush_cache().success:
            return
        time.sleep(0.1)
    raise AssertionError("the engine did not become idle within 10 s")


def answers(engine: Any, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Generate greedily; return one dict per prompt with `tokens`, `cached`, `retractions` and `drafts_accepted`."""
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    outputs = engine.generate(input_ids=prompts, sampling_params=sampling)
    return [
        {
            "tokens": output["output_ids"],
            "cached": output["meta_info"]["cached_tokens"],
            "retractions": output["meta_info"]["num_retractions"],
            "drafts_accepted": output["meta_info"].get("spec_num_correct_drafts", 0),
        }
        for output in outputs
    ]
