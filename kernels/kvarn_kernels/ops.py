# SPDX-License-Identifier: Apache-2.0
"""The two entry points of a serving engine, and the one place that chooses how they run."""

from __future__ import annotations

import importlib.util
import logging
import os
from functools import lru_cache

import torch

from kvarn_kernels.cache import DecodeBatch, ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig

logger = logging.getLogger(__name__)

INTERPRET_ENV = "KVARN_CPU_FORM"
# a step of fewer new tokens runs the Triton kernel, if new * cached * query heads * head_dim is less than this: the
# time of its products is proportional to that, the time of the host is not. H100, one layer of 32/8 heads of 128, GPU
# time of Triton and of FlashInfer, with everything around it ("split" as in prefill_plan.py):
#     128 new tokens on  8,192 cached    201 and 209 us
#     128               32,768           566 and 654 us, split 372 us
#     128               98,304           about 1,700, split 957 us
# The host of that run needed 390 to 570 us a layer for Triton, about 600 for FlashInfer, 1,020 and 1,280 us where it
# was split; another host about 0.6 of it. A step waits for the slower of GPU and host: they meet at about 128 on 49,152
FLASHINFER_TOKENS, FLASHINFER_WORK = 256, 24 << 30


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


def extend_form(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    config: KVarNConfig,
    new_tokens: int = FLASHINFER_TOKENS,
    longest_prefix: int = 0,
    num_qo_heads: int = 0,
) -> str:
    """Return "torch", "triton" or "flashinfer": how an extend step of `new_tokens` tokens runs, all requests together.

    FlashInfer attends at the speed of a 16-bit cache, after the past of the step was written out in 16 bits. A step of
    few tokens runs the Triton kernel, which reads the records themselves and costs the host less, unless their prefix
    is so long that it multiplies too slowly. So does everything else that FlashInfer cannot do:
        - a canonical preset: its outputs have the same bits for a hit and a miss and for every chunking, and only the
          Triton kernel sums in an order that depends on the position alone;
        - another dtype than float16 and bfloat16, another head_dim than 64, 128 and 256, a host without FlashInfer
          (SGLang brings it).

    Called without `new_tokens` it tells whether any step can run on FlashInfer, so whether a workspace is needed.
    """
    form = attention_form(device)
    if form == "torch" or device.type != "cuda" or config.is_canonical:
        return form
    work = new_tokens * longest_prefix * num_qo_heads * head_dim
    if new_tokens < FLASHINFER_TOKENS and work < FLASHINFER_WORK:
        return form
    if dtype not in (torch.float16, torch.bfloat16) or head_dim not in (64, 128, 256) or not _has_flashinfer():
        return form
    return "flashinfer"


def describe(
    device: torch.device, dtype: torch.dtype, head_dim: int, config: KVarNConfig, *, flashinfer: bool = True
) -> str:
    """Return in words what encodes and attends, e.g. "encode by Triton, decode by Triton, extends by Triton".

    Args:
        dtype: the model's; flashinfer: whether its kernels could be built.
    """
    if attention_form(device) == "torch":
        return "encode, decode and extends by torch"
    from kvarn_kernels import decode_sm90, encode_cuda

    encode = f"CUDA C++ ({encode_cuda.SOURCE})" if encode_cuda.serves(device, dtype) else "Triton"
    decode = f"CUDA C++ ({decode_sm90.SOURCE})" if decode_sm90.serves(device, dtype) else "Triton"
    extends = "extends by Triton"
    if flashinfer and extend_form(device, dtype, head_dim, config) == "flashinfer":
        extends = "short extends by Triton, long extends by FlashInfer"
    return f"encode by {encode}, decode by {decode}, {extends}"


@lru_cache(maxsize=1)
def _has_flashinfer() -> bool:
    return importlib.util.find_spec("flashinfer") is not None


def plan_decode(batch: DecodeBatch, config: KVarNConfig) -> None:
    """Plan a decode step on the device: once before its first layer, outside of CUDA graphs."""
    if batch.workspace is not None:
        from kvarn_kernels import decode_plan

        decode_plan.plan_decode(batch, config)


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
        batch: the step, planned; `config`: the preset; `sm_scale`: factor of the scores.
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
    merge(out, batch, config)


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
    from kvarn_kernels.encode import encode_from_chunk
    from kvarn_kernels.rotate import rotate_chunk
    from kvarn_kernels.store import store_extend

    # FlashInfer attends in the model's frame
    rotated_q, rotated_k, rotated_v = rotate_chunk(q if batch.prefill is None else None, k, v)
    # the encoder and the attention read the ring as it was before this chunk, so the ring is written last
    encode_from_chunk(rotated_k, rotated_v, cache, batch, config)
    if batch.prefill is not None:
        from kvarn_kernels.prefill import prefill

        prefill(q, k, v, out, cache, batch, config, sm_scale)
    else:
        from kvarn_kernels.extend import extend

        assert rotated_q is not None
        extend(rotated_q, rotated_k, rotated_v, out, cache, batch, config, sm_scale)
    store_extend(rotated_k, rotated_v, cache, batch)
