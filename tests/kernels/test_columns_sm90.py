# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of many columns: compiled by NVRTC without a GPU into registers; on a GPU against the oracle."""

from dataclasses import replace

import pytest
import torch
from builders import PAGE
from cubin import compiled, registers_and_stack
from kvarn_kernels.attention import Kernels
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import columns_sm90, decode_sm90
from test_decode import make_requests
from test_verify import verify_together

# preset, dtype, head_dim, (query heads, KV heads), drafts
FEW = [
    ("kvarn", torch.bfloat16, 128, (4, 1), 4),
    ("kvarn", torch.float16, 128, (4, 1), 8),
    ("kvarn", torch.bfloat16, 64, (9, 1), 2),
    ("kvarn", torch.bfloat16, 128, (4, 1), 12),
    ("kvarn_k4v4_g128", torch.float16, 64, (8, 1), 8),
    ("kvarn_k3v2_g128", torch.bfloat16, 256, (1, 1), 16),
]
FORMS = [
    *FEW,
    ("kvarn", torch.float16, 64, (10, 2), 3),
    ("kvarn", torch.float16, 64, (6, 1), 4),
    ("kvarn", torch.float16, 128, (7, 1), 5),
    ("kvarn_canonical", torch.float16, 64, (22, 2), 1),
    ("kvarn_k4v4_g128", torch.bfloat16, 128, (3, 1), 6),
    ("kvarn_k4v3_g128", torch.bfloat16, 64, (5, 1), 7),
    ("kvarn_k4v3_g128", torch.float16, 128, (4, 1), 4),
    ("kvarn_k3v2_g128", torch.bfloat16, 128, (2, 1), 8),
    ("kvarn_k3v2_g128", torch.float16, 64, (8, 1), 3),
    ("kvarn_k2v2_g128", torch.bfloat16, 128, (8, 1), 2),
    ("kvarn_k2v2_g128", torch.float16, 64, (4, 1), 5),
    ("kvarn_k4v4_g128", torch.float16, 256, (4, 1), 3),
    ("kvarn_k4v3_g128", torch.bfloat16, 256, (4, 1), 3),
    ("kvarn_k2v2_g128", torch.bfloat16, 256, (4, 1), 4),
]
CUDA = Kernels("triton", "cuda", "triton")


def lengths_of(drafts: int) -> list[int]:
    """Return lengths before the drafts: a page ends among those of the first, in its middle and just before its end."""
    return [3 * PAGE - drafts // 2, 2 * PAGE - drafts, 3 * PAGE - 1, 70, 2 * PAGE + 5]


def verify(preset, dtype, head_dim, heads, drafts, lengths, **more) -> None:
    """Verify drafts of requests that have so many tokens, those of a request together; compare with the oracle."""
    requests = make_requests([n + drafts for n in lengths], heads, head_dim, dtype)
    verify_together(requests, lengths, heads, KVarNConfig.from_preset(preset), drafts, CUDA, **more)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS, ids=[f"{'few' if form in FEW else 'more'}{n}" for n, form in enumerate(FORMS)])
def test_drafts_match_the_oracle_on_a_gpu(form, monkeypatch):
    drafts = form[-1]
    verify(*form, lengths_of(drafts))
    # splits of many pages
    monkeypatch.setattr(columns_sm90, "resident_programs", lambda head_dim, columns, gpu: 3)
    verify(*form, [22 * PAGE - drafts // 2, 17 * PAGE + 3], padding=1)


def code_of(form: tuple) -> tuple[bytes, dict]:
    preset, dtype, head_dim, (query_heads, kv_heads), drafts = form
    config, group, is_bf16 = KVarNConfig.from_preset(preset), query_heads // kv_heads, dtype == torch.bfloat16
    ring_pages = config.ring_pages(head_dim, 2, drafts)
    defines = columns_sm90.constants(config, head_dim, kv_heads, group, is_bf16, ring_pages, drafts)
    source = nvrtc.source(columns_sm90.SOURCE, defines)
    return compiled(source, columns_sm90.KERNEL, columns_sm90.ARCHITECTURE), defines


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(x) for x in form))
def test_columns_sm90_compiles_into_registers(form, tmp_path):
    code, defines = code_of(form)
    registers, stack = registers_and_stack(code, tmp_path)
    # of 128 registers a few values of the prologue may be spilled
    assert registers * decode_sm90.THREADS * defines["MIN_BLOCKS"] <= 65536 and stack <= 80, (registers, stack)


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in FORMS}))
@pytest.mark.parametrize("head_dim", list(columns_sm90.BLOCKS))
def test_columns_sm90_fits_the_shared_memory_of_an_h100(preset, head_dim):
    config = KVarNConfig.from_preset(preset)
    for width in range(16, columns_sm90.BLOCKS[head_dim][-1][0] + 1, 8):
        defines = columns_sm90.constants(config, head_dim, 8, 8, True, config.ring_pages(head_dim, 2, 16), width // 8)
        assert defines["BLOCK_COLUMNS"] == width and defines["STAGES"] >= 2
        tables = -(-(columns_sm90.COLUMN_BYTES * width + 8 * defines["STAGES"]) // 128) * 128
        # 1 KiB of each block is reserved
        assert (defines["SHARED_BYTES"] + tables + 1024) * defines["MIN_BLOCKS"] <= H100.shared_of_multiprocessor


@pytest.mark.parametrize(
    ("capability", "group", "drafts", "serves"),
    [((9, 0), 4, 4, True), ((9, 0), 4, 2, False), ((9, 0), 8, 1, False), ((9, 0), 9, 1, True), ((10, 0), 4, 4, False)],
)
def test_columns_sm90_serves_more_than_8_columns_on_hopper(capability, group, drafts, serves):
    assert columns_sm90.serves(128, group, drafts, replace(H100, capability=capability)) is serves
