# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of decode without a GPU, run as C++: a coroutine per CUDA thread, records that land late and in any
order, warps that stand still at random. How it hung on a GPU before each team of warps had buffers of its own."""

from dataclasses import replace

import pytest
import torch
from builders import RELATIVE_RMS, attention_for, make_request, oracle, prefill, relative_rms, run_decode
from decode_as_cpp import DecodeAsCpp
from kvarn_kernels import torch_form
from kvarn_kernels.attention import Kernels
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.read import decode_plan, decode_sm90
from test_decode import ONE_MULTIPROCESSOR, PAGE, TOLERANCE, decode_step, make_cache, make_requests
from test_verify import verify_together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_decode.py runs the kernel itself")
HEADS = (4, 1)
SM90 = Kernels("triton", "cuda", "triton")


@pytest.fixture(scope="module")
def as_cpp(tmp_path_factory):
    return DecodeAsCpp(decode_sm90, tmp_path_factory.mktemp("decode"))


@pytest.fixture
def run_as_cpp(as_cpp, monkeypatch):
    """Let `decode` run decode_sm90.cu; return a function that sets the seed of the schedule."""
    as_cpp.seed = 0
    monkeypatch.setattr(decode_sm90, "_compiled", as_cpp.compiled)
    monkeypatch.setattr(decode_sm90, "current_stream", lambda device: 0)
    return lambda seed: setattr(as_cpp, "seed", seed)


def check(requests, heads, config, gpu=None, sliding_window=0):
    dtype = requests[0].q.dtype
    step = {"padding": 1, "gpu": gpu, "kernels": SM90, "sliding_window": sliding_window}
    outs = decode_step(requests, heads, config, **step)
    for request, out in zip(requests, outs, strict=True):
        expected = oracle(request, config, len(request.q) - 1, sliding_window=sliding_window)[0]
        assert relative_rms(out, expected) < TOLERANCE[dtype], len(request.q)


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


@pytest.mark.parametrize(
    ("window", "preset", "head_dim", "heads"),
    [
        (1, "kvarn", 64, (4, 1)),
        (100, "kvarn_canonical", 64, (4, 1)),
        (PAGE + 1, "kvarn", 64, (4, 1)),
        # two tiles of columns
        (300, "kvarn", 128, (9, 1)),
        (300, "kvarn_k4v3_g128", 256, (2, 1)),
    ],
)
def test_sliding_windows_match_the_oracle(run_as_cpp, window, preset, head_dim, heads):
    requests = make_requests([5 * PAGE + 9, window, 4 * PAGE, 1], heads, head_dim, torch.bfloat16)
    check(requests, heads, KVarNConfig.from_preset(preset), sliding_window=window)


@pytest.mark.parametrize("window", [1, 130, 300])
def test_drafts_match_the_oracle_in_a_sliding_window(run_as_cpp, window):
    drafts = 5
    # a page ends, and another leaves the window, among the drafts
    starts = [3 * PAGE - 2, 2 * PAGE + window - 3, 70]
    requests = make_requests([n + drafts for n in starts], HEADS, 64, torch.float16)
    verify_together(
        requests, starts, HEADS, KVarNConfig.from_preset("kvarn"), drafts, SM90, sliding_window=window
    )


@pytest.mark.parametrize(
    ("preset", "head_dim"),
    [("kvarn", 64), ("kvarn", 256), ("kvarn_canonical", 128), ("kvarn_k4v4_g128", 64), ("kvarn_k2v2_g128", 128)],
)
def test_rings_in_any_round_match_the_oracle(run_as_cpp, preset, head_dim):
    config = KVarNConfig.from_preset(preset)
    size = make_cache(config, 1, head_dim, torch.bfloat16, 1, 2).ring_size
    lengths = [size - 1, size, size + 1, 2 * size + 1, 2 * size + PAGE + 7]
    check(make_requests(lengths, (1, 1), head_dim, torch.bfloat16), (1, 1), config)


def test_steps_read_the_ring_pages_of_the_batch_whoever_wrote_them(run_as_cpp):
    requests = make_requests([PAGE + 9, PAGE + 9], HEADS, 64, torch.float16)
    config = KVarNConfig.from_preset("kvarn")
    cache = make_cache(config, 1, 64, torch.float16, 6, rows=3)
    for request in requests:
        prefill(torch_form.attend_extend, request, [PAGE + 8], cache, config)
    swapped = replace(cache, rings=cache.rings[[0, 2, 1]])
    attention = attention_for(swapped, HEADS[0], config, SM90)
    outs = run_decode(attention, requests, [PAGE + 8] * 2, swapped, config)
    for out, a, b in zip(outs, requests, requests[::-1], strict=True):
        mixed = replace(a, k=torch.cat([b.k[:-1], a.k[-1:]]), v=torch.cat([b.v[:-1], a.v[-1:]]))
        assert relative_rms(out, oracle(mixed, config, PAGE + 8)[0]) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, monkeypatch, preset, seed):
    # one split of all pages, so that every buffer is filled several times
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 64)
    run_as_cpp(seed)
    requests = make_requests([14 * PAGE + 3, 9 * PAGE], HEADS, 64, torch.float16)
    check(requests, HEADS, KVarNConfig.from_preset(preset), ONE_MULTIPROCESSOR)


def test_tokens_of_the_prefix_are_read_from_records(run_as_cpp):
    config = KVarNConfig.from_preset("kvarn")
    owner = make_request(2 * PAGE + 9, HEADS, 64, torch.float16, row=1)
    cache = make_cache(config, 1, 64, torch.float16, 1 + max(owner.pages), rows=3)
    prefill(torch_form.attend_extend, owner, [2 * PAGE], cache, config)
    guest = make_request(2 * PAGE + 9, HEADS, 64, torch.float16, row=2)
    guest.exact_start = 2 * PAGE
    (out,) = decode_step([guest], HEADS, config, cache=cache, kernels=SM90)
    assert relative_rms(out, oracle(guest, config, 2 * PAGE + 8)[0]) < RELATIVE_RMS[torch.float16] + 1.5e-3


@pytest.mark.parametrize(
    ("preset", "dtype", "head_dim", "heads", "drafts"),
    [
        ("kvarn", torch.bfloat16, 128, (4, 1), 4),
        ("kvarn", torch.float16, 64, (4, 2), 3),
        ("kvarn", torch.float16, 64, (6, 1), 4),
        ("kvarn", torch.bfloat16, 64, (9, 1), 2),
        ("kvarn_k4v4_g128", torch.float16, 64, (8, 1), 8),
        ("kvarn_k3v2_g128", torch.bfloat16, 256, (1, 1), 16),
    ],
)
def test_drafts_that_share_their_splits_match_the_oracle(run_as_cpp, preset, dtype, head_dim, heads, drafts):
    config = KVarNConfig.from_preset(preset)
    # a page ends among the drafts of the first, in its middle and just before its end; not with the others
    starts = [3 * PAGE - drafts // 2, 2 * PAGE - drafts, 3 * PAGE - 1, 70, 2 * PAGE + 5]
    requests = make_requests([n + drafts for n in starts], heads, head_dim, dtype)
    verify_together(requests, starts, heads, config, drafts, SM90)


@pytest.mark.parametrize("exact_start", [PAGE, 2 * PAGE, 3 * PAGE])
@pytest.mark.parametrize("start", [3 * PAGE, 4 * PAGE - 2])
def test_drafts_read_the_tokens_of_the_prefix_from_records(run_as_cpp, exact_start, start):
    config, drafts = KVarNConfig.from_preset("kvarn"), 4
    (owner,) = make_requests([start + drafts], HEADS, 64, torch.float16)
    guest = replace(owner, exact_start=exact_start)
    verify_together([guest], [start], HEADS, config, drafts, SM90)


def test_drafts_of_many_pages_in_many_splits_and_padded_requests(run_as_cpp, monkeypatch):
    config, drafts = KVarNConfig.from_preset("kvarn"), 4
    starts = [9 * PAGE - 2, 130, 7 * PAGE + 60]
    requests = make_requests([n + drafts for n in starts], HEADS, 64, torch.float16)
    for programs in (2, 40):
        monkeypatch.setattr(decode_sm90, "resident_programs", lambda head_dim, columns, gpu, n=programs: n)
        verify_together(requests, starts, HEADS, config, drafts, SM90, padding=2)
