# SPDX-License-Identifier: Apache-2.0
"""What the launchers hand on: arguments as the driver gets them, and when Triton specialises anew."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.launch import CudaLauncher, TritonLauncher

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)


class Driver:
    """A driver library whose cuLaunchKernel notes what it gets."""

    def __init__(self, arguments: int, status: int = 0) -> None:
        self.calls: list[tuple] = []

        def launch(function, *rest):
            pointers = ctypes.cast(rest[8], ctypes.POINTER(ctypes.c_void_p))
            values = [ctypes.c_uint64.from_address(pointers[n]).value for n in range(arguments)]
            self.calls.append((function, rest[:7], rest[7], values))
            return status

        self.cuLaunchKernel = LAUNCH(launch)


def launcher(driver: Driver) -> CudaLauncher:
    loaded = SimpleNamespace(func=ctypes.c_void_p(77), module=None)
    return CudaLauncher(loaded, driver, threads=128, shared_bytes=4096)


def test_cuda_launcher_packs_pointers_ints_and_floats():
    driver = Driver(4)
    launch = launcher(driver)
    x, y = torch.zeros(3), torch.zeros(5)
    launch((3, 2, 1), 0xABCD, x, 7, -1.5, -2)
    launch((1, 1, 1), 1, y, 8, 0.25, 3)
    (function, shape, stream, values), (_, _, _, second) = driver.calls
    assert function == 77 and shape == (3, 2, 1, 128, 1, 1, 4096) and stream == 0xABCD
    assert values == [x.data_ptr(), 7, struct.unpack("<I", struct.pack("<f", -1.5))[0], 2**32 - 2]
    assert second[0] == y.data_ptr() and second[1] == 8 and second[3] == 3


def test_cuda_launcher_reports_a_refused_launch():
    with pytest.raises(RuntimeError, match=r"got 700 for the grid \(9, 1, 1\)"):
        launcher(Driver(1, status=700))((9, 1, 1), 0, 5)


class Kernel:
    """A Triton kernel (x_ptr, count, stride, BLOCK) that notes its own calls and those of what it compiled to."""

    def __init__(self) -> None:
        self.params = [SimpleNamespace(do_not_specialize=n == 1) for n in range(4)]
        self.compiled, self.launched = 0, []

    def __getitem__(self, grid):
        def call(*args, num_warps):
            self.compiled += 1
            return {grid: lambda *args: self.launched.append(args)}

        return call


@pytest.mark.parametrize(
    ("change", "compiled"),
    [
        (lambda x: (x, 9, 64, 16), 1),
        (lambda x: (x.clone(), 5, 64, 16), 1),
        (lambda x: (x[1:], 5, 64, 16), 2),
        (lambda x: (x.half(), 5, 64, 16), 2),
        (lambda x: (x, 5, 65, 16), 2),
        (lambda x: (x, 5, 64, 32), 2),
    ],
    ids=["free integer", "other tensor", "alignment", "dtype", "stride", "constant"],
)
def test_triton_launcher_compiles_anew_for_what_triton_specialises(change, compiled):
    kernel, x = Kernel(), torch.zeros(64)
    launch = TritonLauncher(kernel)
    launch((1, 1, 1), x, 5, 64, 16, num_warps=4)
    args = change(x)
    launch((1, 1, 1), *args, num_warps=4)
    assert kernel.compiled == compiled
    if compiled == 1:
        # the arguments of this call, not those of the first one
        assert kernel.launched == [args]


def test_triton_launcher_keeps_nothing_of_the_interpreter():
    calls = []
    kernel = {(1, 1, 1): lambda *args, num_warps: calls.append(args)}
    launch = TritonLauncher(kernel)
    launch((1, 1, 1), 1, num_warps=4)
    launch((1, 1, 1), 1, num_warps=4)
    assert calls == [(1,), (1,)]
