# SPDX-License-Identifier: Apache-2.0
"""Tiny random models whose answers depend on the whole context, and what they must answer.

The expected tokens come from the oracle of `kvarn_kernels`: the same weights in transformers, with every
attention call replaced by `reference.attention`; SGLang, pool, ring and page table have no part in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig
from safetensors.torch import load_file, save_file
from transformers.integrations import hub_kernels
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.common import tiny_step

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
# chunks of states as published; every factor has a value of its own, so that one that is lost changes the answer
_FALCON_H1 = {
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 256,
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.7,
    "ssm_in_multiplier": 0.9,
    "ssm_out_multiplier": 1.1,
    "ssm_multipliers": [0.8, 0.9, 1.1, 1.2, 0.7],
    "mlp_multipliers": [0.9, 0.6],
    "embedding_multiplier": 1.5,
    "lm_head_multiplier": 0.8,
}
_GRANITE_HYBRID = {
    "layer_types": ["mamba", "attention"],
    "mamba_n_heads": 8,
    "mamba_d_head": 64,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 256,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "shared_intermediate_size": 512,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.7,
    "embedding_multiplier": 1.5,
    "logits_scaling": 1.25,
}
_NEMOTRON_H = {
    "num_hidden_layers": 4,
    "layers_block_type": ["mamba", "mlp", "attention", "mlp"],
    "mamba_num_heads": 4,
    "mamba_head_dim": 32,
    "ssm_state_size": 16,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 128,
    # transformers takes no smaller step, SGLang any
    "time_step_min": 1e-9,
    # its activation is a square, so that a wide MLP drowns attention
    "intermediate_size": 64,
}
# a query sees so many tokens in layers with a sliding window
SLIDING_WINDOW = 128
_SLIDING = {"sliding_window": SLIDING_WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2} | {
    "num_hidden_layers": 4
}
# a mixture of all experts: a choice among them could change by a last bit
_MELLUM = _SLIDING | {"num_experts": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 128}
# one layer of each kind: behind a second layer of records a last bit moves log-probabilities by up to 0.1
_GPT_OSS = _SLIDING | {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
_GPT_OSS |= {"num_local_experts": 2, "num_experts_per_tok": 2, "intermediate_size": 128, "swiglu_limit": 7.0}
# query heads that differ between layers of both kinds, and the full ones first
_LAGUNA = {
    "sliding_window": SLIDING_WINDOW,
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "num_attention_heads_per_layer": [4, 6] * 2,
    "mlp_layer_types": ["dense"] * 4,
}
# windows over more than a page, in records like all other layers. Norms behind each layer drown small embeddings, which
# as the head of the model would otherwise repeat every token
_GEMMA3 = {
    "sliding_window": 200,
    "layer_types": ["sliding_attention", "full_attention"],
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 256,
    # scores of normalised queries and keys are as peaked as this says
    "query_pre_attn_scalar": 32,
    "pad_token_id": None,
}
_OLMO3 = {"sliding_window": 200, "layer_types": ["sliding_attention", "full_attention"], "pad_token_id": None}
# model types whose sliding windows SGLang does not keep apart, so that they are read from records
WINDOWS_IN_RECORDS = ("gemma3_text", "olmo3")
# what models of a family differ in from `save`
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_5_text": _GDN,
    "qwen3_next": _GDN | _EXPERTS,
    "falcon_h1": _FALCON_H1,
    "granitemoehybrid": _GRANITE_HYBRID,
    "nemotron_h": _NEMOTRON_H,
    "gemma3_text": _GEMMA3,
    "gpt_oss": _GPT_OSS,
    "laguna": _LAGUNA,
    "mellum": _MELLUM,
    "olmo3": _OLMO3,
    **{family: tiny_step.TEXT | {"sliding_window": SLIDING_WINDOW} for family in tiny_step.ARCHITECTURES},
}
# sizes of published models, for which SGLang's kernels of a GPU are made: of attention, of gated delta nets
PUBLISHED_HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
PUBLISHED_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
PUBLISHED_DELTA |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
# `peak` of `save` times the root of hidden_size, for 16 bits: a prefix counts, and roundings do not
STEADY_PEAK = 1.36
_ATTENTION = "kvarn_oracle"


def save(
    folder: Path,
    family: str = "llama",
    *,
    rounded_to: torch.dtype = torch.float32,
    peak: float = 0.12,
    **changes: Any,
) -> str:
    """Write a model to a folder and return its name: float32, 2 layers, 4 query and 2 KV heads, D = 64.

    Args:
        family: a model_type of transformers; those of FAMILIES differ in more than their name.
        rounded_to: a dtype that holds every weight, so that an engine with this dtype has the weights of the oracle.
        peak: standard deviation of the weights of queries and keys: the larger, the more peaked is attention.
        changes: fields of the configuration.
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
    shape |= FAMILIES.get(family, {}) | changes
    _stay_off_the_hub()
    torch.manual_seed(0)
    if family in tiny_step.ARCHITECTURES:
        model = tiny_step.make(shape)
    else:
        model_class = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family])
        model = model_class(model_class.config_class(**shape))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                # as large as the scores of keys, and such that 16 bits hold it
                weight.normal_(0, 1).copy_(weight.bfloat16())
            elif weight.dim() == 2:
                # attention is to be peaked, and to weigh as much as the token itself
                weight.normal_(0, peak if "q_proj" in name or "k_proj" in name else 0.08)
                if family == "gemma3_text" and "embed_tokens" in name:
                    weight.mul_(1 / 32)
            elif family == "gemma3_text" and name == "model.norm.weight":
                # logits as large as those of the others; the norm adds one
                weight.fill_(31)
            elif family in tiny_step.ARCHITECTURES and name.endswith(("q_norm.weight", "k_norm.weight")):
                # scores of normalised queries and keys are as peaked as this says; the norms add one
                weight.normal_(1, 0.3)
            elif name.endswith("dt_bias"):
                # steps of about 1/50, so that a state remembers as many tokens
                weight.normal_(-4, 1)
            elif "conv1d" in name:
                # what goes into a state is to depend on the tokens, not on the bias
                weight.normal_(0, 0.1 if name.endswith("bias") else 0.5)
            elif name.endswith("bias"):
                # so large that the plugin keeps that of the values out of the cache
                weight.normal_(0, 0.5)
            weight.copy_(weight.to(rounded_to))
    model.save_pretrained(folder)
    if family == "nemotron_h":
        _name_as_published(folder)
    if family == "olmo3":
        _turn_as_published(folder)
    if family in tiny_step.ARCHITECTURES:
        tiny_step.publish(folder, family, shape)
    return str(folder)


