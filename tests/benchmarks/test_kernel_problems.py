# SPDX-License-Identifier: Apache-2.0
"""bench_decode and bench_prefill: what they time is right, and their parts are those of a layer."""

from __future__ import annotations

from types import SimpleNamespace

import fa3_standin
import flashinfer_standin
import pytest
import torch
from kvarn_kernels.attention import TORCH, TRITON
from kvarn_kernels.dense import extend_dense, paged_calls
from kvarn_kernels.shape import AttentionShape

from benchmarks.common.rows import Rows, read
from benchmarks.kernels import (
    bench_copy_pages,
    bench_decode,
    bench_prefill,
    decode_providers,
    parts,
    prefill_providers,
    timing,
)
from benchmarks.kernels.attention_problem import DEVICE, DTYPE, check
from benchmarks.kernels.decode_problem import Problem as DecodeProblem
from benchmarks.kernels.decode_problem import Shape as DecodeShape
from benchmarks.kernels.prefill_problem import Problem as PrefillProblem
from benchmarks.kernels.prefill_problem import Shape as PrefillShape

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the benchmarks check themselves on a GPU")
HEADS = AttentionShape(4, 2, 64, DTYPE)


@pytest.fixture
def decode() -> DecodeProblem:
    """Return two requests of 320 tokens: a page as a record, a page and a half in the ring."""
    return DecodeProblem.make(DecodeShape(2, 320, HEADS), unique=4)


@pytest.fixture
def prefill() -> PrefillProblem:
    """Return 200 new tokens on two pages."""
    return PrefillProblem.make(PrefillShape(200, 256, HEADS), distinct=4)


