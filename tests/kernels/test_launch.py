# SPDX-License-Identifier: Apache-2.0
"""What the launchers hand on: arguments as the driver gets them, and when Triton specialises anew."""

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch
from builders import attention_for, int32, make_cache, shape_of
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.device.launch import CudaLauncher, TritonLauncher
from kvarn_kernels.read import columns_sm90, decode_sm90, extend_sm90, finish_short, verify_sm90
from kvarn_kernels.write import encode_cuda

LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, *[ctypes.c_void_p] * 3)
LAUNCH_BY = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)


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

        def launch_by(config, function, arguments, extra):
            # the offsets of CUlaunchConfig and CUlaunchAttribute in cuda.h
            found = ctypes.string_at(config, 56)
            stream, attributes = struct.unpack_from("2Q", found, 32)
            launch(function, *struct.unpack_from("7I", found), stream, arguments, extra)
            (count,) = struct.unpack_from("I", found, 48)
            self.early.append((count, *struct.unpack("i4xi", ctypes.string_at(attributes, 12))))
            return status

        self.early: list[tuple[int, int, int]] = []
        self.cuLaunchKernelEx = LAUNCH_BY(launch_by)


def launcher(driver: Driver, names: str = "xnab") -> CudaLauncher:
    loaded = SimpleNamespace(func=ctypes.c_void_p(77), module=None)
    return CudaLauncher(loaded, driver, tuple(names), threads=128, shared_bytes=4096)


def test_cuda_launcher_packs_pointers_ints_and_floats():
    driver = Driver(4)
    launch = launcher(driver)
    x, y = torch.zeros(3), torch.zeros(5)
    launch((3, 2, 1), 0xABCD, x=x, n=7, a=-1.5, b=-2)
    # in the order of the parameters, whatever the order of the call
    launch((1, 1, 1), 1, b=3, a=0.25, n=8, x=y)
    (function, shape, stream, values), (_, _, _, second) = driver.calls
    assert function == 77 and shape == (3, 2, 1, 128, 1, 1, 4096) and stream == 0xABCD
    assert values == [x.data_ptr(), 7, struct.unpack("<I", struct.pack("<f", -1.5))[0], 2**32 - 2]
    assert second[0] == y.data_ptr() and second[1] == 8 and second[3] == 3


def test_cuda_launcher_starts_a_kernel_beside_the_one_before():
    driver, x = Driver(4), torch.zeros(3)
    launcher(driver)((3, 2, 1), 0xABCD, early_start=True, x=x, n=7, a=-1.5, b=-2)
    ((function, shape, stream, values),) = driver.calls
    assert function == 77 and shape == (3, 2, 1, 128, 1, 1, 4096) and stream == 0xABCD
    assert values[:2] == [x.data_ptr(), 7] and values[3] == 2**32 - 2
    # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    assert driver.early == [(1, 6, 1)]


@pytest.mark.parametrize("early_start", [False, True])
def test_cuda_launcher_reports_a_refused_launch(early_start):
    with pytest.raises(RuntimeError, match=r"got 700 for the grid \(9, 1, 1\)"):
        launcher(Driver(1, status=700), "n")((9, 1, 1), 0, early_start=early_start, n=5)


@pytest.mark.parametrize(
    ("named", "error", "text"),
    [
        ({"x": 1, "n": 2, "a": 3}, TypeError, "expected the arguments x, n, a, b, got x, n, a"),
        ({"x": 1, "n": 2, "a": 3, "b": 4, "c": 5}, TypeError, "expected the arguments x, n, a, b, got x, n, a, b, c"),
        ({"x": 1, "n": 2, "a": 3, "c": 4}, KeyError, "b"),
    ],
    ids=["missing", "too many", "another"],
)
def test_launchers_take_the_names_of_the_parameters_and_no_others(named, error, text):
    driver, kernel = Driver(4), Kernel("x", "n", "a", "b")
    with pytest.raises(error, match=text):
        launcher(driver)((1, 1, 1), 0, **named)
    with pytest.raises(error, match=text):
        TritonLauncher(kernel)((1, 1, 1), num_warps=4, **named)
    assert not driver.calls and not kernel.compiled


