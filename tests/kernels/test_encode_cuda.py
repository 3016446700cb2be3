# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of encode without a GPU: run as C++ (a coroutine per CUDA thread), and compiled by NVRTC.

Its launches are tested where they run: `test_encode.py` on a GPU.
"""

import ctypes
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch
from builders import PAGE, encoded, int32, random_rows
from cubin import compiled, registers_and_stack
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.write import encode_cuda

SUPPORT = Path(__file__).parents[1] / "support"
KV_HEADS, ROWS = 2, 3
CPU = torch.device("cpu")
cpu_int32, cpu_rows = partial(int32, device=CPU), partial(random_rows, device=CPU)
LAUNCHERS = """
extern "C" void run_ring(u8* records, u16* k, u16* v, long long* rows, int* lens, int* pages, int batch, int slices) {
  launch({2 * HK, slices, 1}, THREADS, [=] { kvarn_encode_ring(records, k, v, rows, lens, pages, batch); });
}
extern "C" void run_chunk(u8* records, u16* k, u16* v, u16* chunk_k, u16* chunk_v, long long* rows, int* prefix,
                          int* lens, int* indptr, int* table, int stride, int pages, int batch) {
  launch({2 * HK, pages, batch}, THREADS,
         [=] { kvarn_encode_chunk(records, k, v, chunk_k, chunk_v, rows, prefix, lens, indptr, table, stride); });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return a function that builds encode.cu for this machine's processor."""
    folder, built = tmp_path_factory.mktemp("encode"), {}

    def build(config: KVarNConfig, head_dim: int, is_bf16: bool) -> ctypes.CDLL:
        key = (config.name, head_dim, is_bf16)
        if key not in built:
            defines = encode_cuda.constants(config, head_dim, KV_HEADS, is_bf16, config.ring_len)
            defines |= encode_cuda.selection(*encode_cuda.KERNELS)
            path = folder / f"{len(built)}.cpp"
            path.write_text('#include "cuda_on_cpu.h"\n' + nvrtc.source(encode_cuda.SOURCE, defines) + LAUNCHERS)
            command = ["g++", "-std=c++20", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-w"]
            command += [f"-I{SUPPORT}", path, "-o", path.with_suffix(".so")]
            subprocess.run(command, check=True, timeout=120)
            built[key] = ctypes.CDLL(str(path.with_suffix(".so")))
        return built[key]

    return build


def call(function, *args) -> None:
    function(*(ctypes.c_void_p(x.data_ptr()) if isinstance(x, torch.Tensor) else x for x in args))


@pytest.mark.parametrize(
    ("preset", "dtype", "head_dim", "scale"),
    [
        ("kvarn", torch.bfloat16, 128, 1.0),
        ("kvarn", torch.float16, 64, 1e-6),
        ("kvarn_k4v4_g128", torch.bfloat16, 64, 1e5),
        ("kvarn_k4v3_g128", torch.bfloat16, 128, 1.0),
        ("kvarn_k4v3_g128", torch.float16, 64, 1.0),
        ("kvarn_k3v2_g128", torch.float16, 128, 1.0),
        ("kvarn_k3v2_g128", torch.bfloat16, 64, 1.0),
        ("kvarn_k3v2_g128", torch.bfloat16, 256, 1.0),
        ("kvarn_k2v2_g128", torch.float16, 64, 1.0),
        ("kvarn", torch.float16, 256, 1.0),
    ],
)
def test_bytes_from_the_ring_are_those_of_the_oracle(library, preset, dtype, head_dim, scale):
    config = KVarNConfig.from_preset(preset)
    ring_k, ring_v = (cpu_rows((ROWS, config.ring_len, KV_HEADS, head_dim), dtype, scale) for _ in range(2))
    records = torch.full((6, KV_HEADS, config.record_bytes(head_dim)), 0xAB, dtype=torch.uint8)
    before = records.clone()
    # request 0 fills its second page, request 1 is in the middle of one, request 2 is a padded row
    rows, pages = torch.tensor([2, 1, 0]), cpu_int32(3, 4, 0)
    run = library(config, head_dim, dtype == torch.bfloat16).run_ring
    call(run, records, ring_k, ring_v, rows, cpu_int32(2 * PAGE, 100, 1), pages, 3, 2)
    slots = torch.arange(PAGE, 2 * PAGE) % config.ring_len
    assert torch.equal(records[3], encoded(ring_k[2, slots], ring_v[2, slots], config))
    others = [0, 1, 2, 4, 5]
    assert torch.equal(records[others], before[others])


def test_bytes_from_ring_and_chunk_are_those_of_the_oracle(library):
    config, head_dim, prefix_len, seq_len = KVarNConfig.from_preset("kvarn"), 64, 200, 400
    k, v = (cpu_rows((seq_len, KV_HEADS, head_dim), torch.bfloat16) for _ in range(2))
    rings = [torch.full((ROWS, config.ring_len, KV_HEADS, head_dim), float("nan"), dtype=torch.bfloat16) for _ in "kv"]
    for ring, x in zip(rings, (k, v), strict=True):
        positions = torch.arange(PAGE, prefix_len)
        ring[1, positions % config.ring_len] = x[positions]
    chunks = [torch.cat([cpu_rows((5, KV_HEADS, head_dim), torch.bfloat16), x[prefix_len:]]) for x in (k, v)]
    records = torch.zeros(8, KV_HEADS, config.record_bytes(head_dim), dtype=torch.uint8)
    # request 0 (5 tokens) fills nothing, request 1 fills its pages 1 and 2
    rows, prefixes, seq_lens = torch.tensor([2, 1]), cpu_int32(0, prefix_len), cpu_int32(5, seq_len)
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]], dtype=torch.int32)
    run = library(config, head_dim, True).run_chunk
    call(run, records, *rings, *chunks, rows, prefixes, seq_lens, cpu_int32(0, 5, 205), table, 4, 2, 2)
    for page, page_id in ((1, 6), (2, 7)):
        tokens = slice(page * PAGE, (page + 1) * PAGE)
        assert torch.equal(records[page_id], encoded(k[tokens], v[tokens], config))
    assert not records[:6].any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_poisoned_and_constant_rows_give_the_bytes_of_the_oracle(library, poison):
    config, head_dim = KVarNConfig.from_preset("kvarn"), 64
    ring_k, ring_v = (cpu_rows((ROWS, config.ring_len, KV_HEADS, head_dim), torch.float16) for _ in range(2))
    ring_k[1, 5, 0, 3] = ring_v[1, 7, 0, 3] = poison
    ring_k[1, :, 1] = ring_v[1, :, 1] = poison  # head 1 is poisoned throughout
    records = torch.zeros(4, KV_HEADS, config.record_bytes(head_dim), dtype=torch.uint8)
    run = library(config, head_dim, False).run_ring
    call(run, records, ring_k, ring_v, torch.tensor([1]), cpu_int32(PAGE), cpu_int32(2), 1, 1)
    assert torch.equal(records[2], encoded(ring_k[1, :PAGE], ring_v[1, :PAGE], config))


