# SPDX-License-Identifier: Apache-2.0
"""The attention modules of SGLang that `balance` can rewrite, and their state while a server runs."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from kvarn_kernels import balance
from kvarn_kernels.balance import AttentionWeights, Balance

from sglang_kvarn import compat, settings

logger = logging.getLogger(__name__)

BALANCE_ENV = "KVARN_BALANCE"
# attribute of an attention layer (RadixAttention), where weight updates find it, and of its model
_STATE = "kvarn_balance"


def balance_loaded(result: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    """Balance the model that was just loaded, if its cache is a kvarn cache. Hook after ``ModelRunner.load_model``."""
    if settings.preset_of(model_runner.server_args) is not None and not model_runner.is_draft_worker:
        balance_layers(model_runner)


def balance_layers(model_runner: Any) -> None:
    """Balance the attention modules of a model where that pays; a module that is balanced already stays as it is.

    Comes before any CUDA graph is captured. Every rank balances its own heads.
    """
    if os.environ.get(BALANCE_ENV) == "0":
        return
    if sharer := compat.sharer_of_weights(model_runner.server_args):
        logger.info("KVarN leaves the channels of the weights as they are: %s is in use", sharer)
        return
    balanced = []
    for module, layer in _attention_modules(model_runner.model):
        if hasattr(module.attn, _STATE) or (weights := _weights(module, layer)) is None:
            continue
        if (chosen := balance.choose(weights)) is not None:
            chosen.put_in(weights)
            setattr(module.attn, _STATE, chosen)
            balanced.append(chosen)
    if balanced:
        setattr(model_runner.model, _STATE, True)
        logger.info(
            "KVarN balanced the channels of %d heads, by up to %g, and keeps a bias of the values out of the cache in "
            "%d layers; %d layers have other weights",
            sum(chosen.heads for chosen in balanced),
            max(chosen.largest for chosen in balanced),
            sum(chosen.output_bias is not None for chosen in balanced),
            len(balanced),
        )
    if unknown := _unknown_modules(model_runner.model):
        logger.info(
            "KVarN leaves the channels of %d attention layers as they are, because it does not know what %s computes "
            "around attention",
            len(unknown),
            ", ".join(sorted(set(unknown))),
        )


def output_bias(layer: Any) -> torch.Tensor | None:
    """Return what to add to the output of an attention layer, [Hk, D] for the query heads of each KV head."""
    chosen: Balance | None = getattr(layer, _STATE, None)
    return None if chosen is None else chosen.output_bias


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
    for module, layer in _attention_modules(model):
        if (chosen := getattr(module.attn, _STATE, None)) is not None:
            weights = _weights(module, layer)
            assert weights is not None, "weights that were balanced keep their shape"
            yield chosen, weights


def _attention_modules(model: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the attention modules whose arithmetic is known, each with its decoder layer."""
    for layer in model.modules():
        for module in layer.children():
            if compat.is_plain_attention(module):
                yield module, layer


def _unknown_modules(model: torch.nn.Module) -> list[str]:
    """Return the class of every module with an attention layer in it that `_attention_modules` leaves out."""
    return [
        type(module).__name__
        for module in model.modules()
        if any(isinstance(child, compat.RadixAttention) for child in module.children())
        and not compat.is_plain_attention(module)
    ]


def _weights(module: Any, layer: Any) -> AttentionWeights | None:
    """Return the weights of a module of a decoder layer; None where they are not plain matrices of its heads."""
    fused, output = module.qkv_proj, module.o_proj
    heads, kv_heads, head_dim = module.attn.tp_q_head_num, module.attn.tp_k_head_num, module.attn.head_dim
    widths = [n * head_dim for n in (heads, kv_heads, kv_heads)]
    if not (compat.is_plain_matrix(fused, rows=sum(widths)) and compat.is_plain_matrix(output, columns=widths[0])):
        return None
    biases = [None] * 3 if fused.bias is None else fused.bias.detach().split(widths)
    norm: Any = getattr(layer, "input_layernorm", None)
    return balance.attention_weights(
        head_dim,
        list(zip(fused.weight.detach().split(widths), biases, strict=True)),
        output.weight.detach(),
        balance.rope_partners(head_dim, module.rotary_emb.rotary_dim, module.rotary_emb.is_neox_style),
        inputs=norm.weight.detach().float() if compat.is_rms_norm(norm, fused.weight.shape[1]) else None,
        norms=[norm.weight.detach() for norm in (module.q_norm, module.k_norm)] if hasattr(module, "q_norm") else (),
    )
