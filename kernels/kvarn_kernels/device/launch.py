# SPDX-License-Identifier: Apache-2.0
"""Launch kernels with little work on the host, which a prefill step of few tokens waits for.

An extend step launches a handful of kernels in each layer, outside of CUDA graphs. On the host of an H100, calling a
Triton kernel with 20 arguments took 22 us, calling what it had compiled to took 12 us, and torch's loader for CUDA C++
took 47 us. With this module a layer of prefill took 220 to 315 us of the host instead of 550 to 615.

Arguments are given by the names of the kernel's parameters: two pointers of one dtype that are swapped would be wrong
silently.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple]:
    """Return what picks values by name; `itemgetter` alone returns a single one bare."""
    return itemgetter(*names) if len(names) > 1 else lambda named: tuple(named[name] for name in names)


class _Arguments:
    """Put named arguments into the order of a kernel's parameters."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._get = _getter(names)

    def __call__(self, named: dict[str, Any]) -> tuple:
        if len(named) != len(self._names):
            raise TypeError(f"expected the arguments {', '.join(self._names)}, got {', '.join(named)}")
        return self._get(named)


class TritonLauncher:
    """Call a Triton kernel; what it compiled to is found again by the properties that Triton specialises for.

    Those are dtype, alignment and device of a tensor, and the value of an integer that is a constant or a stride.
    Integers that the kernel does not specialise for are passed on. Under the interpreter nothing is kept. Parameters
    that take tensors, or None, have names that end with _ptr.
    """

    def __init__(self, kernel: Any) -> None:
        self._kernel = kernel
        self._compiled: dict[tuple, Any] = {}
        names, params = tuple(kernel.arg_names), getattr(kernel, "params", ())
        free = {name for name, param in zip(names, params, strict=False) if param.do_not_specialize}
        pointers = tuple(name for name in names if name.endswith("_ptr"))
        self._in_order = _Arguments(names)
        self._pointers = _getter(pointers)
        self._others = _getter(tuple(name for name in names if name not in free and name not in pointers))

    def __call__(self, grid: tuple[int, int, int], *, num_warps: int, **named: Any) -> None:
        """Launch on the current stream; `named` are the kernel's parameters, constants included."""
        args = self._in_order(named)
        tensors = [x if x is None else (x.dtype, x.data_ptr() & 15, x.get_device()) for x in self._pointers(named)]
        key = (num_warps, *tensors, *self._others(named))
        compiled = self._compiled.get(key)
        if compiled is not None:
            compiled[grid](*args)
            return
        compiled = self._kernel[grid](*args, num_warps=num_warps)
        # the interpreter returns nothing
        if compiled is not None:
            self._compiled[key] = compiled


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute of cuda.h, with an int as its value."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig of cuda.h."""

    _fields_ = (
        *((name, ctypes.c_uint) for name in ("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z", "shared")),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION, and the compute capability from which kernels obey it
_EARLY_START, EARLY_START_SINCE = ctypes.pointer(_Attribute(id=6, value=1)), (9, 0)


class CudaLauncher:
    """Call a kernel of a CUDA C++ module; its arguments are packed in place, so one thread at a time may launch it.

    Args:
        loaded: what torch.cuda._compile_kernel returned.
        driver: the library that has cuLaunchKernel and cuLaunchKernelEx.
        names: of the kernel's parameters, in their order.
        threads: of a block; shared_bytes: dynamic shared memory of a block.
    """

    def __init__(self, loaded: Any, driver: Any, names: tuple[str, ...], threads: int, shared_bytes: int = 0) -> None:
        self._function, self._module = loaded.func, loaded.module
        self._driver, self._launch = driver, driver.cuLaunchKernel
        self._threads, self._shared_bytes = threads, shared_bytes
        self._in_order = _Arguments(names)
        self._values = (ctypes.c_uint64 * len(names))()
        first = ctypes.addressof(self._values)
        self._pointers = (ctypes.c_uint64 * len(names))(*range(first, first + 8 * len(names), 8))

    def __call__(
        self,
        grid: tuple[int, int, int],
        stream: int,
        *,
        early_start: bool = False,
        **named: torch.Tensor | int | float,
    ) -> None:
        """Launch on a stream (its address).

        Args:
            early_start: the kernel need not wait for the one before it on the stream to end, as device/early_start.cuh
                says; only from `EARLY_START_SINCE` on.
            named: the kernel's parameters; a tensor is passed as a pointer, an int as 32 bits, a float as a float.

        Raises:
            RuntimeError: the driver refused the launch; the number is a CUresult.
        """
        for n, x in enumerate(self._in_order(named)):
            if isinstance(x, torch.Tensor):
                self._values[n] = x.data_ptr()
            elif isinstance(x, float):
                self._values[n] = struct.unpack("<I", struct.pack("<f", x))[0]
            else:
                self._values[n] = x & 0xFFFFFFFF
        block, shared = (self._threads, 1, 1), self._shared_bytes
        if early_start:
            config = _Config(*grid, *block, shared, stream, _EARLY_START, 1)
            status = self._driver.cuLaunchKernelEx(ctypes.byref(config), self._function, self._pointers, None)
        else:
            pointers = self._pointers
            status = self._launch(self._function, *grid, *block, shared, ctypes.c_void_p(stream), pointers, None)
        if status:
            raise RuntimeError(f"expected the launch of a kernel to return 0, got {status} for the grid {grid}")


def current_stream(device: torch.device) -> int:
    """Return the address of torch's current stream on a CUDA device."""
    return torch._C._cuda_getCurrentRawStream(device.index or 0)
