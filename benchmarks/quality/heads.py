# SPDX-License-Identifier: Apache-2.0
"""A model of head_dim 64 with heads of 128 or 256 channels, without changing what it computes.

Each wide head holds the keys (and values) of its own head and of the next ones; a query is zero on the channels of the
others, so that its scores are the same, and the output is read from its own channels.

This shows what the records, codes and kernels of that width do to real keys and values: the Hadamard matrix mixes all
channels of the wide head, so the error of the neighbours reaches the channels that count. It does not show a model that
was trained with such heads, whose channels depend on each other in other ways, and a wide head here is no less
balanced than the heads it is made of are among each other.
"""

from __future__ import annotations

import torch

from benchmarks.quality.frames import Frame, Inputs


def widened(head_dim: int, width: int) -> Frame:
    """Return the frame that packs the heads of a model into heads of `width` channels.

    Args:
        head_dim: channels of the model's heads.
        width: a multiple of head_dim.

    Raises:
        ValueError: width is no multiple of head_dim.
    """
    if width % head_dim:
        raise ValueError(f"expected a multiple of the model's head_dim {head_dim}, got {width}: change --head-dim")
    copies = width // head_dim

    def pack(x: torch.Tensor) -> torch.Tensor:
        """Return [T, Hk, width]: head p beside heads p + 1, p + 2, ... in a circle."""
        return torch.cat([x.roll(-n, 1) for n in range(copies)], -1)

    def enter(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Inputs:
        return torch.nn.functional.pad(q, (0, width - head_dim)), pack(k), pack(v)

    return Frame(f"heads of {width}", enter, lambda out: out[..., :head_dim], head_dim=width)