class Kernel:
    """A Triton kernel that notes its own calls and those of what it compiled to; its second parameter is free."""

    def __init__(self, *names: str) -> None:
        self.arg_names = names
        self.params = [SimpleNamespace(do_not_specialize=n == 1) for n in range(len(names))]
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
    names = ("x_ptr", "count", "stride", "BLOCK")
    kernel, x = Kernel(*names), torch.zeros(64)
    launch = TritonLauncher(kernel)
    launch((1, 1, 1), num_warps=4, x_ptr=x, count=5, stride=64, BLOCK=16)
    args = change(x)
    launch((1, 1, 1), num_warps=4, **dict(zip(names, args, strict=True)))
    assert kernel.compiled == compiled
    if compiled == 1:
        # the arguments of this call, not those of the first one
        assert kernel.launched == [args]


def test_triton_launcher_keeps_nothing_of_the_interpreter():
    calls = []

    class Interpreted(dict):
        arg_names = ("n",)

    launch = TritonLauncher(Interpreted({(1, 1, 1): lambda *args, num_warps: calls.append(args)}))
    launch((1, 1, 1), num_warps=4, n=1)
    launch((1, 1, 1), num_warps=4, n=1)
    assert calls == [(1,), (1,)]


@pytest.fixture
def passed(monkeypatch) -> dict[str, tuple[str, ...]]:
    """Collect the names that wrappers pass, by kernel of CUDA C++; nothing is compiled or launched."""
    found = {}

    def compile_kernel(path, kernel, *_):
        return lambda grid, stream, early_start=False, **named: found.update({kernel: tuple(named)})

    monkeypatch.setattr(nvrtc, "compile_kernel", compile_kernel)
    for module in (decode_sm90, encode_cuda, extend_sm90, finish_short):
        monkeypatch.setattr(module, "current_stream", lambda device: 0)
    for module in (columns_sm90, decode_sm90, encode_cuda, extend_sm90, finish_short, verify_sm90):
        # what is kept beyond this test must be the kernel itself
        monkeypatch.setattr(module, "_compiled", module._compiled.__wrapped__)
    return found


def test_wrappers_pass_the_parameters_of_the_cuda_kernels_by_name(passed):
    config = KVarNConfig.from_preset("kvarn")
    cache = make_cache(config, 2, 64, torch.float16, pages=5, rows=2)
    workspace = attention_for(cache, 4, config, max_batch=1)._decode_workspace
    ring, pages, chunk = cache.ring_pages(1), int32(3, 1, 4)[None], torch.zeros(300, 2, 64)
    decode_step = DecodeBatch(ring, int32(300), pages, int32(4), int32(0))
    extend_step = ExtendBatch(ring, int32(0), int32(300), int32(0, 300), pages, int32(0), [0], [300])
    for module in (columns_sm90, decode_sm90, verify_sm90):
        module.decode(cache, decode_step, workspace, config, 1.0)
    encode_cuda.encode_from_ring(cache, decode_step, config)
    new = QKV(chunk.repeat(1, 2, 1), chunk, chunk)
    encode_cuda.encode_from_chunk(new, cache, extend_step, config)
    plan = extend_sm90.plan_short(extend_step, shape_of(cache, 4), config, H100)
    results = extend_sm90.attend(new, cache, extend_step, plan, config, 1.0)
    finish_short.finish(torch.empty_like(new.q), *results, new, cache, extend_step, config)
    modules = {module.KERNEL: module for module in (columns_sm90, decode_sm90, extend_sm90, finish_short, verify_sm90)}
    assert set(passed) == {*modules, *encode_cuda.KERNELS}
    for kernel, names in passed.items():
        source = modules.get(kernel, encode_cuda).SOURCE.read_text()
        assert set(names) == set(nvrtc.parameters(source, kernel)), kernel


def test_parameters_are_those_of_the_kernel_that_is_asked_for():
    source = encode_cuda.SOURCE.read_text()
    expected = ("records", "ring_pages", "seq_lens", "store_pages", "batch_size")
    assert nvrtc.parameters(source, "kvarn_encode_ring") == expected
    with pytest.raises(ValueError, match="expected a kernel kvarn_encode, the source defines none"):
        nvrtc.parameters(source, "kvarn_encode")
