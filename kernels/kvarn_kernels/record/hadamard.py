# SPDX-License-Identifier: Apache-2.0
"""The rotation x H in kernels: one matrix product with exact +-1 operands, then the factor 1 / sqrt(D)."""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from kvarn_kernels.device.numerics import cast, dot


@lru_cache(maxsize=8)
def sylvester(head_dim: int) -> torch.Tensor:
    """Return Sylvester's Hadamard matrix, float32 [D, D] of +-1 on the CPU; H is this divided by sqrt(D)."""
    signs = torch.ones(1, 1)
    while signs.shape[0] < head_dim:
        signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)], 0)
    return signs


@lru_cache(maxsize=16)
def hadamard_signs(head_dim: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return `sylvester` in a dtype on a device; cached, so that CUDA graphs find it where it was."""
    return sylvester(head_dim).to(device=device, dtype=dtype)


@triton.jit
def rotate_block(x, signs_ptr, begin, D: tl.constexpr, COLS: tl.constexpr):
    """Return the channels begin .. begin + COLS - 1 of x H in float32.

    x [ROWS, D] is in a 16-bit dtype (exact products, float32 sums) or float32.
    """
    d, c = tl.arange(0, D), begin + tl.arange(0, COLS)
    signs = tl.load(signs_ptr + d[:, None] * D + c[None, :])  # [D, COLS]
    SCALE: tl.constexpr = 1.0 / (D**0.5)
    return dot(x, signs, tl.zeros([x.shape[0], COLS], tl.float32)) * SCALE


@triton.jit
def unrotate(x, signs_ptr, begin, D: tl.constexpr, COLS: tl.constexpr):
    """Return the channels begin .. begin + COLS - 1 of x H for x [M, D] float32, to about 2^-17 of the row's norm.

    x is split into two bfloat16 terms, each multiplied exactly by the signs (bfloat16).
    """
    d, c = tl.arange(0, D), begin + tl.arange(0, COLS)
    signs = tl.load(signs_ptr + d[:, None] * D + c[None, :])  # [D, COLS]
    high = cast(x, tl.bfloat16)
    low = cast(x - high.to(tl.float32), tl.bfloat16)
    SCALE: tl.constexpr = 1.0 / (D**0.5)
    return dot(low, signs, dot(high, signs, tl.zeros([x.shape[0], COLS], tl.float32))) * SCALE
