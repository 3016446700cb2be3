# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters of tiny models: random ones as PEFT writes them, and the same model with one in its weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

RANK, ALPHA = 8, 16
# every projection of a layer
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_PREFIX = "base_model.model."


def save(folder: Path, model: str, seed: int, size: float = 0.05) -> str:
    """Write an adapter of all projections of a model in a folder; return the adapter's folder.

    Args:
        size: standard deviation of both factors of a projection. By default what they add is about a sixth as large as
            the weights of `tiny_model.save`.
    """
    folder.mkdir()
    generator, factors = torch.Generator().manual_seed(seed), {}
    for name, weight in load_file(Path(model) / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if stem.endswith(MODULES):
            for factor, shape in (("lora_A", (RANK, weight.shape[1])), ("lora_B", (weight.shape[0], RANK))):
                factors[f"{_PREFIX}{stem}.{factor}.weight"] = size * torch.randn(shape, generator=generator)
    save_file(factors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(MODULES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


def merge(target: Path, model: str, adapter: str) -> str:
    """Copy a model and add an adapter to its weights, W + ALPHA / RANK B A; return its folder."""
    shutil.copytree(model, target)
    weights, factors = load_file(target / "model.safetensors"), load_file(Path(adapter) / "adapter_model.safetensors")
    for name, lora_a in factors.items():
        if "lora_A" in name:
            lora_b = factors[name.replace("lora_A", "lora_B")]
            weights[name.removeprefix(_PREFIX).replace("lora_A.", "")] += ALPHA / RANK * lora_b @ lora_a
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    return str(target)
