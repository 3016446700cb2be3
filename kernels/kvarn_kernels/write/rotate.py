# SPDX-License-Identifier: Apache-2.0
"""Rotate the new tokens of a step: q H, k H and v H in one launch."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import QKV, DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.launch import TritonLauncher
from kvarn_kernels.device.numerics import cast
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.hadamard import hadamard_signs, rotate_block
from kvarn_kernels.record.ring import ring_ptrs

# rows of a program in a decode step and in a chunk. A program reads the sign matrix (32 KiB at D = 128) once. H100,
# 8,192 tokens of 2 x 8 heads: 64 rows took 31 us, 32 rows 40, 128 rows 38
STEP_ROWS, CHUNK_ROWS = 32, 64


@triton.jit
def _rotate_rows(
    x_ptr, out_ptr, signs_ptr, ring_pages_ptr, seq_lens_ptr, block, num_rows, stride_x_token, stride_x_head,
    H: tl.constexpr, D: tl.constexpr, K_BITS: tl.constexpr, V_BITS: tl.constexpr, RING_PAGES: tl.constexpr,
    RING_OFFSET: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    r = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.arange(0, D)
    valid = r < num_rows
    token, head = r // H, r % H
    x = tl.load(
        x_ptr + (token * stride_x_token + head * stride_x_head)[:, None] + d[None, :], mask=valid[:, None], other=0.0
    )
    if RING_PAGES > 0:
        # a row beyond the last one reads the pages of the first request and writes nothing
        request = tl.where(valid, token, 0)
        position = tl.load(seq_lens_ptr + request) - 1
        pages_ptr = ring_pages_ptr + request * RING_PAGES
        out = ring_ptrs(out_ptr, pages_ptr, position, head, H, D, K_BITS, V_BITS, RING_PAGES) + RING_OFFSET
    else:
        out = out_ptr + r * D
    # the sign matrix of 256 channels takes 128 KiB, more shared memory than most GPUs have; half of it is enough
    COLS: tl.constexpr = min(D, 128)
    for begin in tl.static_range(0, D, COLS):
        rotated = rotate_block(x, signs_ptr, begin, D, COLS)
        c = begin + tl.arange(0, COLS)
        tl.store(out[:, None] + c[None, :], cast(rotated, out_ptr.dtype.element_ty), mask=valid[:, None])


@triton.jit(do_not_specialize=["num_tokens"])
def _rotate_kernel(
    q_ptr,  # [T, Hq, D] model dtype; not read where HQ is 0
    k_ptr,  # [T, Hk, D]
    v_ptr,  # [T, Hk, D]
    rotated_q_ptr,  # [T, Hq, D] float32, written
    k_out_ptr,  # [T, Hk, D] model dtype, written; pages in the model's dtype if RING_PAGES is not 0
    v_out_ptr,
    signs_ptr,  # [D, D] model dtype, +-1
    ring_pages_ptr,  # [T, RING_PAGES] int32
    seq_lens_ptr,  # [T] int32
    num_tokens,
    stride_q_token,
    stride_q_head,
    stride_k_token,
    stride_k_head,
    stride_v_token,
    stride_v_head,
    HQ: tl.constexpr,
    HK: tl.constexpr,
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    RING_PAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block, tensor = tl.program_id(0), tl.program_id(1)
    if tensor == 2:
        if HQ > 0:
            _rotate_rows(
                q_ptr, rotated_q_ptr, signs_ptr, ring_pages_ptr, seq_lens_ptr, block, num_tokens * HQ,
                stride_q_token, stride_q_head, HQ, D, K_BITS, V_BITS, 0, 0, BLOCK
            )  # fmt: skip
    elif block * BLOCK < num_tokens * HK:
        if tensor == 0:
            _rotate_rows(
                k_ptr, k_out_ptr, signs_ptr, ring_pages_ptr, seq_lens_ptr, block, num_tokens * HK,
                stride_k_token, stride_k_head, HK, D, K_BITS, V_BITS, RING_PAGES, 0, BLOCK
            )  # fmt: skip
        else:
            _rotate_rows(
                v_ptr, v_out_ptr, signs_ptr, ring_pages_ptr, seq_lens_ptr, block, num_tokens * HK,
                stride_v_token, stride_v_head, HK, D, K_BITS, V_BITS, RING_PAGES, D, BLOCK
            )  # fmt: skip


_rotate_launcher = TritonLauncher(_rotate_kernel)


def _launch(new: QKV, out: QKV, with_q: bool, ring: dict[str, Any]) -> None:
    """Rotate T tokens in one launch; ring: arguments about rings, empty if k and v go to [T, Hk, D]."""
    q, k, v = new
    tokens, num_kv_heads, head_dim = k.shape
    if tokens == 0:
        return
    num_qo_heads = q.shape[1] if with_q else 0
    block = STEP_ROWS if ring else CHUNK_ROWS
    no_ring = {"ring_pages_ptr": None, "seq_lens_ptr": None, "K_BITS": 0, "V_BITS": 0, "RING_PAGES": 0}
    _rotate_launcher(
        (-(-tokens * max(num_qo_heads, num_kv_heads) // block), 3 if with_q else 2, 1),
        q_ptr=q if with_q else None,
        k_ptr=k,
        v_ptr=v,
        rotated_q_ptr=out.q if with_q else None,
        k_out_ptr=out.k,
        v_out_ptr=out.v,
        signs_ptr=hadamard_signs(head_dim, k.dtype, k.device),
        num_tokens=tokens,
        stride_q_token=q.stride(0) if with_q else 0,
        stride_q_head=q.stride(1) if with_q else 0,
        stride_k_token=k.stride(0),
        stride_k_head=k.stride(1),
        stride_v_token=v.stride(0),
        stride_v_head=v.stride(1),
        HQ=num_qo_heads,
        HK=num_kv_heads,
        D=head_dim,
        BLOCK=block,
        num_warps=4,
        **(ring or no_ring),
    )


def chunk_like(new: QKV, with_q: bool) -> QKV:
    """Return where `rotate_chunk` writes: q in float32, empty if it is not wanted, k and v in the model's dtype."""
    q = torch.empty(new.q.shape if with_q else 0, dtype=torch.float32, device=new.q.device)
    return QKV(q, *(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (new.k, new.v)))


def rotate_chunk(new: QKV, *, with_q: bool = True, out: QKV | None = None) -> QKV:
    """Return q H in float32 and k H, v H in the model's dtype, all contiguous; an empty q where it is not wanted.

    Args:
        out: written and returned, from `chunk_like` for as many tokens; a new one without it.
    """
    rotated = chunk_like(new, with_q) if out is None else out
    _launch(new, rotated, with_q, {})
    return rotated


def rotate_to_rings(
    new: QKV, rotated_q: torch.Tensor, cache: LayerCache, batch: DecodeBatch, config: KVarNConfig
) -> None:
    """Rotate one new token per request; k and v go to their slots of the rings, q to rotated_q.

    Args:
        rotated_q: float32 [at least B, Hq, D], contiguous, written.
    """
    ring = {
        "ring_pages_ptr": batch.ring_pages,
        "seq_lens_ptr": batch.seq_lens,
        "K_BITS": config.k_bits,
        "V_BITS": config.v_bits,
        "RING_PAGES": batch.ring_pages.shape[1],
    }
    _launch(new, QKV(rotated_q, cache.exact, cache.exact), True, ring)
