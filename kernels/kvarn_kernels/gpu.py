# SPDX-License-Identifier: Apache-2.0
"""What a GPU offers, as far as block sizes depend on it."""

from __future__ import annotations

from functools import lru_cache

import torch

# of an H100 or H200, where there is no GPU to ask: multiprocessors, and bytes of shared memory that a block may use
MULTIPROCESSORS = 132
SHARED_MEMORY = 227 << 10


@lru_cache(maxsize=1)
def multiprocessors() -> int:
    """Return the multiprocessors of the current GPU, an H100's where there is none."""
    if not torch.cuda.is_available():
        return MULTIPROCESSORS
    return torch.cuda.get_device_properties(torch.cuda.current_device()).multi_processor_count


@lru_cache(maxsize=1)
def shared_memory() -> int:
    """Return the bytes of shared memory that a block may use on the current GPU, an H100's where there is none.

    163 KiB for compute capability 8.0, 99 KiB for 8.6, 8.9 and 12.0, 227 KiB for 9.0 and 10.0.
    """
    if not torch.cuda.is_available():
        return SHARED_MEMORY
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    # torch's type stub lacks it
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
