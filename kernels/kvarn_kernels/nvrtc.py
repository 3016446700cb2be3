# SPDX-License-Identifier: Apache-2.0
"""Compile the CUDA C++ kernels of this package with the NVRTC that torch brings; no nvcc is needed."""

from __future__ import annotations

import logging
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)


@lru_cache(maxsize=8)
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability for which kernels can be compiled and launched, (0, 0) where they cannot."""
    if device.type != "cuda" or torch.version.hip:
        return 0, 0
    if not hasattr(torch.cuda, "_compile_kernel"):
        logger.warning("this torch has no torch.cuda._compile_kernel: the portable Triton kernels run instead")
        return 0, 0
    return torch.cuda.get_device_capability(device)


def source(name: str, defines: dict[str, Any]) -> str:
    """Return the CUDA source of this package's file `name` with its constants in front."""
    lines = [f"#define {key} {value}" for key, value in defines.items()]
    return "\n".join([*lines, (Path(__file__).parent / name).read_text()])


def compile_kernel(name: str, kernel: str, defines: dict[str, Any], device: int) -> Any:
    """Return a launchable kernel of file `name` for a device; takes about a second."""
    major, minor = torch.cuda.get_device_capability(device)
    return torch.cuda._compile_kernel(source(name, defines), kernel, compute_capability=f"{major}{minor}")
