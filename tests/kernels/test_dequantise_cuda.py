# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of dequantise: compiled by NVRTC without a GPU, and run as C++ against the decoded records."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from builders import PAGE, make_cache, make_request, prefill, relative_rms
from cubin import compiled, registers_and_stack
from kvarn_kernels import reference, torch_form
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import dequantise_cuda
from kvarn_kernels.device import nvrtc
from test_dequantise import BOUND

LAUNCHER = """
extern "C" void run(u8* keys, u8* values, u8* records, int* requests, int* pages, int* table, int stride, int first,
                    int slots) {
  launch({slots - first, HK, 2}, 32 * WARPS, [=] {
    kvarn_dequantise(keys, values, records, requests, pages, table, stride, first);
  });
}
"""
SUPPORT = Path(__file__).parents[1] / "support"
FORMS = [
    ("kvarn", 64, torch.bfloat16),
    ("kvarn", 128, torch.bfloat16),
    ("kvarn", 256, torch.float16),
    ("kvarn_k4v3_g128", 64, torch.float16),
    ("kvarn_k4v3_g128", 128, torch.bfloat16),
    ("kvarn_k4v3_g128", 256, torch.bfloat16),
    ("kvarn_k4v4_g128", 64, torch.float16),
    ("kvarn_k4v4_g128", 128, torch.bfloat16),
    ("kvarn_k4v4_g128", 256, torch.bfloat16),
    ("kvarn_k3v2_g128", 64, torch.bfloat16),
    ("kvarn_k3v2_g128", 128, torch.float16),
    ("kvarn_k3v2_g128", 256, torch.bfloat16),
    ("kvarn_k2v2_g128", 64, torch.bfloat16),
    ("kvarn_k2v2_g128", 128, torch.float16),
    ("kvarn_k2v2_g128", 256, torch.bfloat16),
]
ids = pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form[0]}-{form[1]}-{form[2]}")


def source_of(form: tuple, num_kv_heads: int) -> str:
    preset, head_dim, dtype = form
    config = KVarNConfig.from_preset(preset)
    defines = dequantise_cuda.constants(config, head_dim, num_kv_heads, dtype == torch.bfloat16)
    return nvrtc.source(dequantise_cuda.SOURCE, defines)


@pytest.mark.parametrize(
    ("form", "capability"),
    [*((form, "90") for form in FORMS[:6]), (FORMS[1], "80"), (FORMS[1], "100"), (FORMS[1], "120")],
)
def test_dequantise_compiles_into_registers(form, capability, tmp_path):
    registers, stack = registers_and_stack(compiled(source_of(form, 8), "kvarn_dequantise", capability), tmp_path)
    blocks = dequantise_cuda.MIN_BLOCKS[form[1]]
    assert registers * dequantise_cuda.THREADS * blocks <= 65536 and stack == 0, (registers, stack)


@ids
def test_dequantise_as_cpp_matches_the_decoded_records(form, tmp_path):
    preset, head_dim, dtype = form
    config = KVarNConfig.from_preset(preset)
    path = tmp_path / "dequantise.cpp"
    path.write_text('#include "cuda_on_cpu.h"\n' + source_of(form, 2) + LAUNCHER)
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{SUPPORT}", path, "-o", tmp_path / "it.so"]
    subprocess.run(command, check=True, timeout=120)
    request = make_request(3 * PAGE + 5, (2, 2), head_dim, dtype)
    cache = make_cache(config, 2, head_dim, dtype, pages=8, rows=3)
    prefill(torch_form.attend_extend, request, [3 * PAGE], cache, config)
    numbers = [1, 2, 0]
    # the request is the second of a batch; entry 0 of the list is exact and not written here
    table = torch.tensor([[7, 7, 7], request.pages[:3]], dtype=torch.int32)
    requests, pages = torch.ones(3, dtype=torch.int32), torch.tensor(numbers, dtype=torch.int32)
    shape = (4, 2, PAGE, head_dim)
    keys, values = (torch.full(shape, float("nan"), dtype=dtype) for _ in range(2))
    tensors = (keys, values, cache.records, requests, pages, table)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    ctypes.CDLL(str(tmp_path / "it.so")).run(*pointers, table.stride(0), 1, len(numbers))
    records = cache.records[[request.pages[n] for n in numbers[1:]]]
    for x, decoded in zip((keys, values), reference.decode_tile(records, config, head_dim), strict=True):
        assert x[0].isnan().all() and x[-1].isnan().all()
        expected = reference.rotate(decoded)
        assert relative_rms(x[1:-1], expected) < BOUND[dtype]
        torch.testing.assert_close(
            x[1:-1, :, 0], expected[:, :, 0].to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-5
        )
