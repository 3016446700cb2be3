# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of verify steps: run as C++ or on a GPU against the oracle; compiled by NVRTC into registers."""

from dataclasses import replace

import pytest
import torch
from builders import PAGE
from cubin import compiled, product_groups, registers_and_stack
from decode_as_cpp import DecodeAsCpp
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import attend_rows, decode_plan, decode_sm90, verify_sm90
from test_columns_sm90 import CUDA, lengths_of, verify
from test_decode import make_requests
from test_verify import chain, verify_together

KVARN = KVarNConfig.from_preset("kvarn")
# bytes of local memory: a few values of the prologue
STACK = 96
# preset, dtype, head_dim, (query heads, KV heads), drafts: blocks of 64 and of 128 rows, more than a block
FORMS = [
    ("kvarn", torch.bfloat16, 128, (4, 1), 16),
    ("kvarn", torch.float16, 64, (16, 2), 9),
    ("kvarn", torch.bfloat16, 64, (16, 1), 9),
    ("kvarn", torch.float16, 128, (8, 1), 16),
    ("kvarn_k4v4_g128", torch.float16, 64, (9, 1), 8),
    ("kvarn_k4v4_g128", torch.bfloat16, 128, (9, 1), 7),
    ("kvarn_k4v3_g128", torch.bfloat16, 128, (10, 2), 10),
    ("kvarn_k3v2_g128", torch.float16, 128, (7, 1), 8),
    ("kvarn_k3v2_g128", torch.bfloat16, 64, (5, 1), 16),
    ("kvarn_k2v2_g128", torch.bfloat16, 128, (16, 1), 10),
    ("kvarn_k2v2_g128", torch.float16, 64, (4, 1), 17),
]
# run as C++ (5 s of g++ each), and built by ptxas (9 s), at every commit
ON_CPU, BUILT = [FORMS[n] for n in (0, 1, 2)], FORMS[:1]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the same steps run by -m gpu")


def form_name(form: tuple) -> str:
    return "-".join(map(str, form))


def others_long(chosen: list[tuple]) -> list:
    """Return all forms, with those that are not chosen marked as long."""
    return [form if form in chosen else pytest.param(form, marks=pytest.mark.long) for form in FORMS]


@pytest.fixture(scope="module")
def as_cpp(tmp_path_factory):
    before = "reset_products(); std::memset(dynamic_shared, 0xFF, sizeof(dynamic_shared));"
    return DecodeAsCpp(verify_sm90, tmp_path_factory.mktemp("verify"), before)


@pytest.fixture(autouse=True)
def run_as_cpp(as_cpp, monkeypatch):
    """Let the kernel run as C++ where there is no GPU; return a function that sets the seed of the schedule."""
    as_cpp.seed = 0
    if not torch.cuda.is_available():
        monkeypatch.setattr(verify_sm90, "_compiled", as_cpp.compiled)
        monkeypatch.setattr(decode_sm90, "current_stream", lambda device: 0)
    return lambda seed: setattr(as_cpp, "seed", seed)


@on_cpu
@pytest.mark.parametrize("form", others_long(ON_CPU), ids=form_name)
def test_drafts_match_the_oracle_in_every_form(form):
    verify(*form, lengths_of(form[-1]), gpu=H100)


@on_cpu
def test_drafts_do_not_see_the_large_ones_behind_them():
    starts, heads, drafts = [3 * PAGE - 2, 2 * PAGE + 9, 130], (16, 2), 9
    requests = make_requests([n + drafts for n in starts], heads, 64, torch.float16)
    accepted = torch.randint(1, drafts, (len(starts),)).tolist()
    drafted = [chain(*each, drafts) for each in zip(requests, starts, accepted, strict=True)]
    verify_together(drafted, starts, heads, KVARN, drafts, CUDA, gpu=H100)


@on_cpu
@pytest.mark.parametrize("exact_start", [PAGE, 2 * PAGE, 3 * PAGE])
@pytest.mark.parametrize("length", [3 * PAGE, 4 * PAGE - 2])
def test_drafts_read_the_tokens_of_the_prefix_from_records(exact_start, length):
    (owner,) = make_requests([length + 9], (16, 2), 64, torch.float16)
    guest = replace(owner, exact_start=exact_start)
    verify_together([guest], [length], (16, 2), KVARN, 9, CUDA, gpu=H100)