def _turn_as_published(folder: Path) -> None:
    """Put RoPE into a folder as a published Olmo 3 has it, one for all layers: SGLang reads no other."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    found = config.pop("rope_parameters")
    # transformers 5.12 has one for all layers
    theta = found["rope_theta"] if "rope_theta" in found else found["full_attention"]["rope_theta"]
    file.write_text(json.dumps(config | {"rope_theta": theta}))


def _name_as_published(folder: Path) -> None:
    """Put the names of a published Nemotron-H into a folder: SGLang does not read all those of transformers."""
    file, weights = folder / "config.json", folder / "model.safetensors"
    names = ("layers_block_type", "mamba_n_groups", "mamba_chunk_size")
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: _NEMOTRON_H[name] for name in names}))
    # transformers 5.12 saves the embeddings by a name that it does not load itself
    loaded = {name.replace(".embedding.", ".embeddings."): x for name, x in load_file(weights).items()}
    save_file(loaded, weights, metadata={"format": "pt"})


def load(folder: str | Path, **options: Any) -> Any:
    """Return a model of `save` in transformers, in float32.

    By class: in a process that has loaded SGLang, the names of transformers give configurations of SGLang's, and
    `from_pretrained` leaves what is not saved, the frequencies of RoPE, as the memory was.
    """
    _stay_off_the_hub()
    published = json.loads((Path(folder) / "config.json").read_text())
    (architecture,) = published["architectures"]
    if architecture in tiny_step.ARCHITECTURES.values():
        model_class, options["config"] = tiny_step.in_transformers(published)
    else:
        model_class = getattr(transformers, architecture)
    model = model_class.from_pretrained(folder, dtype=torch.float32, **options)
    made = dict(model_class(model.config).named_buffers())
    for name, buffer in model.named_buffers():
        buffer.copy_(made[name])
    return model


def _stay_off_the_hub() -> None:
    """Let transformers compute Mamba-2 in torch: 5.12 would load kernels from the Hub, and fail without a GPU."""
    for name in ("causal-conv1d", "mamba-ssm"):
        getattr(hub_kernels, "_HUB_KERNEL_MAPPING", {}).pop(name, None)


def prompt(length: int, seed: int) -> list[int]:
    """Return random token ids."""
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def expected(
    folder: str,
    token_ids: list[int],
    preset: str,
    *,
    cached: int = 0,
    new_tokens: int,
    allowed: Callable[[int], Sequence[int]] | None = None,
) -> list[int]:
    """Return the greedy answer by the position rule.

    Args:
        cached: tokens of the prompt that come from the prefix cache.
        allowed: which tokens a grammar allows as the n-th of the answer, from 0 on; None for all.
    """
    options = {"cached": cached, "new_tokens": new_tokens, "allowed": allowed}
    return expected_with_margin(folder, token_ids, preset, **options)[0]


def expected_with_margin(
    folder: str,
    token_ids: list[int],
    preset: str,
    *,
    cached: int = 0,
    new_tokens: int,
    allowed: Callable[[int], Sequence[int]] | None = None,
) -> tuple[list[int], float]:
    """Return `expected` and by how much the best logit was above the second best, at the closest step."""
    model = _oracle(folder, preset, cached, len(token_ids) + new_tokens)
    tokens, margins = list(token_ids), []
    with torch.inference_mode():
        for _ in range(new_tokens):
            logits = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
            if allowed is not None:
                ids = list(allowed(len(tokens) - len(token_ids)))
                logits = torch.full_like(logits, -torch.inf).index_copy_(0, torch.tensor(ids), logits[ids])
            best, second = logits.topk(2).values.tolist()
            margins.append(best - second)
            tokens.append(int(logits.argmax()))
    return tokens[len(token_ids) :], min(margins)


def logits(folder: str, token_ids: list[int], preset: str, *, cached: int = 0) -> torch.Tensor:
    """Return the logits behind each token of a request by the position rule, float32 [T, V].

    Args:
        token_ids: of the prompt, and of an answer behind it.
        cached: tokens of the prompt that come from the prefix cache.
    """
    model = _oracle(folder, preset, cached, len(token_ids))
    with torch.inference_mode():
        return model(torch.tensor([token_ids]), use_cache=False).logits[0]


def _oracle(folder: str, preset: str, cached: int, max_tokens: int) -> Any:
    """Return a model with the oracle's attention, for requests of at most so many tokens."""
    config = KVarNConfig.from_preset(preset)

    def attend(module, query, key, value, mask, scaling, sliding_window=None, s_aux=None, **kwargs):
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = sliding_window or 0
        if window and module.config.model_type not in WINDOWS_IN_RECORDS:
            return _attend_sliding(q, k, v, scaling, window, s_aux).to(query.dtype)[None], None
        # the cached tokens were computed by a request that found nothing in the cache
        parts = [(q[cached:], k, v, cached), (q[:cached], k[:cached], v[:cached], 0)]
        outs = [
            reference.attention(
                *qkv, config, exact_start=start, sm_scale=scaling, sinks=s_aux, sliding_window=window
            )
            for *qkv, start in parts
            if len(qkv[0])
        ]
        return torch.cat(outs[::-1]).to(query.dtype)[None], None

    # threads of this process and of the engine would wait for each other
    torch.set_num_threads(1)
    ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, attend)
    model = load(folder, attn_implementation=_ATTENTION)
    for module in model.modules():
        if type(module).__name__ == "NemotronHMamba2Mixer":
            # all in one chunk: transformers 5.12 hands states of these layers to wrong chunks
            module.chunk_size = max_tokens
    return model


