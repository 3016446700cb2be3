# SPDX-License-Identifier: Apache-2.0
"""What a GPU offers, as far as block sizes depend on it."""

from __future__ import annotations

from functools import lru_cache

import torch

# of an H100 or H200, where there is no GPU to ask: multiprocessors, and bytes of shared memory that a block may use and
# that a multiprocessor has
MULTIPROCESSORS = 132
SHARED_MEMORY, SHARED_OF_MULTIPROCESSOR = 227 << 10, 228 << 10


@lru_cache(maxsize=8)
def _of_gpu(name: str, otherwise: int) -> int:
    if not torch.cuda.is_available():
        return otherwise
    return getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), name)


def multiprocessors() -> int:
    """Return the multiprocessors of the current GPU, an H100's where there is none."""
    return _of_gpu("multi_processor_count", MULTIPROCESSORS)


def shared_memory() -> int:
    """Return the bytes of shared memory that a block may use on the current GPU, an H100's where there is none.

    163 KiB for compute capability 8.0, 99 KiB for 8.6, 8.9 and 12.0, 227 KiB for 9.0 and 10.0.
    """
    return _of_gpu("shared_memory_per_block_optin", SHARED_MEMORY)


def shared_memory_of_multiprocessor() -> int:
    """Return the bytes of shared memory of a multiprocessor of the current GPU, an H100's where there is none.

    164 KiB for compute capability 8.0, 100 KiB for 8.6, 8.9 and 12.0, 228 KiB for 9.0 and 10.0.
    """
    return _of_gpu("shared_memory_per_multiprocessor", SHARED_OF_MULTIPROCESSOR)