@pytest.mark.parametrize("kernels", [TORCH, TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_decode_of_a_preset_agrees_with_the_oracle(preset, kernels, decode):
    (candidate,) = decode_providers.kvarn(decode, preset, kernels=kernels)
    # bfloat16 inputs on a CPU
    assert check(candidate) < candidate.tolerance
    assert candidate.layers == 8 and candidate.bytes > 0


@pytest.mark.parametrize("kernels", [TORCH, TRITON], ids=["torch", "triton"])
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_verify_of_a_preset_agrees_with_the_oracle(preset, kernels):
    # the drafts go over the end of a page
    problem = DecodeProblem.make(DecodeShape(2, 258, HEADS, drafts=4), unique=4)
    (candidate,) = decode_providers.kvarn(problem, preset, kernels=kernels)
    assert candidate.samples == [0, 3, 7] and check(candidate) < candidate.tolerance


def test_pages_of_a_verify_problem_hold_its_drafts():
    problem = DecodeProblem.make(DecodeShape(2, 258, HEADS, drafts=4), unique=4)
    table = problem.physical_pages()
    k, _ = problem.paged(table, DTYPE)
    for row in (3, 7):
        pages = k[table[row // 4].long()].flatten(0, 1)[:258]
        assert torch.equal(pages, problem.keys_values(row)[0])


def test_decode_parts_run_one_after_the_other_give_a_layer(decode):
    (whole,) = decode_providers.kvarn(decode, "kvarn", kernels=TRITON)
    whole.run(0)
    (part,) = decode_providers.kvarn(decode, "kvarn", part="merge", kernels=TRITON)
    expected = part.out.clone()
    part.out.zero_()
    part.run(0)
    # the workspace holds what the whole layer left there
    assert torch.equal(part.out, expected) and whole.out.isfinite().all()
    (part,) = decode_providers.kvarn(decode, "kvarn", part="store", kernels=TRITON)
    part.out.zero_()
    part.run(0)
    assert not part.out.any() and part.expected is None


def test_parts_are_functions_again_after_their_with_statement():
    before = [getattr(place, name) for places in parts.DECODE.values() for place, name in places]
    with parts.only("attend"):
        assert parts.DECODE["merge"][0][0].merge_splits is not before[-1]
    assert before == [getattr(place, name) for places in parts.DECODE.values() for place, name in places]


@pytest.mark.parametrize("kernels", [TORCH, TRITON], ids=["torch", "triton"])
def test_prefill_of_a_preset_agrees_with_the_oracle(kernels, prefill):
    (candidate,) = prefill_providers.kvarn(prefill, "kvarn", kernels=kernels)
    assert check(candidate) < candidate.tolerance


@pytest.mark.parametrize("name", extend_dense.LIBRARIES)
def test_dense_prefill_agrees_with_the_oracle_and_has_all_parts(prefill, monkeypatch, name):
    standin = {
        paged_calls.FLASHINFER: paged_calls.FlashInfer(DEVICE, flashinfer_standin),
        paged_calls.FA3: paged_calls.FlashAttention3(DEVICE, fa3_standin.flash_attn_with_kvcache),
    }
    (candidate,) = prefill_providers.kvarn(prefill, "kvarn", standin[name], TRITON)
    assert check(candidate) < candidate.tolerance
    events = SimpleNamespace(record=lambda: None)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: events)
    with candidate.timed() as found:
        candidate.run(0)
    # one segment is not merged, and no kernel reads records
    assert {part for part, pairs in found.items() if pairs} == parts.PREFILL.keys() - {"merge", "columns", "rest"}


def test_prefill_of_several_requests_agrees_with_the_oracle_and_float32_attention():
    problem = PrefillProblem.make(PrefillShape(40, 256, HEADS, 2), distinct=4)
    assert problem.samples == [0, 40, 60, 79]
    (ours,) = prefill_providers.kvarn(problem, "kvarn", kernels=TORCH)
    (baseline,) = prefill_providers.fa3_bf16(problem, fa3_standin.flash_attn_with_kvcache)
    for candidate in (ours, baseline):
        assert check(candidate) < candidate.tolerance


def test_prefill_of_the_baseline_agrees_with_float32_attention(prefill):
    (candidate,) = prefill_providers.fa3_bf16(prefill, fa3_standin.flash_attn_with_kvcache)
    assert check(candidate) < candidate.tolerance


def test_baselines_attend_to_the_keys_of_the_problem(decode):
    page_table = decode.physical_pages()
    k, v = decode.keys_values(1)
    for x, cache in zip((k, v), decode.paged(page_table, DTYPE), strict=True):
        assert torch.equal(cache[page_table[1].long()].flatten(0, 1)[: len(x)], x)


def test_comparison_writes_the_fastest_candidate_and_leaves_out_a_wrong_one(decode, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    times = {"fa3_bf16": 40.0, "kvarn": 10.0}
    made = {name: decode_providers.kvarn(decode, "kvarn", kernels=TORCH) for name in times}
    made["wrong"] = decode_providers.kvarn(decode, "kvarn", kernels=TORCH)
    made["wrong"][0].tolerance = 0.0
    of = {id(made[name][0]): taken for name, taken in times.items()}

    def missing(problem):
        raise ImportError("no such module")

    providers = {name: lambda problem, name=name: made[name] for name in made} | {"missing": missing}
    timing.compare(
        [("2x320", decode, {"batch": 2})],
        providers,
        lambda problem: lambda candidate: [timing.Figure.of("time", [of[id(candidate)]], "us")],
        Rows(tmp_path / "rows.csv", "decode"),
        SimpleNamespace(check=True),
    )
    found = {(row["provider"], row["metric"]): row["value"] for row in read(tmp_path / "rows.csv", "decode")}
    assert found["kvarn", "time"] == "10.0" and found["kvarn", timing.SPEEDUP] == "4.0"
    assert {provider for provider, _ in found} == {"fa3_bf16", "kvarn"}
    said = capsys.readouterr().err
    assert "wrong: relative error" in said and "missing: not importable" in said


@pytest.mark.parametrize("script", [bench_decode, bench_prefill])
def test_chosen_providers_come_baselines_first(script):
    names = list(script.providers(script.parse(["--presets", "kvarn", "kvarn_canonical"])))
    assert names[0] == "fa3_bf16" and names[-1].startswith("kvarn_canonical")
    # sums in a fixed order have no library
    assert not {"kvarn_canonical_flashinfer", "kvarn_canonical_fa3"} & set(names)


def test_pages_are_copied_right_before_they_are_timed(monkeypatch):
    pages = bench_copy_pages.Pages(layers=3, row_bytes=64, count=4, device="cpu")
    pages.check()
    monkeypatch.setattr(pages, "load", lambda: None)
    with pytest.raises(AssertionError, match="pages on the device"):
        pages.check()
    monkeypatch.setattr(pages, "write", lambda: None)
    with pytest.raises(AssertionError, match="pages in host memory"):
        pages.check()
