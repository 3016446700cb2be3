# SPDX-License-Identifier: Apache-2.0
"""Compile CUDA C++ kernels with the NVRTC that torch brings; no nvcc is needed."""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from kvarn_kernels.device.launch import CudaLauncher

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parents[1]


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Whether this torch can compile CUDA C++; where it cannot, a line in the log says so once."""
    if hasattr(torch.cuda, "_compile_kernel"):
        return True
    logger.warning("this torch has no torch.cuda._compile_kernel: the portable Triton kernels run instead")
    return False


def source(path: Path, defines: dict[str, Any]) -> str:
    """Return a CUDA source with its constants in front and the headers of this package in their places, each once."""
    included: set[str] = set()

    def expanded(text: str) -> str:
        def header(found: re.Match[str]) -> str:
            name = found[1]
            if name in included:
                return ""
            included.add(name)
            return expanded((PACKAGE / name).read_text())

        return re.sub(r'^#include "(.+\.cuh)"\n', header, text, flags=re.MULTILINE)

    lines = [f"#define {key} {value}" for key, value in defines.items()]
    return "\n".join([*lines, expanded(path.read_text())])


def parameters(text: str, kernel: str) -> tuple[str, ...]:
    """Return the names of the parameters of an extern "C" kernel of a source.

    Raises:
        ValueError: the source defines no such kernel.
    """
    found = re.search(rf"__global__[^;{{]*?\b{kernel}\(([^)]*)\)", text)
    if found is None:
        raise ValueError(f"expected a kernel {kernel}, the source defines none")
    return tuple(re.findall(r"(\w+)\s*(?:,|$)", found[1]))


def compile_kernel(
    path: Path,
    kernel: str,
    defines: dict[str, Any],
    device: int,
    threads: int,
    shared_bytes: int = 0,
    architecture: str = "",
) -> CudaLauncher:
    """Return a launchable kernel of a CUDA source for a device; takes seconds.

    Args:
        threads: of a block; shared_bytes: dynamic shared memory of a block.
        architecture: to compile for, such as "90a"; the device's own by default.
    """
    major, minor = torch.cuda.get_device_capability(device)
    text = source(path, defines)
    loaded = torch.cuda._compile_kernel(text, kernel, compute_capability=architecture or f"{major}{minor}")
    loaded.set_shared_memory_config(shared_bytes)
    library = torch.cuda._utils._get_gpu_runtime_library()
    return CudaLauncher(loaded, library, parameters(text, kernel), threads, shared_bytes)
