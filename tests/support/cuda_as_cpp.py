# SPDX-License-Identifier: Apache-2.0
"""Kernels of CUDA C++ built for this machine's processor, and launched by the names of their parameters."""

from __future__ import annotations

import ctypes
import re
import struct
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from kvarn_kernels.device import nvrtc

SUPPORT = Path(__file__).parent
# kernel, parameters with types, names of parameters, threads of a block
LAUNCHER = """
extern "C" const char* run({types}, int grid_x, int grid_y, int grid_z, unsigned seed) {{
  failure.clear();
  schedule_seed = seed;
  {before}
  launch({{grid_x, grid_y, grid_z}}, {threads}, [=] {{ {kernel}({names}); }});
  return failure.c_str();
}}
"""


def parameter_types(source: str, kernel: str) -> str:
    """Return the parameters of a kernel as its source declares them."""
    found = re.search(rf"\b{kernel}\(([^)]*)\)", source)
    assert found, kernel
    return found[1]


def build(
    folder: Path, path: Path, kernel: str, defines: dict[str, Any], threads: int, before: str = ""
) -> Callable[..., None]:
    """Return what launches a kernel as a `CudaLauncher` does, a coroutine for each thread; see `start_beside`, too.

    Args:
        before: C++ that runs before every launch, where `seed` is that of the launch: an argument besides those of the
            kernel, of the schedule of warps and copies; 0, in turn, without it.
    """
    source = nvrtc.source(path, defines)
    names = nvrtc.parameters(source, kernel)
    folder.mkdir(exist_ok=True)
    target = folder / f"{kernel}-{len(list(folder.iterdir()))}.cpp"
    text = LAUNCHER.format(
        types=parameter_types(source, kernel),
        names=", ".join(names),
        kernel=kernel,
        threads=threads,
        before=before,
    )
    target.write_text('#include "cuda_on_cpu.h"\n' + source + text)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{SUPPORT}"]
    subprocess.run([*command, target, "-o", target.with_suffix(".so")], check=True, timeout=120)
    library = ctypes.CDLL(str(target.with_suffix(".so")))
    library.run.restype = ctypes.c_char_p

    def argument(x: torch.Tensor | int | float) -> Any:
        if isinstance(x, torch.Tensor):
            return ctypes.c_void_p(x.data_ptr())
        # the kernel gets the bits of a float; 0 can be no address, of 64 bits
        return ctypes.c_int64(struct.unpack("<i", struct.pack("<f", x))[0] if isinstance(x, float) else x)

    def launch(
        grid: tuple[int, int, int],
        stream: int,
        seed: int = 0,
        early_start: bool = False,
        **named: torch.Tensor | int | float,
    ) -> None:
        assert set(named) == set(names)
        failure = library.run(*(argument(named[name]) for name in names), *grid, seed)
        assert not failure, failure.decode()

    launch.library = library
    return launch


@contextmanager
def start_beside(launch: Callable[..., None], memory: torch.Tensor, after: torch.Tensor) -> Iterator[None]:
    """Let a kernel of `build` start while another one writes to memory, which no block sees before it waits for it.

    Args:
        memory: what it is before, uint8; after: what it is when the other kernel has ended.
    """
    before, after = memory.clone(), after.contiguous()
    address = (ctypes.c_void_p(x.data_ptr()) for x in (memory, before, after))
    launch.library.start_beside(*address, ctypes.c_long(memory.nbytes))
    try:
        yield
    finally:
        launch.library.start_beside(None, None, None, ctypes.c_long(0))
