# SPDX-License-Identifier: Apache-2.0
"""The two entry points of a serving engine, and the one place that chooses how they run."""

from __future__ import annotations

import logging
import os

import torch

from kvarn_kernels.cache import DecodeBatch, ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig

logger = logging.getLogger(__name__)

INTERPRET_ENV = "KVARN_CPU_FORM"


def attention_form(device: torch.device) -> str:
    """Return "triton" or "torch": which implementation runs on a device.

    CUDA runs the Triton kernels. A CPU runs the batched torch form (same record bytes, same rule), because
    interpreted kernels are hundreds of times slower; tests set KVARN_CPU_FORM=triton to interpret them all the same.
    """
    if device.type == "cuda":
        return "triton"
    form = os.environ.get(INTERPRET_ENV, "torch")
    if form not in ("torch", "triton"):
        raise ValueError(f"expected {INTERPRET_ENV} to be torch or triton, got {form!r}: unset it")
    return form


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cache: LayerCache,
    batch: DecodeBatch,
    config: KVarNConfig,
    sm_scale: float,
) -> None:
    """Store one new token per request, encode the page it fills, and attend.

    Args:
        q: [B, Hq, D] model dtype, after RoPE, not rotated.
        k, v: [B, Hk, D] likewise.
        out: [B, Hq, D] model dtype, written.
        cache: memory of this layer; the ring is written, and the records of full pages.
        batch: the step; `config`: the preset; `sm_scale`: factor of the scores.
    """
    if attention_form(q.device) == "torch":
        from kvarn_kernels import torch_form

        torch_form.decode_attention(q, k, v, out, cache, batch, config, sm_scale)
        return
    from kvarn_kernels.decode import decode
    from kvarn_kernels.merge import merge
    from kvarn_kernels.store import store_decode

    store_decode(q, k, v, cache, batch, config)
    decode(cache, batch, config, q.shape[1], k.shape[1], sm_scale)
    merge(out, batch, config, k.shape[1])


def extend_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sm_scale: float,
) -> None:
    """Store the new tokens of each request, encode every page they fill, and attend by the position rule.

    Args:
        q: [T, Hq, D] model dtype, after RoPE, not rotated; request b owns rows qo_indptr[b] .. qo_indptr[b + 1].
        k, v: [T, Hk, D] likewise.
        out: [T, Hq, D] model dtype, written.
        cache, batch, config, sm_scale: as in `decode_attention`.
    """
    if attention_form(q.device) == "torch":
        from kvarn_kernels import torch_form

        torch_form.extend_attention(q, k, v, out, cache, batch, config, sm_scale)
        return
    from kvarn_kernels.extend import extend
    from kvarn_kernels.store import encode_extend, rotate_extend, store_extend

    rotated_q, rotated_k, rotated_v = rotate_extend(q, k, v)
    # the encoder and the attention read the ring as it was before this chunk, so the ring is written last
    encode_extend(rotated_k, rotated_v, cache, batch, config)
    extend(rotated_q, rotated_k, rotated_v, out, cache, batch, config, sm_scale)
    store_extend(rotated_k, rotated_v, cache, batch)
