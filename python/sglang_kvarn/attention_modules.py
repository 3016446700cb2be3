# SPDX-License-Identifier: Apache-2.0
"""The attention modules of SGLang that `balance` can rewrite, and their weights as it takes them.

All of them compute q, k, v = qkv_proj(x), norms of q and k where there are any, RoPE, attention, o_proj. What else they
do keeps the channels of a head apart: an output gate multiplies each channel that attention puts out, or all channels
of a head, and Falcon-H1 and Ministral 3 multiply keys or queries by one number. A subclass can do anything, so it is
not known by its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from kvarn_kernels import balance
from kvarn_kernels.balance import AttentionWeights, Norms

from sglang_kvarn import compat

# below sglang.srt.models, as 0.5.16 and 0.5.23 have them; Ernie 4.5 takes Llama's
KNOWN = (
    *("llama.LlamaAttention", "mixtral.MixtralAttention", "ministral3.Ministral3Attention"),
    *("qwen2.Qwen2Attention", "qwen2_moe.Qwen2MoeAttention", "qwen3.Qwen3Attention", "qwen3_moe.Qwen3MoeAttention"),
    *("glm4.Glm4Attention", "glm4_moe.Glm4MoeAttention", "hunyuan_v3.HYV3Attention", "laguna.LagunaAttention"),
    *("minimax_m2.MiniMaxM2Attention", "granitemoehybrid.GraniteMoeHybridAttention", "nemotron_h.NemotronHAttention"),
    *("gemma3_causal.Gemma3Attention", "olmo2.Olmo2Attention", "step3p5.Step3p5Attention"),
    "falcon_h1.FalconH1HybridAttentionDecoderLayer",
    # with an output gate behind the queries of each head, in qkv_proj
    *("qwen3_next.Qwen3HybridAttentionDecoderLayer", "qwen3_5.Qwen3_5AttentionDecoderLayer"),
)
# makes q_norm and k_norm, and leaves them out
_WITHOUT_NORMS = "falcon_h1.FalconH1HybridAttentionDecoderLayer"


def known(model: torch.nn.Module) -> Iterator[tuple[Any, Any]]:
    """Yield the attention modules whose arithmetic is known, each with the module that it is a part of."""
    for parent in model.modules():
        for module in parent.children():
            if is_known(module):
                yield module, parent


def unknown(model: torch.nn.Module, windows: tuple[int, ...]) -> list[str]:
    """Return the class of every module that `known` leaves out, and that has an attention layer with records in it."""
    return [
        type(module).__name__
        for module in model.modules()
        if any(isinstance(child, compat.RadixAttention) and has_records(child, windows) for child in module.children())
        and not is_known(module)
    ]


def has_records(attn: Any, windows: tuple[int, ...]) -> bool:
    """Whether the keys and values of an attention layer are quantised.

    Args:
        windows: sliding windows that are read from records, in tokens; layers with another one keep 16 bits.
    """
    # SGLang counts the tokens before the query's own, and has -1 for all
    return attn.sliding_window_size + 1 in (0, *windows)


def is_known(module: Any) -> bool:
    """Whether the arithmetic of a module around attention is known, and its norms are of a known kind."""
    if _name(module) not in KNOWN:
        return False
    return all(compat.rms_norm_offset(norm) is not None for norm in _norms(module))


def weights(module: Any, parent: Any) -> AttentionWeights | None:
    """Return the weights of a module that is a part of another; None where they are not plain matrices of its heads."""
    fused, output, attn = module.qkv_proj, module.o_proj, module.attn
    head_dim, parts = attn.head_dim, 2 if getattr(module, "attn_output_gate", False) else 1
    heads = [parts * attn.tp_q_head_num, attn.tp_k_head_num, attn.tp_k_head_num]
    columns = attn.tp_q_head_num * head_dim
    fits = compat.is_plain_matrix(fused, rows=sum(heads) * head_dim), compat.is_plain_matrix(output, columns=columns)
    if not all(fits):
        return None
    by_head = [None if x is None else x.detach().unflatten(0, (-1, head_dim)) for x in (fused.weight, fused.bias)]
    q, k, v = zip(*([None] * 3 if x is None else x.split(heads) for x in by_head), strict=True)
    # of the heads in q every second one is the gate of the one before it
    q = tuple(None if x is None else x[::parts] for x in q)
    return balance.attention_weights(
        [q, k, v],
        output.weight.detach(),
        _partners(module),
        inputs=_inputs(module, parent, fused.weight.shape[1]),
        norms=_norm_weights(module),
    )


def _name(module: Any) -> str:
    cls = type(module)
    return f"{cls.__module__}.{cls.__qualname__}".removeprefix("sglang.srt.models.")


def _norms(module: Any) -> list[Any]:
    """Return the norms of queries and keys; empty where there are none."""
    if _name(module) == _WITHOUT_NORMS or not hasattr(module, "q_norm"):
        return []
    return [module.q_norm, module.k_norm]


def _norm_weights(module: Any) -> Norms | None:
    if not (norms := _norms(module)):
        return None
    offset = compat.rms_norm_offset(norms[0])
    assert offset is not None, "a known module has norms of a known kind"
    attn = module.attn
    heads = attn.tp_q_head_num, attn.tp_k_head_num
    queries, keys = (_of_rank(module, x.weight.detach(), n * attn.head_dim) for x, n in zip(norms, heads, strict=True))
    return Norms(queries, keys, offset)


def _of_rank(module: Any, weight: torch.Tensor, size: int) -> torch.Tensor:
    """Return what this rank uses of the weight of a norm: Olmo's ranks each hold that of all heads."""
    return weight if weight.numel() <= size else weight.view(-1, size)[module.tp_rank]


def _partners(module: Any) -> torch.Tensor | None:
    """Return which channels RoPE turns together, None where there is no RoPE."""
    if (rope := getattr(module, "rotary_emb", None)) is None:
        return None
    return balance.rope_partners(module.attn.head_dim, rope.rotary_dim, rope.is_neox_style)


def _inputs(module: Any, parent: Any, size: int) -> torch.Tensor | None:
    """Return by what the norm before the projections multiplies each of their inputs, None if it is not known."""
    candidates = ((module, "input_layernorm"), (parent, "input_layernorm"), (parent, "norm"))
    norm = next((getattr(owner, name) for owner, name in candidates if hasattr(owner, name)), None)
    if norm is None or (offset := compat.rms_norm_offset(norm)) is None or norm.weight.shape != (size,):
        return None
    return norm.weight.detach().float() + offset