@pytest.mark.parametrize("kernel", encode_cuda.KERNELS)
@pytest.mark.parametrize(
    ("preset", "head_dim", "is_bf16"),
    [
        ("kvarn", 128, True),
        ("kvarn", 256, False),
        ("kvarn_k4v4_g128", 64, True),
        ("kvarn_k4v3_g128", 128, True),
        ("kvarn_k3v2_g128", 128, False),
        ("kvarn_k2v2_g128", 128, False),
    ],
)
def test_it_compiles_into_registers(kernel, preset, head_dim, is_bf16, tmp_path):
    config = KVarNConfig.from_preset(preset)
    defines = encode_cuda.constants(config, head_dim, 8, is_bf16, config.ring_len)
    source = nvrtc.source(encode_cuda.SOURCE, defines | encode_cuda.selection(kernel))
    registers, stack = registers_and_stack(compiled(source, kernel, "90"), tmp_path)
    # 8 tokens of a thread do not fit: about one access in ten is a spill
    limit = 640 if head_dim == 256 else 96
    assert registers <= 128 and stack <= limit, (registers, stack)


@pytest.mark.parametrize("capability", ["80", "86", "89", "100", "120"])
def test_it_compiles_for_every_capability(capability):
    config = KVarNConfig.from_preset("kvarn")
    defines = encode_cuda.constants(config, 64, 8, True, config.ring_len)
    kernel = encode_cuda.KERNELS[0]
    assert compiled(nvrtc.source(encode_cuda.SOURCE, defines | encode_cuda.selection(kernel)), kernel, capability)
