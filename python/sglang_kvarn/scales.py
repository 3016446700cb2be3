# SPDX-License-Identifier: Apache-2.0
"""Scales of a checkpoint for a cache in another format, which a kvarn cache has no use for."""

from __future__ import annotations

import logging
from typing import Any

from sglang_kvarn import compat

logger = logging.getLogger(__name__)

_CONFIG_KEYS = ("kv_cache_scheme", "kv_cache_quant_algo")


def unused_scales(model_runner: Any) -> list[str]:
    """Return where the user gave scales for keys and values: an argument, the model's configuration, its weights."""
    found = []
    if model_runner.server_args.quantization_param_path is not None:
        found.append("--quantization-param-path")
    config = getattr(model_runner.model_config.hf_config, "quantization_config", None) or {}
    if not isinstance(config, dict):
        config = config.to_dict()
    found += [f"{key} in quantization_config" for key in _CONFIG_KEYS if config.get(key) is not None]
    if any(_has_scale(layer) for layer in model_runner.model.modules() if isinstance(layer, compat.RadixAttention)):
        found.append("k_scale and v_scale of its layers")
    return found


def log_unused(model_runner: Any) -> None:
    """Say in one line that the scales of the checkpoint are not used, on the first rank only."""
    found = unused_scales(model_runner)
    if found and compat.get_parallel().tp_rank == 0:
        logger.info(
            "KVarN does not use the scales for keys and values that come with this model (%s): a kvarn cache "
            "computes its own for every page",
            ", ".join(found),
        )


def _has_scale(layer: Any) -> bool:
    # SGLang gives a layer the scale 1 where the checkpoint has none
    return any(getattr(layer, f"{side}_scale_float", None) not in (None, 1.0) for side in ("k", "v"))
