# SPDX-License-Identifier: Apache-2.0
"""What `Attention` chooses, and that `describe` says so."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace

import flashinfer_standin
import pytest
import torch
from kvarn_kernels import attention, extend_choice
from kvarn_kernels.attention import TORCH, Attention, Limits, choose_kernels
from kvarn_kernels.batch import DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense, paged_calls
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.shape import AttentionShape

CUDA, META, CPU = (torch.device(name) for name in ("cuda", "meta", "cpu"))
KVARN, CANONICAL = KVarNConfig.from_preset("kvarn"), KVarNConfig.from_preset("kvarn_canonical")
# of a model with 32 query heads and 8 KV heads of 128 channels
SHAPE = AttentionShape(32, 8, 128, torch.bfloat16)
LIMITS = Limits(decode_batch=2, request_pages=2, extend_requests=1, chunk_pages=1)
ALL_CUDA = "encode by CUDA C++ (encode.cu), decode by CUDA C++ (decode_sm90.cu), "
AMPERE = "encode by CUDA C++ (encode.cu), decode by Triton, "
TRITON = "encode by Triton, decode by Triton, "
FLASHINFER = "short extends by Triton, long extends by FlashInfer"
ON_HOPPER = "short extends by CUDA C++ (extend_sm90.cu), "
ONE_FORM = "extends by Triton"


@pytest.fixture
def host(monkeypatch):
    """Return a function that lets a host have an H100 of another capability, NVRTC, and libraries or not."""

    def describe(capability=(9, 0), *, flashinfer: bool = True, fa3: bool = False) -> None:
        monkeypatch.setattr(attention, "gpu_of", lambda device: replace(H100, capability=capability))
        monkeypatch.setattr(attention.nvrtc, "is_available", lambda: True)
        monkeypatch.setattr(attention.paged_calls, "has_fa3", lambda: fa3)
        monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: True if flashinfer else None)

    return describe


def on_cuda(shape: AttentionShape, config: KVarNConfig, device: torch.device = META) -> Attention:
    """Return what serves on a CUDA device, with its workspaces on another one."""
    return Attention(shape, config, device, LIMITS, choose_kernels(shape, config, CUDA))


@pytest.mark.parametrize(
    ("capability", "dtype", "config", "builds", "text"),
    [
        ((9, 0), torch.bfloat16, KVARN, True, ALL_CUDA + ON_HOPPER + "long extends by FlashInfer"),
        ((9, 0), torch.bfloat16, KVARN, False, ALL_CUDA + ON_HOPPER + "others by Triton"),
        ((10, 0), torch.float16, KVARN, False, ALL_CUDA + ONE_FORM),
        ((9, 0), torch.bfloat16, CANONICAL, True, ALL_CUDA + ONE_FORM),
        ((8, 0), torch.bfloat16, KVARN, True, AMPERE + FLASHINFER),
        # without NVRTC
        ((0, 0), torch.bfloat16, KVARN, True, TRITON + FLASHINFER),
        ((9, 0), torch.float32, KVARN, True, TRITON + ONE_FORM),
    ],
)
def test_describe_names_what_runs_on_a_gpu(host, monkeypatch, capability, dtype, config, builds, text):
    def refuse(*_, **__):
        raise RuntimeError("no nvcc")

    host(capability)
    monkeypatch.setattr(extend_dense, "make_workspace", refuse)
    # on the meta device no workspace of FlashInfer is built
    assert on_cuda(replace(SHAPE, dtype=dtype), config, META if builds else CPU).describe() == text


@pytest.mark.parametrize(
    ("capability", "config", "drafts", "source"),
    [
        # 64 and 48 columns
        ((9, 0), KVARN, 16, "verify_sm90.cu"),
        ((9, 0), KVARN, 12, "columns_sm90.cu"),
        # 8 columns
        ((9, 0), KVARN, 2, "decode_sm90.cu"),
        # every draft is attended as a request
        ((9, 0), CANONICAL, 4, "decode_sm90.cu"),
        ((10, 0), KVARN, 4, "decode_sm90.cu"),
    ],
)
def test_verify_steps_of_many_columns_have_kernels_of_their_own(host, capability, config, drafts, source):
    host(capability)
    limits = replace(LIMITS, decode_batch=2 * drafts, draft_tokens=drafts)
    described = Attention(SHAPE, config, META, limits, choose_kernels(SHAPE, config, CUDA)).describe()
    assert f"decode by CUDA C++ ({source})" in described


def test_models_with_sliding_windows_have_a_plan_for_each_and_one_decode_kernel(host):
    host((9, 0))
    limits, kernels = replace(LIMITS, decode_batch=8, draft_tokens=4), choose_kernels(SHAPE, KVARN, CUDA)
    made = [Attention(SHAPE, KVARN, META, limits, kernels, sliding_windows=x) for x in ((), (512, 0, 1024, 512))]
    assert [x.describe().count("decode_sm90.cu") for x in made] == [0, 1]
    assert made[1].sliding_windows == (512, 1024)
    workspace = made[1]._decode_workspace
    plans = list(made[1]._sliding_workspaces.values())
    assert [plan.sliding_window for plan in plans] == [512, 1024]
    assert all(plan.partial_out is workspace.partial_out for plan in plans)
    assert len({id(plan.split_indptr) for plan in (workspace, *plans)}) == 3
    # two plans, and the room of a planned call of FlashInfer for each
    with_windows = extend_dense.workspace_bytes(SHAPE, 10**6, 5, "flashinfer", H100, (512, 1024), 1)
    without = extend_dense.workspace_bytes(SHAPE, 10**6, 5, "flashinfer", H100)
    assert with_windows - without == 2 * paged_calls.FlashInfer.call_bytes
    few = Attention(SHAPE, KVARN, META, limits, replace(kernels, dense=""), sliding_windows=(512, 1024))
    assert few.num_bytes == workspace.num_bytes + sum(plan.plan_bytes for plan in plans)
    assert made[1].num_bytes == few.num_bytes + extend_dense.workspace_bytes(
        SHAPE, limits.extend_pages, 5, "flashinfer", H100, (512, 1024), 1
    )


@pytest.mark.parametrize(
    ("capability", "text"),
    [
        ((9, 0), ALL_CUDA + ON_HOPPER + "long extends by FlashAttention 3"),
        # built for Hopper
        ((10, 0), ALL_CUDA + FLASHINFER),
        ((8, 0), AMPERE + FLASHINFER),
    ],
)
def test_flash_attention_3_attends_on_hopper(host, capability, text):
    host(capability, fa3=True)
    assert on_cuda(SHAPE, KVARN).describe() == text


def test_flash_attention_3_is_the_file_beside_sgl_kernel(monkeypatch, tmp_path):
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(paged_calls.importlib.util, "find_spec", lambda name: spec)
    assert not paged_calls.has_fa3()
    (tmp_path / "flash_ops.abi3.so").touch()
    assert paged_calls.has_fa3()
    monkeypatch.setattr(paged_calls.importlib.util, "find_spec", lambda name: None)
    assert not paged_calls.has_fa3()


@pytest.mark.parametrize("flashinfer", [True, False])
def test_where_flash_attention_3_does_not_load_others_attend(host, monkeypatch, caplog, flashinfer):
    host(fa3=True)
    monkeypatch.setitem(sys.modules, "sgl_kernel.flash_attn", None)
    monkeypatch.setitem(sys.modules, "sgl_kernel", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer_standin if flashinfer else None)
    served = on_cuda(SHAPE, KVARN, CPU)
    others = "long extends by FlashInfer" if flashinfer else "others by Triton"
    assert served.describe() == ALL_CUDA + ON_HOPPER + others
    assert "FlashAttention 3's prefill kernels are not to be had" in caplog.text
    assert ("FlashInfer's prefill kernels are not to be had" in caplog.text) == (not flashinfer)
    # what is charged is what was taken
    assert bool(served.kernels.dense) == flashinfer


def test_describe_does_not_name_a_flashinfer_that_is_not_there(host):
    host(flashinfer=False)
    assert on_cuda(SHAPE, KVARN).describe() == ALL_CUDA + ON_HOPPER + "others by Triton"


def test_describe_names_torch_or_the_interpreted_kernels_on_a_cpu(monkeypatch):
    monkeypatch.delenv(attention.CPU_FORM_ENV, raising=False)
    assert Attention(SHAPE, KVARN, CPU, LIMITS).describe() == "encode, decode and extends by torch"
    monkeypatch.setenv(attention.CPU_FORM_ENV, "triton")
    assert Attention(SHAPE, KVARN, CPU, LIMITS).describe() == TRITON + ONE_FORM
    monkeypatch.setenv(attention.CPU_FORM_ENV, "numpy")
    with pytest.raises(ValueError, match="KVARN_CPU_FORM to be torch or triton, got 'numpy'"):
        Attention(SHAPE, KVARN, CPU, LIMITS)


def form_of(new: list[int], cached: int, *, library: str = "", short: bool = False, heads: int = 32) -> str:
    """Return who attends a step of requests with so many new tokens on as many cached ones."""
    lens, ends = [cached] * len(new), [cached + n for n in new]
    batch = ExtendBatch(*[torch.empty(0)] * 6, lens, ends)
    shape = replace(SHAPE, num_qo_heads=heads)
    return extend_choice.extend_form(batch, shape, KVARN, H100, library, has_short=short)


def test_attention_attends_long_steps_on_a_library(host, monkeypatch):
    def is_long(tokens: int, cached: int = 0, heads: int = 32, library: str = paged_calls.FLASHINFER) -> bool:
        return form_of([tokens], cached, library=library, heads=heads) == extend_choice.DENSE

    enough, fa3 = extend_choice.DENSE_TOKENS, paged_calls.FA3
    assert is_long(enough, library=fa3) and not is_long(enough - 1, library=fa3)
    assert is_long(32, 8192, library=fa3) and not is_long(32, 8191, library=fa3)
    host()
    assert is_long(enough) and not is_long(enough - 1)
    # 32 heads of 128, and a rank with 8 of them
    assert is_long(128, 49_152) and not is_long(128, 49_151)
    assert is_long(128, 4 * 49_152, 8) and not is_long(128, 4 * 49_152 - 1, 8)
    assert form_of([enough], 0) == extend_choice.RECORDS
    assert choose_kernels(SHAPE, KVARN, CUDA).dense
    assert not choose_kernels(SHAPE, CANONICAL, CUDA).dense
    assert not choose_kernels(replace(SHAPE, dtype=torch.float32), KVARN, CUDA).dense
    monkeypatch.delenv(attention.CPU_FORM_ENV, raising=False)
    assert choose_kernels(SHAPE, KVARN, CPU) == TORCH
    host(flashinfer=False)
    assert not choose_kernels(SHAPE, KVARN, CUDA).dense


@pytest.mark.parametrize("library", ["", paged_calls.FLASHINFER, paged_calls.FA3])
def test_few_tokens_on_a_long_prefix_have_a_kernel_of_their_own(host, library):
    enough, short = extend_choice.SHORT_PAGES * 128, extend_choice.SHORT

    def of(new: list[int], cached: int, heads: int = 32) -> str:
        return form_of(new, cached, library=library, short=True, heads=heads)

    assert of([1], enough) == short and of([1], enough - 1) != short
    # 32/8 heads: 128 tokens have 512 query heads of a KV head, of 64/8 heads 64 do
    assert of([128], 32_768) == of([128, 1], 32_768) == short
    assert of([129], 32_768) != short and of([1, 129], 32_768) != short
    assert of([64], 32_768, heads=64) == short and of([65], 32_768, heads=64) != short
    # partial results: 16 turns of 100 tokens take 25 MiB, 64 would take 100
    assert of([100] * 16, 20_480) == short and of([100] * 64, 20_480) != short
    assert form_of([1], enough, library=library) != short


def test_the_kernel_of_short_steps_reads_no_page_that_they_encode():
    def of(new: int, cached: int) -> bool:
        return form_of([new], cached, short=True, heads=8) == extend_choice.SHORT

    # a query head for each KV head: blocks allow 512 tokens, whose last ones read the chunk's first pages as records
    assert of(256, 32 * 128) and not of(257, 32 * 128)
    assert of(257, 32 * 128 - 1) is False and of(129, 32 * 128 + 127) and not of(130, 32 * 128 + 127)


def test_the_kernel_of_short_steps_runs_on_hopper_where_sums_have_no_fixed_order(host):
    host()
    assert choose_kernels(SHAPE, KVARN, CUDA).short == "cuda"
    assert not choose_kernels(SHAPE, CANONICAL, CUDA).short
    assert not choose_kernels(replace(SHAPE, head_dim=256), KVARN, CUDA).short
    host((10, 0))
    assert not choose_kernels(SHAPE, KVARN, CUDA).short


@pytest.mark.parametrize(
    ("capability", "config", "together"), [((9, 0), KVARN, 4), ((9, 0), CANONICAL, 1), ((8, 0), KVARN, 4)], ids=str
)
def test_drafts_share_their_splits_where_the_order_of_sums_is_free(host, capability, config, together):
    host(capability)
    limits = replace(LIMITS, decode_batch=12, draft_tokens=4)
    made = Attention(SHAPE, config, META, limits, choose_kernels(SHAPE, config, CUDA))
    workspace = made._decode_workspace
    assert workspace.drafts == together and workspace.rotated_q.shape == (12, 32, 128)
    assert len(workspace.max_splits) == 12 // together
    assert workspace.partial_out.shape[1:] == (together * 32, 128)
    made.reserve(12)
    assert made._decode_workspace is workspace
    made.reserve(20)
    assert made._decode_workspace.rotated_q.shape[0] == 20


def test_a_step_with_another_number_of_drafts_than_the_limits_say_is_refused(host):
    host()
    limits = replace(LIMITS, decode_batch=12, draft_tokens=4)
    made = Attention(SHAPE, KVARN, META, limits, choose_kernels(SHAPE, KVARN, CUDA))
    rows = torch.zeros(6, 1, dtype=torch.int32)
    batch = DecodeBatch(rows, rows[:, 0], rows, rows[:, 0], rows[:, 0], drafts=2)
    with pytest.raises(ValueError, match="expected a step with 4 drafts of each request, as its limits say, got 2"):
        made.plan(batch)
