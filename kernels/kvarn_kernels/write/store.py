# SPDX-License-Identifier: Apache-2.0
"""Store new tokens in the rings: those of a decode step as they are rotated, the newest ones of a chunk."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.write.rotate import rotate_into


def store_step(new: QKV, rotated_q: torch.Tensor, cache: LayerCache, batch: DecodeBatch) -> None:
    """Rotate one new token per request; k and v go to their slots of the rings, q to rotated_q.

    Args:
        rotated_q: float32 [at least B, Hq, D], contiguous, written.
    """
    rotate_into(QKV(rotated_q, cache.ring_k, cache.ring_v), new, batch.rows, batch.seq_lens)


@triton.jit
def _store_kernel(
    k_ptr,  # [T, Hk, D] rotated
    v_ptr,
    ring_k_ptr,  # [R, RING_LEN, Hk, D], written
    ring_v_ptr,
    rows_ptr,  # [B] int64
    prefix_lens_ptr,  # [B] int32
    seq_lens_ptr,  # [B] int32
    qo_indptr_ptr,  # [B + 1] int32
    RING_LEN: tl.constexpr,
    WIDTH: tl.constexpr,  # Hk * D
    BLOCK_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0)
    seq_len = tl.load(seq_lens_ptr + b)
    prefix_len = tl.load(prefix_lens_ptr + b)
    # the newest ring_len tokens of the chunk, newest first
    position = seq_len - 1 - (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))
    valid = position >= prefix_len
    token = tl.load(qo_indptr_ptr + b).to(tl.int64) + position - prefix_len
    slot = tl.load(rows_ptr + b) * RING_LEN + tl.maximum(position, 0) % RING_LEN
    w = tl.program_id(2) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    mask = valid[:, None] & (w < WIDTH)[None, :]
    source = token[:, None] * WIDTH + w[None, :]
    target = slot[:, None] * WIDTH + w[None, :]
    tl.store(ring_k_ptr + target, tl.load(k_ptr + source, mask=mask, other=0.0), mask=mask)
    tl.store(ring_v_ptr + target, tl.load(v_ptr + source, mask=mask, other=0.0), mask=mask)


_store_launcher = TritonLauncher(_store_kernel)


def store_chunk(rotated: QKV, cache: LayerCache, batch: ExtendBatch) -> None:
    """Copy the newest ring_len tokens of each request's chunk into its ring.

    Args:
        rotated: k and v [T, Hk, D], contiguous, the ring's dtype; cache: rings written; batch: the step.
    """
    newest = min(cache.ring_len, max(batch.new_tokens, default=0))
    if newest == 0:
        return
    width = cache.num_kv_heads * cache.head_dim
    block, block_width = 16, min(1024, triton.next_power_of_2(width))
    _store_launcher(
        (batch.rows.shape[0], triton.cdiv(newest, block), triton.cdiv(width, block_width)),
        k_ptr=rotated.k,
        v_ptr=rotated.v,
        ring_k_ptr=cache.ring_k,
        ring_v_ptr=cache.ring_v,
        rows_ptr=batch.rows,
        prefix_lens_ptr=batch.prefix_lens,
        seq_lens_ptr=batch.seq_lens,
        qo_indptr_ptr=batch.qo_indptr,
        RING_LEN=cache.ring_len,
        WIDTH=width,
        BLOCK_WIDTH=block_width,
        BLOCK=block,
        num_warps=4,
    )
