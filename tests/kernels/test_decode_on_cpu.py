# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of decode without a GPU, run as C++: a coroutine per CUDA thread, records that land late and in any
order, warps that stand still at random. How it hung on a GPU before each team of warps had buffers of its own."""

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch
from builders import RELATIVE_RMS, make_request, oracle, prefill, relative_rms
from kvarn_kernels import decode_plan, decode_sm90, gpu, nvrtc, torch_form
from kvarn_kernels.cache import DecodeBatch, LayerCache
from kvarn_kernels.config import KVarNConfig
from test_decode import PAGE, TOLERANCE, decode_step, make_cache, make_requests

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_decode.py runs the kernel itself")
LAUNCHER = """
extern "C" const char* run(float* q, u8* records, u8* k, u8* v, int* table, long long* rows, int* lens, int* starts,
                    int* requests, int* indptr, float* out, float* lse, int stride, float scale, int batch, int splits,
                    int blocks, unsigned seed) {
  failure.clear();
  copies.clear();
  schedule_seed = seed;
  delays.seed(seed);
  launch({splits, blocks, 1}, 32 * WARPS, [=] {
    kvarn_decode(q, records, k, v, table, rows, lens, starts, requests, indptr, out, lse, stride,
                 __float_as_int(scale), batch);
  });
  return failure.c_str();
}
"""
HEADS = (4, 1)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Return a function that builds decode_sm90.cu for this machine's processor."""
    folder, libraries = tmp_path_factory.mktemp("decode"), {}

    def build(*form) -> ctypes.CDLL:
        if form not in libraries:
            path = folder / f"{len(libraries)}.cpp"
            source = nvrtc.source(decode_sm90.SOURCE, decode_sm90.constants(*form))
            path.write_text('#include "cuda_on_cpu.h"\n' + source + LAUNCHER)
            command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-w", f"-I{Path(__file__).parent}"]
            subprocess.run([*command, path, "-o", path.with_suffix(".so")], check=True, timeout=120)
            libraries[form] = ctypes.CDLL(str(path.with_suffix(".so")))
            libraries[form].run.restype = ctypes.c_char_p
        return libraries[form]

    return build


@pytest.fixture
def run_as_cpp(built, monkeypatch):
    """Let `decode` run decode_sm90.cu; return a function that sets the seed of the schedule."""
    chosen = {"seed": 0}

    def decode(
        cache: LayerCache, batch: DecodeBatch, config: KVarNConfig, num_qo_heads, num_kv_heads, scale, split_units
    ):
        workspace = batch.workspace
        head_dim, group = cache.ring_k.shape[3], num_qo_heads // num_kv_heads
        is_bf16 = cache.ring_k.dtype == torch.bfloat16
        library = built(config, head_dim, num_kv_heads, group, is_bf16, split_units)
        tensors = [
            *(workspace.rotated_q, cache.records, cache.ring_k, cache.ring_v, batch.page_table, batch.rows),
            *(batch.seq_lens, batch.exact_starts, workspace.split_requests, workspace.split_indptr),
            *(workspace.partial_out, workspace.partial_lse),
        ]
        size = batch.num_tokens
        failure = library.run(
            *(ctypes.c_void_p(x.data_ptr()) for x in tensors),
            batch.page_table.stride(0),
            ctypes.c_float(scale),
            size,
            workspace.max_splits[size - 1],
            decode_sm90.blocks_per_split(num_qo_heads, num_kv_heads),
            chosen["seed"],
        )
        assert not failure, failure.decode()

    monkeypatch.setattr(decode_sm90, "is_supported", lambda device: True)
    monkeypatch.setattr(decode_sm90, "decode", decode)
    return lambda seed: chosen.update(seed=seed)


def check(requests, heads, config):
    dtype = requests[0].q.dtype
    outs = decode_step(requests, heads, config, padding=1)
    for request, out in zip(requests, outs, strict=True):
        error = relative_rms(out, oracle(request, config, len(request.q) - 1)[0])
        assert error < TOLERANCE[dtype], len(request.q)


@pytest.mark.parametrize(
    ("preset", "dtype", "head_dim", "heads"),
    [
        ("kvarn", torch.bfloat16, 64, (4, 1)),
        ("kvarn", torch.float16, 128, (9, 1)),
        ("kvarn_canonical", torch.float16, 64, (14, 2)),
        ("kvarn_k4v4_g128", torch.bfloat16, 128, (4, 2)),
        ("kvarn_k4v4_g128", torch.float16, 256, (1, 1)),
        ("kvarn_k4v3_g128", torch.bfloat16, 128, (4, 2)),
        ("kvarn_k4v3_g128", torch.float16, 64, (9, 1)),
        ("kvarn_k4v3_g128", torch.bfloat16, 256, (1, 1)),
        ("kvarn_k3v2_g128", torch.bfloat16, 128, (4, 2)),
        ("kvarn_k3v2_g128", torch.float16, 64, (9, 1)),
        ("kvarn_k3v2_g128", torch.bfloat16, 256, (1, 1)),
        ("kvarn_k2v2_g128", torch.bfloat16, 64, (8, 1)),
        ("kvarn_k2v2_g128", torch.float16, 256, (2, 1)),
    ],
)
def test_every_form_matches_the_oracle(run_as_cpp, preset, dtype, head_dim, heads):
    requests = make_requests([3 * PAGE + 5, 70, 4 * PAGE], heads, head_dim, dtype)
    check(requests, heads, KVarNConfig.from_preset(preset))


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, monkeypatch, preset, seed):
    # one split of all pages, so that every buffer is filled several times
    monkeypatch.setattr(gpu, "multiprocessors", lambda: 1)
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 64)
    run_as_cpp(seed)
    requests = make_requests([14 * PAGE + 3, 9 * PAGE], HEADS, 64, torch.float16)
    check(requests, HEADS, KVarNConfig.from_preset(preset))


def test_tokens_of_the_prefix_are_read_from_records(run_as_cpp):
    config = KVarNConfig.from_preset("kvarn")
    owner = make_request(2 * PAGE + 9, HEADS, 64, torch.float16, row=1)
    cache = make_cache(config, 1, 64, torch.float16, 1 + max(owner.pages), rows=3)
    prefill(torch_form.extend_attention, owner, [2 * PAGE], cache, config)
    guest = make_request(2 * PAGE + 9, HEADS, 64, torch.float16, row=2)
    guest.exact_start = 2 * PAGE
    (out,) = decode_step([guest], HEADS, config, cache=cache)
    assert relative_rms(out, oracle(guest, config, 2 * PAGE + 8)[0]) < RELATIVE_RMS[torch.float16] + 1.5e-3