def _attend_sliding(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int, sinks: torch.Tensor | None
) -> torch.Tensor:
    """Attend tokens q [T, Hq, D], k, v [T, Hk, D] to the last `window` tokens each, its own among them, exactly."""
    tokens, group = len(q), q.shape[1] // k.shape[1]
    keys, values = (x.double().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    distance = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores = (q.double().transpose(0, 1) @ keys.transpose(1, 2) * scaling).masked_fill(
        (distance < 0) | (distance >= window), float("-inf")
    )
    if sinks is not None:
        scores = torch.cat([scores, sinks.double().view(-1, 1, 1).expand(-1, tokens, 1)], -1)
    return (scores.softmax(-1)[..., :tokens] @ values).transpose(0, 1)


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


def answers(
    engine: Any, prompts: list[list[int]], new_tokens: int, *, regexes: list[str | None] | None = None
) -> list[dict[str, Any]]:
    """Generate greedily; return one dict per prompt with `tokens`, `cached`, `retractions` and `drafts_accepted`.

    Args:
        regexes: what the texts of the answers are to match, None for no grammar.
    """
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    each = [sampling | {"regex": regex} for regex in regexes or [None] * len(prompts)]
    outputs = engine.generate(input_ids=prompts, sampling_params=each)
    return [
        {
            "tokens": output["output_ids"],
            "cached": output["meta_info"]["cached_tokens"],
            "retractions": output["meta_info"]["num_retractions"],
            "drafts_accepted": output["meta_info"].get("spec_num_correct_drafts", 0),
        }
        for output in outputs
    ]
