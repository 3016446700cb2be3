# SPDX-License-Identifier: Apache-2.0
"""The write path: rotate, store into the ring, encode full pages."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels.cache import DecodeBatch, ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.encode import encode_from_ring
from kvarn_kernels.launch import TritonLauncher
from kvarn_kernels.rotate import rotate_step


def store_decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: LayerCache, batch: DecodeBatch, config: KVarNConfig
) -> None:
    """Rotate one new token per request; q goes to the workspace, k and v to the ring, full pages to their records."""
    assert batch.workspace is not None, "the Triton form needs a DecodeWorkspace"
    rotate_step(q, k, v, batch.workspace.rotated_q, cache.ring_k, cache.ring_v, batch.rows, batch.seq_lens)
    encode_from_ring(cache, batch.rows, batch.seq_lens, batch.store_pages, config)


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


def store_extend(rotated_k: torch.Tensor, rotated_v: torch.Tensor, cache: LayerCache, batch: ExtendBatch) -> None:
    """Copy the newest ring_len tokens of each request's chunk into its ring.

    Args:
        rotated_k, rotated_v: [T, Hk, D] rotated, contiguous, the ring's dtype.
        cache: rings written; batch: the step.
    """
    ring_len = cache.ring_k.shape[1]
    newest = min(ring_len, max(batch.new_tokens, default=0))
    if newest == 0:
        return
    width = rotated_k.shape[1] * rotated_k.shape[2]
    block, block_width = 16, min(1024, triton.next_power_of_2(width))
    _store_launcher(
        (batch.rows.shape[0], triton.cdiv(newest, block), triton.cdiv(width, block_width)),
        rotated_k,
        rotated_v,
        cache.ring_k,
        cache.ring_v,
        batch.rows,
        batch.prefix_lens,
        batch.seq_lens,
        batch.qo_indptr,
        ring_len,
        width,
        block_width,
        block,
        num_warps=4,
    )
