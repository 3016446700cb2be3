# SPDX-License-Identifier: Apache-2.0
"""Merge the splits of a short extend step and store its newest tokens, in one launch of CUDA C++ (finish_short.cu): the
contracts of merge.py and store.py. The host launches less, and neither waits for the other."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.launch import CudaLauncher, current_stream
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.cuda_constants import format_constants

SOURCE, KERNEL = Path(__file__).with_name("finish_short.cu"), "kvarn_finish_short"
# of a block, each with a row at a time
WARPS = 8
# a lane has the weight of a split
MAX_SPLITS = 32
# of attention sinks
SINKS = {None: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


def constants(
    config: KVarNConfig,
    head_dim: int,
    num_qo_heads: int,
    num_kv_heads: int,
    is_bf16: bool,
    ring_pages: int,
    sinks: torch.dtype | None,
) -> dict[str, Any]:
    """Return the constants of finish_short.cu; sinks: of attention sinks, None without."""
    form = format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages)
    return form | {"HQ": num_qo_heads, "WARPS": WARPS, "SINKS": SINKS[sinks]}


@lru_cache(maxsize=32)
def _compiled(
    config: KVarNConfig,
    head_dim: int,
    num_qo_heads: int,
    num_kv_heads: int,
    is_bf16: bool,
    ring_pages: int,
    sinks: torch.dtype | None,
    device: int,
) -> CudaLauncher:
    defines = constants(config, head_dim, num_qo_heads, num_kv_heads, is_bf16, ring_pages, sinks)
    return nvrtc.compile_kernel(SOURCE, KERNEL, defines, device, 32 * WARPS)


def finish(
    out: torch.Tensor,
    partial_out: torch.Tensor,
    partial_lse: torch.Tensor,
    rotated: QKV,
    cache: LayerCache,
    batch: ExtendBatch,
    config: KVarNConfig,
    sinks: torch.Tensor | None = None,
) -> None:
    """Write out = (sum of the splits) H, and the newest tokens of each request into its ring.

    It may start before what was queued last on the stream has ended, and waits for it (device/early_start.cuh).

    Args:
        out: [at least T, Hq, D] model dtype, contiguous, the first T written.
        partial_out, partial_lse: of `extend_sm90.attend`, with at most MAX_SPLITS splits.
        rotated: k and v [T, Hk, D], contiguous, the model's dtype; cache: rings written; batch: the step.
        sinks: attention sinks [Hq], float32 or of 16 bits.
    """
    tokens, splits, heads, head_dim = partial_out.shape
    ring_pages, requests, device = batch.ring_pages.shape[1], len(batch.new_tokens), cache.records.device
    newest = batch.stored_tokens(config.exact_tokens(head_dim, cache.dtype.itemsize))
    form = (config, head_dim, heads, cache.num_kv_heads, cache.dtype == torch.bfloat16, ring_pages)
    units = tokens * heads + requests * newest * cache.num_kv_heads
    _compiled(*form, None if sinks is None else sinks.dtype, device.index or 0)(
        (-(-units // WARPS), 1, 1),
        current_stream(device),
        early_start=True,
        results=partial_out,
        lse=partial_lse,
        sinks=0 if sinks is None else sinks,
        out=out,
        k=rotated.k,
        v=rotated.v,
        records=cache.records,
        ring_pages=batch.ring_pages,
        prefix_lens=batch.prefix_lens,
        seq_lens=batch.seq_lens,
        qo_indptr=batch.qo_indptr,
        splits=splits,
        rows=tokens * heads,
        newest=newest,
        requests=requests,
    )
