# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of many columns without a GPU, run as C++: products are done when they are waited for, and neither what
they read nor what they write may be touched before."""

from dataclasses import replace

import pytest
import torch
from builders import PAGE
from decode_as_cpp import DecodeAsCpp
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import columns_sm90, decode_plan, decode_sm90
from test_columns_sm90 import CUDA, FORMS, lengths_of, verify
from test_decode import make_requests
from test_verify import chain, verify_together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU test_columns_sm90.py runs it")
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


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(x) for x in form))
def test_drafts_match_the_oracle_in_every_form(form):
    verify(*form, lengths_of(form[-1]), gpu=H100)


@pytest.mark.parametrize("drafts", [4, 8])
def test_drafts_do_not_see_the_large_ones_behind_them(drafts):
    starts, heads = [3 * PAGE - 2, 2 * PAGE + 9, 130], (4, 1)
    requests = make_requests([n + drafts for n in starts], heads, 64, torch.float16)
    accepted = torch.randint(1, drafts, (len(starts),)).tolist()
    drafted = [chain(*each, drafts) for each in zip(requests, starts, accepted, strict=True)]
    verify_together(drafted, starts, heads, KVARN, drafts, CUDA, gpu=H100)


@pytest.mark.parametrize("exact_start", [PAGE, 2 * PAGE, 3 * PAGE])
@pytest.mark.parametrize("length", [3 * PAGE, 4 * PAGE - 2])
def test_drafts_read_the_tokens_of_the_prefix_from_records(exact_start, length):
    (owner,) = make_requests([length + 4], (4, 1), 64, torch.float16)
    guest = replace(owner, exact_start=exact_start)
    verify_together([guest], [length], (4, 1), KVARN, 4, CUDA, gpu=H100)


def test_drafts_of_many_pages_in_many_splits_and_padded_requests(monkeypatch):
    for programs in (2, 40):
        monkeypatch.setattr(columns_sm90, "resident_programs", lambda head_dim, columns, gpu, n=programs: n)
        lengths = [9 * PAGE - 2, 130, 7 * PAGE + 60]
        verify("kvarn", torch.float16, 64, (4, 1), 4, lengths, gpu=H100, padding=2)


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize(("head_dim", "drafts"), [(64, 4), (128, 8)])
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, monkeypatch, head_dim, drafts, seed):
    # one split of all pages, so that every buffer is filled several times
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 64)
    run_as_cpp(seed)
    gpu = replace(H100, multiprocessors=1)
    verify("kvarn", torch.bfloat16, head_dim, (4, 1), drafts, [11 * PAGE + 3, 7 * PAGE - 1], gpu=gpu)
