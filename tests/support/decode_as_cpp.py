# SPDX-License-Identifier: Apache-2.0
"""The decode kernels in CUDA C++, built as C++ with cuda_on_cpu.h and run by the processor."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from kvarn_kernels.device import nvrtc
from kvarn_kernels.read import decode_sm90

SUPPORT = Path(__file__).parent
LAUNCHER = """
extern "C" const char* run(float* q, u8* records, int* rings, int* table, int* lens, int* starts, int* requests,
                    int* indptr, float* out, float* lse, int stride, float scale, int batch, int splits, int blocks,
                    unsigned seed) {
  failure.clear();
  copies.clear();
  schedule_seed = seed;
  delays.seed(seed);
  BEFORE_LAUNCH
  launch({splits, blocks, 1}, THREADS, [=] {
    KERNEL(q, records, rings, table, lens, starts, requests, indptr, out, lse, stride, __float_as_int(scale), batch);
  });
  return failure.c_str();
}
"""


class DecodeAsCpp:
    """Take the place of a module's `_compiled`.

    Args:
        module: decode_sm90, columns_sm90 or verify_sm90; folder: for what is built.
        before_launch: C++ that runs before every launch.

    Attributes:
        seed: of the schedule of warps and copies; 0: in turn.
    """

    def __init__(self, module: ModuleType, folder: Path, before_launch: str = "") -> None:
        self.seed = 0
        self._module, self._folder = module, folder
        self._launcher = f"#define KERNEL {module.KERNEL}\n#define BEFORE_LAUNCH {before_launch}\n{LAUNCHER}"
        self._parameters = nvrtc.parameters(module.SOURCE.read_text(), module.KERNEL)
        self._libraries: dict[tuple, ctypes.CDLL] = {}

    def _build(self, *form) -> ctypes.CDLL:
        if form not in self._libraries:
            path = self._folder / f"{len(self._libraries)}.cpp"
            defines = {"THREADS": decode_sm90.THREADS} | self._module.constants(*form)
            source = nvrtc.source(self._module.SOURCE, defines)
            path.write_text('#include "cuda_on_cpu.h"\n' + source + self._launcher)
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{SUPPORT}"]
            subprocess.run([*command, path, "-o", path.with_suffix(".so")], check=True, timeout=120)
            library = ctypes.CDLL(str(path.with_suffix(".so")))
            library.run.restype = ctypes.c_char_p
            self._libraries[form] = library
        return self._libraries[form]

    def compiled(self, *form) -> Callable[..., None]:
        """Return what launches the kernel of a form; the last argument is the device."""
        library = self._build(*form[:-1])

        def launch(grid, stream, **named) -> None:
            # a float as a float, tensors as pointers, in the order of LAUNCHER
            convert = {torch.Tensor: lambda x: ctypes.c_void_p(x.data_ptr()), float: ctypes.c_float, int: ctypes.c_int}
            arguments = [convert[type(named[name])](named[name]) for name in self._parameters]
            failure = library.run(*arguments, *grid[:2], self.seed)
            assert not failure, failure.decode()

        return launch
