# SPDX-License-Identifier: Apache-2.0
"""Memory that SGLang asks to be page-locked, as ordinary memory: torch built for CUDA finds no driver on a CPU."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch


def install() -> None:
    """Let torch make no page-locked memory, for good."""
    torch.tensor, torch.zeros = _unpinned(torch.tensor), _unpinned(torch.zeros)
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self


def _unpinned(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(make)
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made
