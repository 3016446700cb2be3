# SPDX-License-Identifier: Apache-2.0
"""Attention modules of SGLang that `balance` rewrites, and their state while a server runs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kvarn_kernels import balance
from kvarn_kernels.balance import AttentionWeights, Balance

from sglang_kvarn import attention_modules, compat

logger = logging.getLogger(__name__)

BALANCE_ENV = "KVARN_BALANCE"
# attribute of an attention layer (RadixAttention), where weight updates find it, and of its model
_STATE = "kvarn_balance"


def balance_layers(model_runner: Any) -> None:
    """Balance the attention modules of a model where that pays; a module that is balanced already stays as it is.

    So does a layer with a sliding window that stays in 16 bits. Comes before any CUDA graph is captured. Every rank
    balances its own heads.
    """
    if os.environ.get(BALANCE_ENV) == "0":
        return
    if sharer := compat.sharer_of_weights(model_runner.server_args):
        logger.info("KVarN leaves the channels of the weights as they are: %s is in use", sharer)
        return
    windows = compat.windows_in_records(model_runner.model_config)
    balanced, packed = [], []
    for module, parent in attention_modules.known(model_runner.model):
        if hasattr(module.attn, _STATE) or not attention_modules.has_records(module.attn, windows):
            continue
        if (weights := attention_modules.weights(module, parent)) is None:
            packed.append(type(module).__name__)
        elif (chosen := balance.choose(weights)) is not None:
            chosen.put_in(weights)
            setattr(module.attn, _STATE, chosen)
            balanced.append(chosen)
    if balanced:
        setattr(model_runner.model, _STATE, True)
        _log_balanced(balanced)
    _log_left(packed, "the weights of %s are quantised, or packed for a CPU")
    unknown = attention_modules.unknown(model_runner.model, windows)
    _log_left(unknown, "it does not know what %s computes around attention")


def _log_balanced(balanced: list[Balance]) -> None:
    logger.info(
        "KVarN balanced the channels of %d heads in %d layers, by up to %g; in %d of these layers a bias of the values "
        "stays out of the cache, in %d queries and keys are multiplied behind RoPE",
        sum(chosen.heads for chosen in balanced),
        len(balanced),
        max(chosen.largest for chosen in balanced),
        sum(chosen.output_bias is not None for chosen in balanced),
        sum(chosen.queries_and_keys is not None for chosen in balanced),
    )


def _log_left(classes: list[str], reason: str) -> None:
    """Say of which attention layers, by class, the channels stay as they are."""
    if classes:
        named = ", ".join(sorted(set(classes)))
        start = "KVarN leaves the channels of %d attention layers as they are, because "
        logger.info(start + reason, len(classes), named)


def multiplied(layer: Any, q: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [T, Hq, D] and keys [T, Hk, D] of an attention layer with the factors that its weights lack."""
    chosen: Balance | None = getattr(layer, _STATE, None)
    if chosen is None or chosen.queries_and_keys is None:
        return q, k
    of_queries, of_keys = chosen.queries_and_keys
    return q * of_queries, k * of_keys


def add_output_bias(layer: Any, out: torch.Tensor) -> None:
    """Add to the output [T, Hq, D] of an attention layer, in place, the bias that its values lack."""
    chosen: Balance | None = getattr(layer, _STATE, None)
    if chosen is not None and chosen.output_bias is not None:
        # [T, Hk, M, D] += [Hk, 1, D]
        out.unflatten(1, (len(chosen.output_bias), -1)).add_(chosen.output_bias[:, None])


def fingerprint(model: torch.nn.Module) -> str:
    """Return 12 hexadecimal digits that stand for the factors and biases with which the model fills its cache."""
    found = hashlib.sha256()
    for name, layer in model.named_modules():
        if (chosen := getattr(layer, _STATE, None)) is None or layer is model:
            continue
        found.update(name.encode())
        for part in (chosen.keys, chosen.values, chosen.output_bias):
            found.update(b"-" if part is None else part.float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def with_plain_weights(original: Callable[..., Any], self: Any, *args: Any, **kwargs: Any) -> Any:
    """Let SGLang read or write weights as a checkpoint has them. Hook around what updates, saves or sends them.

    The factors stay those of the start: keys and values that are still cached have them, whatever the weights become.
    A server without a kvarn cache balances nothing, and its worker need not hold a model.
    """
    model: Any = getattr(getattr(self.tp_worker, "model_runner", None), "model", None)
    if not hasattr(model, _STATE):
        return original(self, *args, **kwargs)
    for chosen, weights in _balanced(model):
        chosen.take_out(weights)
    try:
        return original(self, *args, **kwargs)
    finally:
        for chosen, weights in _balanced(model):
            chosen.put_in(weights)


def _balanced(model: torch.nn.Module) -> Iterator[tuple[Balance, AttentionWeights]]:
    for module, parent in attention_modules.known(model):
        if (chosen := getattr(module.attn, _STATE, None)) is not None:
            weights = attention_modules.weights(module, parent)
            assert weights is not None, "weights that were balanced keep their shape"
            yield chosen, weights
