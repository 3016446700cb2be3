# SPDX-License-Identifier: Apache-2.0
"""The rotation: Sylvester's Hadamard matrix, orthonormal, symmetric, its own inverse."""

from __future__ import annotations

import torch

from kvarn_kernels.record.hadamard import sylvester


def hadamard(head_dim: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Return H = Sylvester(head_dim) / sqrt(head_dim), float32 [D, D]; H = H^T and H H = I.

    Source: arXiv 2606.03458, appendix A (natural order, no random signs).

    Raises:
        ValueError: head_dim is not a power of two.
    """
    if head_dim < 1 or head_dim & (head_dim - 1):
        raise ValueError(f"expected head_dim to be a power of two, got {head_dim}: this model cannot use KVarN")
    return (sylvester(head_dim) / head_dim**0.5).to(device)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """Rotate the last dimension of x: x H, float32 [..., D].

    The signs are summed in float64, so that the result depends neither on the order of the sum nor on how many rows
    are rotated together; the sum is rounded to float32 and scaled by 1 / sqrt(D) last, as in the kernel.
    """
    head_dim = x.shape[-1]
    return (x.double() @ sylvester(head_dim).to(x.device).double()).float() * (1.0 / head_dim**0.5)
