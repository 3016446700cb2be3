# SPDX-License-Identifier: Apache-2.0
"""What a GPU offers, as far as the choice of kernels and their block sizes depend on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Gpu:
    """Describe a GPU.

    Attributes:
        capability: compute capability for which CUDA C++ can be compiled, (0, 0) where none can.
        multiprocessors: how many it has.
        shared_memory: bytes that a block may use: 163 KiB for capability 8.0, 99 KiB for 8.6, 8.9 and 12.0, 227 KiB
            for 9.0 and 10.0.
        shared_of_multiprocessor: bytes that the blocks of a multiprocessor share, 1 KiB more than a block may use.
        memory: bytes in all.
    """

    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int
    shared_of_multiprocessor: int
    memory: int


# an H100, also where there is no GPU to ask; the interpreter then takes its block sizes
H100 = Gpu((9, 0), 132, 227 << 10, 228 << 10, 79 << 30)
NO_GPU = replace(H100, capability=(0, 0))


@lru_cache(maxsize=8)
def gpu_of(device: torch.device) -> Gpu:
    """Return what a device offers; `NO_GPU` for one that is not a GPU."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return NO_GPU
    properties = torch.cuda.get_device_properties(device)
    return Gpu(
        capability=(0, 0) if torch.version.hip else torch.cuda.get_device_capability(device),
        multiprocessors=properties.multi_processor_count,
        shared_memory=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
        shared_of_multiprocessor=properties.shared_memory_per_multiprocessor,
        memory=properties.total_memory,
    )
