# SPDX-License-Identifier: Apache-2.0
"""Kernels of CUDA C++ built for this machine's processor, and launched by the names of their parameters."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from kvarn_kernels.device import nvrtc

SUPPORT = Path(__file__).parent
# kernel, parameters with types, names of parameters, threads of a block
LAUNCHER = """
extern "C" void run({types}, int grid_x, int grid_y, int grid_z) {{
  launch({{grid_x, grid_y, grid_z}}, {threads}, [=] {{ {kernel}({names}); }});
}}
"""


def parameter_types(source: str, kernel: str) -> str:
    """Return the parameters of a kernel as its source declares them."""
    found = re.search(rf"\b{kernel}\(([^)]*)\)", source)
    assert found, kernel
    return found[1]


def build(folder: Path, path: Path, kernel: str, defines: dict[str, Any], threads: int) -> Callable[..., None]:
    """Return what launches a kernel as a `CudaLauncher` does, a coroutine for each thread."""
    source = nvrtc.source(path, defines)
    names = nvrtc.parameters(source, kernel)
    folder.mkdir(exist_ok=True)
    target = folder / f"{kernel}-{len(list(folder.iterdir()))}.cpp"
    text = LAUNCHER.format(
        types=parameter_types(source, kernel), names=", ".join(names), kernel=kernel, threads=threads
    )
    target.write_text('#include "cuda_on_cpu.h"\n' + source + text)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{SUPPORT}"]
    subprocess.run([*command, target, "-o", target.with_suffix(".so")], check=True, timeout=120)
    library = ctypes.CDLL(str(target.with_suffix(".so")))

    def launch(grid: tuple[int, int, int], stream: int, **named: torch.Tensor | int) -> None:
        pointers = {n: ctypes.c_void_p(x.data_ptr()) for n, x in named.items() if isinstance(x, torch.Tensor)}
        assert set(named) == set(names)
        library.run(*((named | pointers)[name] for name in names), *grid)

    return launch
