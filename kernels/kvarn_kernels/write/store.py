# SPDX-License-Identifier: Apache-2.0
"""Store the newest tokens of a chunk in the ring of its request; those of a decode step are stored by `rotate`."""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.ring import ring_ptrs

# tokens of a program
BLOCK = 16


@triton.jit
def _store_kernel(
    k_ptr,  # [T, Hk, D] rotated
    v_ptr,
    exact_ptr,  # pages in the model's dtype, written
    ring_pages_ptr,  # [B, RING_PAGES] int32
    prefix_lens_ptr,  # [B] int32
    seq_lens_ptr,  # [B] int32
    qo_indptr_ptr,  # [B + 1] int32
    RING_LEN: tl.constexpr,  # tokens of a ring
    HK: tl.constexpr,
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RING_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b, head = tl.program_id(0), tl.program_id(2)
    seq_len = tl.load(seq_lens_ptr + b)
    prefix_len = tl.load(prefix_lens_ptr + b)
    # the newest RING_LEN tokens of the chunk, newest first
    back = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = seq_len - 1 - back
    mask = ((position >= prefix_len) & (back < RING_LEN))[:, None]
    position = tl.maximum(position, 0)
    d = tl.arange(0, D)
    source = ((tl.load(qo_indptr_ptr + b).to(tl.int64) + position - prefix_len) * HK + head)[:, None] * D + d[None, :]
    pages_ptr = ring_pages_ptr + b * RING_PAGES
    target = ring_ptrs(exact_ptr, pages_ptr, position, head, HK, D, K_BITS, V_BITS, RING_PAGES)[:, None] + d[None, :]
    tl.store(target, tl.load(k_ptr + source, mask=mask, other=0.0), mask=mask)
    tl.store(target + D, tl.load(v_ptr + source, mask=mask, other=0.0), mask=mask)


_store_launcher = TritonLauncher(_store_kernel)


def store_chunk(rotated: QKV, cache: LayerCache, batch: ExtendBatch, config: KVarNConfig) -> None:
    """Copy the newest tokens of each request's chunk, as many as its ring is long, into the ring.

    Args:
        rotated: k and v [T, Hk, D], contiguous, the model's dtype; cache: rings written; batch: the step.
    """
    ring_pages = batch.ring_pages.shape[1]
    tokens = config.exact_tokens(cache.head_dim, cache.dtype.itemsize)
    newest = batch.stored_tokens(tokens)
    if newest == 0:
        return
    _store_launcher(
        (batch.ring_pages.shape[0], -(-newest // BLOCK), cache.num_kv_heads),
        k_ptr=rotated.k,
        v_ptr=rotated.v,
        exact_ptr=cache.exact,
        ring_pages_ptr=batch.ring_pages,
        prefix_lens_ptr=batch.prefix_lens,
        seq_lens_ptr=batch.seq_lens,
        qo_indptr_ptr=batch.qo_indptr,
        RING_LEN=ring_pages * tokens,
        HK=cache.num_kv_heads,
        D=cache.head_dim,
        K_BITS=config.k_bits,
        V_BITS=config.v_bits,
        RING_PAGES=ring_pages,
        BLOCK=BLOCK,
        num_warps=4,
    )