@on_cpu
@pytest.mark.parametrize("programs", [2, 40])
def test_drafts_of_many_pages_in_many_splits_and_padded_requests(monkeypatch, programs):
    monkeypatch.setattr(verify_sm90, "resident_programs", lambda head_dim, columns, gpu: programs)
    lengths = [9 * PAGE - 2, 130, 7 * PAGE + 60]
    verify("kvarn", torch.float16, 64, (16, 2), 9, lengths, gpu=H100, padding=2)


@on_cpu
@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("form", [(64, (16, 2), 9), (128, (4, 1), 16)], ids=form_name)
def test_records_may_land_late_and_warps_stand_still(run_as_cpp, monkeypatch, form, seed):
    # one split of all pages, so that every buffer is filled several times
    monkeypatch.setattr(decode_plan, "MIN_SPLIT_UNITS", 64)
    run_as_cpp(seed)
    head_dim, heads, drafts = form
    dtype = torch.float16 if head_dim == 64 else torch.bfloat16
    verify("kvarn", dtype, head_dim, heads, drafts, [7 * PAGE + 3], gpu=replace(H100, multiprocessors=1))


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=form_name)
def test_drafts_match_the_oracle_on_a_gpu(form, monkeypatch):
    drafts = form[-1]
    verify(*form, lengths_of(drafts))
    # splits of many pages
    monkeypatch.setattr(verify_sm90, "resident_programs", lambda head_dim, columns, gpu: 3)
    verify(*form, [22 * PAGE - drafts // 2, 17 * PAGE + 3], padding=1)


@pytest.mark.parametrize("form", others_long(BUILT), ids=form_name)
def test_verify_sm90_compiles_into_registers(form, tmp_path):
    preset, dtype, head_dim, (query_heads, kv_heads), drafts = form
    config = KVarNConfig.from_preset(preset)
    ring_pages = config.ring_pages(head_dim, 2, drafts)
    group, is_bf16 = query_heads // kv_heads, dtype == torch.bfloat16
    defines = verify_sm90.constants(config, head_dim, kv_heads, group, is_bf16, ring_pages, drafts)
    code = compiled(nvrtc.source(verify_sm90.SOURCE, defines), verify_sm90.KERNEL, verify_sm90.ARCHITECTURE)
    registers, stack = registers_and_stack(code, tmp_path)
    assert registers * defines["THREADS"] <= 65536 and stack <= STACK, (registers, stack)
    # scores and sums of a tile
    assert product_groups(code, tmp_path) == (2 * (head_dim // 16), 2)


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in FORMS}))
@pytest.mark.parametrize("head_dim", attend_rows.HEAD_DIMS)
@pytest.mark.parametrize("drafts", [16, 32])
def test_verify_sm90_fits_the_shared_memory_and_registers_of_an_h100(preset, head_dim, drafts):
    config, warps = KVarNConfig.from_preset(preset), verify_sm90.warps(4, drafts)
    defines = verify_sm90.constants(config, head_dim, 8, 4, True, config.ring_pages(head_dim, 2, drafts), drafts)
    taken = defines["SHARED_BYTES"] + attend_rows.table_bytes(warps.rows, head_dim) + attend_rows.RESERVED_BYTES
    assert taken <= H100.shared_of_multiprocessor
    # a block begins with as many for each thread, a multiple of 8, as fit
    taken = 256 * warps.writer_registers + 2 * warps.rows * warps.reader_registers
    assert taken <= 65536 // warps.threads // 8 * 8 * warps.threads


@pytest.mark.parametrize(
    ("capability", "head_dim", "group", "drafts", "serves"),
    [
        ((9, 0), 128, 4, 16, True),
        ((9, 0), 128, 4, 12, False),
        ((9, 0), 64, 8, 9, True),
        ((9, 0), 64, 8, 8, False),
        ((9, 0), 256, 4, 16, False),
        ((10, 0), 128, 4, 16, False),
    ],
)
def test_verify_sm90_serves_more_columns_than_a_block_of_columns_sm90(capability, head_dim, group, drafts, serves):
    assert verify_sm90.serves(head_dim, group, drafts, replace(H100, capability=capability)) is serves
