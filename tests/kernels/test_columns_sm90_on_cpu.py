# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of many columns without a GPU, run as C++: products are done when they are waited for, and neither what
they read nor what they write may be touched before."""

from dataclasses import replace

import pytest
import torch
from builders import PAGE
from decode_as_cpp import DecodeAsCpp
from kvarn_kernels.attention import Kernels
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import columns_sm90, decode_plan, decode_sm90
from test_decode import make_requests
from test_verify import verify_together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_columns_sm90.py runs it")
CUDA = Kernels("triton", "cuda", "triton")
KVARN = KVarNConfig.from_preset("kvarn")


@pytest.fixture(scope="module")
def as_cpp(tmp_path_factory):
    before = "reset_products(); std::memset(dynamic_shared, 0xFF, sizeof(dynamic_shared));"
    return DecodeAsCpp(columns_sm90, tmp_path_factory.mktemp("columns"), before)


@pytest.fixture(autouse=True)
def run_as_cpp(as_cpp, monkeypatch):
    """Let steps of an H100 run columns_sm90.cu as C++; return a function that sets the seed of the schedule."""
    as_cpp.seed = 0
    monkeypatch.setattr(columns_sm90, "_compiled", as_cpp.compiled)
    monkeypatch.setattr(decode_sm90, "current_stream", lambda device: 0)
    return lambda seed: setattr(as_cpp, "seed", seed)


def verify(lengths, heads, head_dim, dtype, config, drafts, gpu=H100, padding=0, exact_start=0) -> None:
    """Verify drafts of requests that have so many tokens, those of a request together; compare with the oracle."""
    requests = make_requests([n + drafts for n in lengths], heads, head_dim, dtype)
    requests = [replace(request, exact_start=exact_start) for request in requests]
    verify_together(requests, lengths, heads, config, drafts, CUDA, padding=padding, gpu=gpu)


@pytest.mark.parametrize(
    ("preset", "dtype", "head_dim", "heads", "drafts"),
    [
        ("kvarn", torch.bfloat16, 128, (4, 1), 4),
        ("kvarn", torch.float16, 64, (10, 2), 3),
        ("kvarn", torch.float16, 64, (6, 1), 4),
        ("kvarn", torch.bfloat16, 64, (9, 1), 2),
        ("kvarn", torch.float16, 128, (7, 1), 5),
        ("kvarn", torch.bfloat16, 128, (4, 1), 16),
        ("kvarn_canonical", torch.float16, 64, (22, 2), 1),
        ("kvarn_k4v4_g128", torch.float16, 64, (8, 1), 8),
        ("kvarn_k4v4_g128", torch.bfloat16, 128, (3, 1), 6),
        ("kvarn_k4v3_g128", torch.bfloat16, 64, (5, 1), 7),
        ("kvarn_k4v3_g128", torch.float16, 128, (4, 1), 4),
        ("kvarn_k3v2_g128", torch.bfloat16, 256, (1, 1), 16),
        ("kvarn_k3v2_g128", torch.bfloat16, 128, (2, 1), 8),
        ("kvarn_k3v2_g128", torch.float16, 64, (8, 1), 3),
        ("kvarn_k2v2_g128", torch.bfloat16, 128, (8, 1), 2),
        ("kvarn_k2v2_g128", torch.float16, 64, (4, 1), 5),
        ("kvarn_k4v4_g128", torch.float16, 256, (4, 1), 3),
        ("kvarn_k4v3_g128", torch.bfloat16, 256, (4, 1), 3),
        ("kvarn_k2v2_g128", torch.bfloat16, 256, (4, 1), 4),
    ],
)
def test_drafts_match_the_oracle_in_every_form(preset, dtype, head_dim, heads, drafts):
    # a page ends among the drafts of the first, in its middle and just before its end; not with the others
    lengths = [3 * PAGE - drafts // 2, 2 * PAGE - drafts, 3 * PAGE - 1, 70, 2 * PAGE + 5]
    verify(lengths, heads, head_dim, dtype, KVarNConfig.from_preset(preset), drafts)


@pytest.mark.parametrize("exact_start", [PAGE, 2 * PAGE, 3 * PAGE])
@pytest.mark.parametrize("length", [3 * PAGE, 4 * PAGE - 2])
def test_drafts_read_the_tokens_of_the_prefix_from_records(exact_start, length):
    verify([length], (4, 1), 64, torch.float16, KVARN, 4, exact_start=exact_start)


def test_drafts_of_many_pages_in_many_splits_and_padded_requests(monkeypatch):
    for programs in (2, 40):
        monkeypatch.setattr(columns_sm90, "resident_programs", lambda head_dim, columns, gpu, n=programs: n)
        verify([9 * PAGE - 2, 130, 7 * PAGE + 60], (4, 1), 64, torch.float16, KVARN, 4, padding=2)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("head_dim", "drafts"), [(64, 4), (128, 8)])
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, monkeypatch, head_dim, drafts, seed):
    # one split of all pages, so that every buffer is filled several times
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 64)
    run_as_cpp(seed)
    gpu = replace(H100, multiprocessors=1)
    verify([11 * PAGE + 3, 7 * PAGE - 1], (4, 1), head_dim, torch.bfloat16, KVARN, drafts, gpu)
