# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of encode without a GPU: run as C++ (a coroutine per CUDA thread), and compiled by NVRTC.

Its launches are tested where they run: `test_encode.py` on a GPU.
"""

import ctypes
import subprocess
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from builders import PAGE, encoded, fill_rings, int32, make_cache, random_rows, read_ring, write_ring
from cubin import compiled, registers_and_stack
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.write import encode_cuda
from test_ring import PRESETS, places

SUPPORT = Path(__file__).parents[1] / "support"
KV_HEADS = 2
CPU = torch.device("cpu")
cpu_int32, cpu_rows, cpu_cache = (partial(f, device=CPU) for f in (int32, random_rows, make_cache))
LAUNCHERS = """
extern "C" void places(u8* records, int* rings, long long* bytes, int positions) {
  const Source source = {records, rings, nullptr, 0, positions};
  for (int n = 0; n < positions; n++) bytes[n] = (const u8*)source.row(n) - records;
}
extern "C" void run_ring(u8* records, int* rings, int* lens, int* pages, int batch, int slices) {
  launch({2 * HK, slices, 1}, THREADS, [=] { kvarn_encode_ring(records, rings, lens, pages, batch); });
}
extern "C" void run_chunk(u8* records, int* rings, u16* chunk_k, u16* chunk_v, int* prefix, int* lens, int* indptr,
                          int* table, int stride, int pages, int batch) {
  launch({2 * HK, pages, batch}, THREADS,
         [=] { kvarn_encode_chunk(records, rings, chunk_k, chunk_v, prefix, lens, indptr, table, stride); });
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Return a function that builds encode.cu for this machine's processor."""
    folder, built = tmp_path_factory.mktemp("encode"), {}

    def build(config: KVarNConfig, head_dim: int, is_bf16: bool) -> ctypes.CDLL:
        key = (config.name, head_dim, is_bf16)
        if key not in built:
            defines = encode_cuda.constants(config, head_dim, KV_HEADS, is_bf16, config.ring_pages(head_dim, 2))
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
    cache = cpu_cache(config, KV_HEADS, head_dim, dtype, pages=6, rows=3)
    fill_rings(cache, config, scale)
    before = cache.records.clone()
    # request 0 fills its second page, request 1 is in the middle of one, request 2 is a padded row
    rings, pages = cache.ring_pages(2, 1, 0), cpu_int32(3, 4, 0)
    run = library(config, head_dim, dtype == torch.bfloat16).run_ring
    call(run, cache.records, rings, cpu_int32(2 * PAGE, 100, 1), pages, 3, 2)
    before[3] = encoded(*read_ring(cache, 2, torch.arange(PAGE, 2 * PAGE)), config)
    assert torch.equal(cache.records, before)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("preset", PRESETS)
def test_tokens_of_a_ring_are_where_counting_says(library, preset, head_dim):
    config = KVarNConfig.from_preset(preset)
    cache = cpu_cache(config, KV_HEADS, head_dim, torch.bfloat16, pages=2, rows=3)
    count = 2 * cache.ring_size + 3
    found = torch.full((count,), -1)
    call(library(config, head_dim, True).places, cache.records, cache.ring_pages(2), found, count)
    pages, page_bytes = cache.rings[2].tolist(), cache.records[0].numel()
    assert found.tolist() == [pages[n] * page_bytes + at for n, at in islice(places(config, head_dim, 2), count)]


@pytest.mark.parametrize("page", range(2, 7))
def test_bytes_from_a_ring_that_was_written_over_are_those_of_the_oracle(library, page):
    config, head_dim = KVarNConfig.from_preset("kvarn"), 64
    cache = cpu_cache(config, KV_HEADS, head_dim, torch.float16, pages=4, rows=3)
    k, v = (cpu_rows((PAGE, KV_HEADS, head_dim), torch.float16) for _ in range(2))
    # the rest of the ring is NaN
    write_ring(cache, 2, torch.arange(page * PAGE, (page + 1) * PAGE), k, v)
    before = cache.records.clone()
    run = library(config, head_dim, False).run_ring
    call(run, cache.records, cache.ring_pages(2), cpu_int32((page + 1) * PAGE), cpu_int32(1), 1, 1)
    before[1] = encoded(k, v, config)
    assert torch.equal(cache.records, before)


def test_bytes_from_ring_and_chunk_are_those_of_the_oracle(library):
    config, head_dim, prefix_len, seq_len = KVarNConfig.from_preset("kvarn"), 64, 200, 400
    k, v = (cpu_rows((seq_len, KV_HEADS, head_dim), torch.bfloat16) for _ in range(2))
    cache = cpu_cache(config, KV_HEADS, head_dim, torch.bfloat16, pages=8, rows=3)
    write_ring(cache, 1, torch.arange(PAGE, prefix_len), *(x[PAGE:prefix_len] for x in (k, v)))
    before = cache.records.clone()
    chunks = [torch.cat([cpu_rows((5, KV_HEADS, head_dim), torch.bfloat16), x[prefix_len:]]) for x in (k, v)]
    # request 0 (5 tokens) fills nothing, request 1 fills its pages 1 and 2
    rings, prefixes, seq_lens = cache.ring_pages(2, 1), cpu_int32(0, prefix_len), cpu_int32(5, seq_len)
    table = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 0]], dtype=torch.int32)
    run = library(config, head_dim, True).run_chunk
    call(run, cache.records, rings, *chunks, prefixes, seq_lens, cpu_int32(0, 5, 205), table, 4, 2, 2)
    for page, page_id in ((1, 6), (2, 7)):
        tokens = slice(page * PAGE, (page + 1) * PAGE)
        before[page_id] = encoded(k[tokens], v[tokens], config)
    assert torch.equal(cache.records, before)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf"), 0.0])
def test_poisoned_and_constant_rows_give_the_bytes_of_the_oracle(library, poison):
    config, head_dim = KVarNConfig.from_preset("kvarn"), 64
    cache = cpu_cache(config, KV_HEADS, head_dim, torch.float16, pages=4, rows=2)
    k, v = (cpu_rows((PAGE, KV_HEADS, head_dim), torch.float16) for _ in range(2))
    k[5, 0, 3] = v[7, 0, 3] = poison
    k[:, 1] = v[:, 1] = poison  # head 1 is poisoned throughout
    write_ring(cache, 1, torch.arange(PAGE), k, v)
    run = library(config, head_dim, False).run_ring
    call(run, cache.records, cache.ring_pages(1), cpu_int32(PAGE), cpu_int32(2), 1, 1)
    assert torch.equal(cache.records[2], encoded(k, v, config))


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
    defines = encode_cuda.constants(config, head_dim, 8, is_bf16, config.ring_pages(head_dim, 2))
    source = nvrtc.source(encode_cuda.SOURCE, defines | encode_cuda.selection(kernel))
    registers, stack = registers_and_stack(compiled(source, kernel, "90"), tmp_path)
    # 8 tokens of a thread do not fit: about one access in ten is a spill
    limit = 640 if head_dim == 256 else 96
    assert registers <= 128 and stack <= limit, (registers, stack)


@pytest.mark.parametrize("capability", ["80", "86", "89", "100", "120"])
def test_it_compiles_for_every_capability(capability):
    config = KVarNConfig.from_preset("kvarn")
    defines = encode_cuda.constants(config, 64, 8, True, config.ring_pages(64, 2))
    kernel = encode_cuda.KERNELS[0]
    assert compiled(nvrtc.source(encode_cuda.SOURCE, defines | encode_cuda.selection(kernel)), kernel, capability)
