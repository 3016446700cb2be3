# SPDX-License-Identifier: Apache-2.0
"""bench_quality --hard and --head-dims: the forms of a model that compute the same, and what caches make of them."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from benchmarks.quality import bench_quality, caches, compare, frames, hard, heads, report
from benchmarks.quality.model import Model
from benchmarks.quality.scores import Scores

HARD = {frame.name: frame for frame in hard.frames(2, 64)}
REWEIGHED = {name: frame for name, frame in HARD.items() if frame.reweigh is not None}
WIDE = {frame.name: frame for frame in (heads.widened(64, 128), heads.widened(64, 256))}
# more than two pages, so that the last one reads the first one from its records
TOKENS = 300


def attention_error(frame: frames.Frame, cache: caches.Cache, inputs: list[torch.Tensor]) -> float:
    """Return the relative RMS error of a cache in bfloat16 against exact attention; inf if an output is not finite."""
    expected = caches.unquantised().attend(*inputs, 0.125)
    got = frame.leave(cache.attend(*(x.bfloat16().contiguous() for x in frame.enter(*inputs)), 0.125))
    return ((got - expected).norm() / expected.norm()).item() if got.isfinite().all() else float("inf")


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """Return random q, k and v of 300 tokens, two query heads and one KV head."""
    return [torch.randn(TOKENS, count, 64) for count in (2, 1, 1)]


SIZES = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "head_dim": 64}
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}


def random_model(network: Any) -> Model:
    """Return a network with random weights as a model. The latest one made is the one that transformers calls."""
    for parameter in network.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.1)
    return Model(network, None, torch.device("cpu"), torch.bfloat16)


@pytest.fixture
def model() -> Model:
    """Return a random Llama of two layers with four query heads and two KV heads of 64 channels."""
    return random_model(LlamaForCausalLM(LlamaConfig(**SIZES, **LAYERS)))


def cached(model: Model, frame: frames.Frame, balanced: bool = False) -> tuple[torch.Tensor, ...]:
    """Return the q, k and v of the first layer that the cache of a form gets, float32."""
    seen: list[tuple[torch.Tensor, ...]] = []

    def attend(*inputs):
        seen.append(tuple(x.float() for x in inputs[:3]))
        return caches.unquantised().attend(*inputs)

    with model.form(frame, balanced):
        model.logits(list(range(100)), attend)
    return seen[0]


@pytest.mark.parametrize("frame", [*HARD.values(), *WIDE.values()], ids=[*HARD, *WIDE])
def test_frame_leaves_exact_attention_as_it_is(frame):
    assert frames.error(frame, 2, 64) < 1e-9


@pytest.mark.parametrize("balanced", [False, True])
@pytest.mark.parametrize("frame", REWEIGHED.values(), ids=REWEIGHED)
def test_other_weights_leave_the_model_as_it_is(frame, balanced, model):
    # factors are powers of two; a bias of 10 is taken out of an output of less than 1
    assert model.error(frame, balanced) < (1e-4 if "+" in frame.name else 1e-9)


def test_a_form_ends_with_its_with_statement(model):
    before = {name: x.clone() for name, x in model.network.state_dict().items()}
    with pytest.raises(ZeroDivisionError), model.form(HARD["4 value channels + 10"], balanced=True):
        assert model.balanced and any("v_proj.bias" in name for name in model.network.state_dict())
        raise ZeroDivisionError
    after = model.network.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(x, after[name]) for name, x in before.items())
    assert not model.balanced


@pytest.mark.parametrize("frame", HARD.values(), ids=HARD)
def test_hard_frame_changes_what_the_cache_holds(frame, model):
    (_, k, v), (_, hard_k, hard_v) = cached(model, frames.UNTOUCHED), cached(model, frame)
    changed = ((hard_k != k) | (hard_v != v)).any(0)
    assert changed.sum(-1).tolist() == ([64, 64] if frame.needs_bf16 else [4, 4])


@pytest.mark.parametrize("frame", REWEIGHED.values(), ids=REWEIGHED)
def test_a_balanced_cache_holds_no_outliers(frame, model):
    _, *plain = cached(model, frames.UNTOUCHED)
    (_, *others), (_, *balanced) = (cached(model, frame, balanced) for balanced in (False, True))
    for x, hard_x, y in zip(plain, others, balanced, strict=True):
        # the magnitude of a whole head is no outlier and stays
        torch.testing.assert_close(y, hard_x if frame.needs_bf16 else x, rtol=0.01, atol=0.01)


def test_a_model_with_norms_of_its_keys_is_balanced_there():
    model = random_model(Qwen3ForCausalLM(Qwen3Config(**SIZES, **LAYERS)))
    plain = cached(model, frames.UNTOUCHED)
    for layer in model.network.model.layers:
        for norm, factor in ((layer.self_attn.q_norm, 1 / 32), (layer.self_attn.k_norm, 32)):
            norm.weight.data[[3, 35]] *= factor
    assert model.error(frames.UNTOUCHED, balanced=True) < 1e-9
    assert cached(model, frames.UNTOUCHED)[1].abs().max() > 20 * plain[1].abs().max()
    torch.testing.assert_close(cached(model, frames.UNTOUCHED, balanced=True), plain, rtol=0.01, atol=0.01)


def test_a_model_with_norms_of_gemmas_form_is_balanced_behind_them():
    sizes = {"query_pre_attn_scalar": 64, "sliding_window": 16}
    model = random_model(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, **LAYERS, **sizes)))
    plain = cached(model, frames.UNTOUCHED)
    for layer in model.network.model.layers:
        for norm, factor in ((layer.self_attn.q_norm, 1 / 32), (layer.self_attn.k_norm, 32)):
            norm.weight.data[[3, 35]] = factor - 1
    assert model.error(frames.UNTOUCHED, balanced=True) < 1e-9
    assert cached(model, frames.UNTOUCHED)[1].abs().max() > 20 * plain[1].abs().max()
    torch.testing.assert_close(cached(model, frames.UNTOUCHED, balanced=True), plain, rtol=0.01, atol=0.01)


def test_hard_magnitudes_are_beyond_fp16(model):
    _, k, v = cached(model, HARD["keys, values x 2^15"])
    assert k.half().isinf().any() and v.half().isinf().any()
    assert cached(model, HARD["queries x 2^15"])[0].half().isinf().any()


def test_wide_head_holds_its_own_head_and_the_next_ones():
    q, k, v = (torch.randn(5, count, 64) for count in (9, 3, 3))
    wide_q, wide_k, _ = heads.widened(64, 128).enter(q, k, v)
    assert torch.equal(wide_k[:, 2], torch.cat([k[:, 2], k[:, 0]], -1))
    assert torch.equal(wide_q[..., :64], q) and not wide_q[..., 64:].any()
    with pytest.raises(ValueError, match="multiple of the model's head_dim"):
        heads.widened(64, 96)


@pytest.mark.parametrize("form", ["torch", "triton"])
@pytest.mark.parametrize(("k_factor", "v_factor"), [(2.0**15, 2.0**15), (2.0**-15, 1.0)])
@pytest.mark.skipif(torch.cuda.is_available(), reason="chooses between the forms of a CPU")
def test_magnitudes_beyond_fp16_change_no_error(form, k_factor, v_factor, inputs, monkeypatch):
    monkeypatch.setenv("KVARN_CPU_FORM", form)
    frame = frames.Frame(
        "large", lambda q, k, v: (q / k_factor, k * k_factor, v * v_factor), lambda out: out / v_factor
    )
    plain = attention_error(frames.UNTOUCHED, caches.kvarn("kvarn"), inputs)
    # powers of two: the codes are the same, scales differ in their exponents
    assert attention_error(frame, caches.kvarn("kvarn"), inputs) == pytest.approx(plain, rel=1e-3)
    assert plain < 0.1


@pytest.mark.parametrize("preset", ["kvarn_k4v2_g128", "kvarn_k4v4_g128", "kvarn_k2v2_g128"])
def test_key_biases_cost_no_more_than_they_cost_a_bf16_cache(preset, inputs):
    (frame,) = (frame for frame in hard.frames(1, 64) if frame.name == "4 key channels + 100")
    cache = caches.kvarn(preset)
    biased, plain = (attention_error(x, cache, inputs) for x in (frame, frames.UNTOUCHED))
    # bfloat16 rounds a bias of 100 in steps of a half
    rounding = attention_error(frame, caches.unquantised(), inputs)
    assert biased < 2 * max(plain, rounding)
    assert biased < 0.5 * attention_error(frame, caches.fp8(), inputs)


@pytest.mark.parametrize("width", [128, 256])
def test_wide_heads_are_as_accurate_as_the_models_own(width):
    # two KV heads and three channels that differ in magnitude between them
    q, k, v = (torch.randn(TOKENS, count, 64) for count in (4, 2, 2))
    for x in (k, v):
        x[:, 0, :3] *= 4
    both = (frames.UNTOUCHED, heads.widened(64, width))
    plain, wide = (attention_error(frame, caches.kvarn("kvarn"), [q, k, v]) for frame in both)
    assert wide < 1.5 * plain and plain < 0.2


def quality_options(**changes: object) -> SimpleNamespace:
    default = {"hard": True, "head_dims": [], "windows": [], "caches": None, "dtype": "bfloat16", "unbalanced": False}
    return SimpleNamespace(**default | changes)


@pytest.mark.parametrize(
    ("name", "change", "what"),
    [
        ("4 key channels + 10", {"leave": lambda out: out + 1}, "attention"),
        ("4 value channels x 4", {"reweigh": lambda module: module.v_proj.weight.mul_(1.001)}, "the model"),
    ],
)
def test_quality_refuses_inputs_that_change_the_model(name, change, what, model, monkeypatch):
    monkeypatch.setattr(hard, "frames", lambda *_: [replace(HARD[name], **change)])
    with pytest.raises(SystemExit, match=f"expected {re.escape(name)} to leave {what} as it is"):
        bench_quality.choose_inputs(quality_options(), model)


def test_quality_leaves_out_what_float16_cannot_hold(model):
    names = [frame.name for frame in bench_quality.choose_inputs(quality_options(dtype="float16"), model)]
    assert names == ["untouched", *(name for name, frame in HARD.items() if not frame.needs_bf16)]


def test_quality_measures_presets_as_served_and_on_request_unbalanced():
    rows = bench_quality.choose_rows(quality_options(), 128)
    assert {row.name for row in rows if row.balanced} == {row.name for row in rows if row.config is not None}
    more = bench_quality.choose_rows(quality_options(unbalanced=True, caches=["kvarn", "fp8_e4m3"]), 128)
    assert [row.name for row in more] == ["16-bit", "kvarn_k4v2_g128", "fp8_e4m3", "kvarn_k4v2_g128 unbalanced"]
    assert [row.balanced for row in more] == [False, True, False, False]


def test_quality_adds_the_16_bit_cache_to_other_inputs_only():
    assert bench_quality.choose_rows(quality_options(), 128)[0].name == "16-bit"
    assert "16-bit" not in [row.name for row in bench_quality.choose_rows(quality_options(hard=False), 128)]


def test_comparison_divides_by_the_same_cache_on_the_untouched_model():
    exact, tokens = torch.randn(8, 50), torch.randint(50, (8,))
    row, wide = caches.kvarn("kvarn"), heads.widened(64, 128)
    scores = {(frame.name, row.name): Scores() for frame in (frames.UNTOUCHED, wide)}
    scores["untouched", row.name].add(exact, exact + 0.1 * torch.randn(8, 50), tokens)
    scores[wide.name, row.name].add(exact, exact + torch.randn(8, 50), tokens)
    plain, other = compare.collect(scores, [row], [frames.UNTOUCHED, wide], 64, (2, 8))
    assert plain["kl_ratio"] == 1 and plain["bytes_per_token"] == 59 and other["bytes_per_token"] == 112
    assert other["kl_ratio"] == pytest.approx(other["kl_mean"] / plain["kl_mean"]) and other["kl_ratio"] > 10
    written = report.rows([plain, other])
    assert [settings["inputs"] for _, settings, _ in written] == ["untouched", "heads of 128"]
    assert {figure.metric for figure in written[0][2]} >= {"kl_mean", "kl_ratio", "finite"}


def test_scores_say_when_a_logit_is_not_finite():
    exact, tokens = torch.randn(8, 50), torch.randint(50, (8,))
    broken = exact.clone()
    broken[3, 7] = float("nan")
    scores = Scores()
    scores.add(exact, exact, tokens)
    assert scores.finite
    scores.add(exact, broken, tokens)
    assert not scores.finite
