# SPDX-License-Identifier: Apache-2.0
"""Which attention modules of SGLang are balanced, and how their weights look to whoever reads or writes them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import balanced_layers, compat, plugin, refusals

HEADS, KV_HEADS, D, HIDDEN = 4, 2, 64, 96
PLAIN = ["llama.LlamaAttention", "qwen2.Qwen2Attention", "qwen3.Qwen3Attention"]


def model(path="llama.LlamaAttention", *, factor=32.0, bias=True, method=None, **packed) -> torch.nn.Module:
    """Return a model of one layer with an attention module of SGLang, of whose key channels two are outliers."""
    cls = compat.resolve(f"sglang.srt.models.{path}")
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)
    weight, output = torch.randn((HEADS + 2 * KV_HEADS) * D, HIDDEN) / 10, torch.randn(HIDDEN, HEADS * D)
    if not path.startswith("qwen3"):
        weight[: HEADS * D].unflatten(0, (-1, D))[:, [0, 32]] /= factor
        weight[HEADS * D : (HEADS + KV_HEADS) * D].unflatten(0, (-1, D))[:, [0, 32]] *= factor
    method = method or compat.UnquantizedLinearMethod()
    for name, w in (("qkv_proj", weight), ("o_proj", output)):
        linear = torch.nn.Linear(*w.T.shape, bias=bias and name == "qkv_proj").requires_grad_(False)
        linear.weight.copy_(w)
        linear.quant_method = method
        for key, value in packed.items():
            setattr(linear, key, value)
        module.add_module(name, linear)
    module.attn = torch.nn.Module()
    module.attn.tp_q_head_num, module.attn.tp_k_head_num, module.attn.head_dim = HEADS, KV_HEADS, D
    module.attn.sliding_window_size = -1
    module.rotary_emb = SimpleNamespace(rotary_dim=D, is_neox_style=True)
    if path.startswith("qwen3"):
        for name, scale in (("q_norm", 1 / factor), ("k_norm", factor)):
            norm = compat.RMSNorm(D)
            norm.weight.requires_grad_(False)[[0, 32]] *= scale
            module.add_module(name, norm)
    if bias:
        module.qkv_proj.bias.normal_()
        module.qkv_proj.bias[: -KV_HEADS * D].zero_()
    layer = torch.nn.Module()
    layer.self_attn = module
    return torch.nn.Sequential(layer)


@pytest.fixture
def runner(server_args, model_dir):
    """Return a function that makes what a backend gets: a model runner with arguments.

    Of a model whose configuration has sliding windows of 128 tokens, in records or in a pool of SGLang's.
    """

    def make(model, *, is_draft_worker=False, has_window_pool=False, **arguments):
        arguments = {"kv_cache_dtype": "kvarn", "model_path": model_dir()} | arguments
        text = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=128)
        return SimpleNamespace(
            model=model,
            server_args=server_args(**arguments),
            is_draft_worker=is_draft_worker,
            model_config=SimpleNamespace(is_hybrid_swa=has_window_pool, hf_text_config=text),
        )

    return make


def weights(model) -> list[torch.Tensor]:
    return [p.clone() for p in model.parameters()]


def output_bias(model) -> torch.Tensor | None:
    chosen = getattr(model[0].self_attn.attn, "kvarn_balance", None)
    return None if chosen is None else chosen.output_bias


def changed(model, before) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(weights(model), before, strict=True))


@pytest.mark.parametrize("path", PLAIN)
def test_balance_finds_the_module_and_says_so_once(path, runner, caplog):
    caplog.set_level("INFO")
    made = model(path)
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert changed(made, before)
    (line,) = (record.message for record in caplog.records if "balanced" in record.message)
    assert "by up to 32" in line and "in 1 layers" in line
    bias = before[1][-KV_HEADS * D :].view(KV_HEADS, D)
    assert torch.equal(output_bias(made), bias)
    assert not made[0].self_attn.qkv_proj.bias.any()


@pytest.mark.parametrize(
    ("preset", "is_draft", "is_balanced"), [("kvarn", False, True), ("kvarn", True, False), ("auto", False, False)]
)
def test_a_loaded_model_is_balanced_for_a_kvarn_cache_of_its_own(preset, is_draft, is_balanced, runner, monkeypatch):
    made = model()
    before = weights(made)
    monkeypatch.setattr(refusals, "check_draft_model", lambda *given: checked.append(given))
    loaded, checked = runner(made, kv_cache_dtype=preset, is_draft_worker=is_draft), []
    assert plugin._take_model(None, loaded) is None
    assert checked == ([(made, loaded.model_config)] if is_draft else [])
    assert changed(made, before) == is_balanced


@pytest.mark.parametrize("has_window_pool", [True, False])
def test_layers_with_a_sliding_window_are_balanced_where_it_is_read_from_records(has_window_pool, runner, caplog):
    class Unknown(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.attn = compat.RadixAttention(4, 64, 1, num_kv_heads=2, layer_id=0, sliding_window_size=127)

    caplog.set_level("INFO")
    made = torch.nn.Sequential(*model(), *model(), Unknown())
    made[0].self_attn.attn.sliding_window_size = 127
    checkpoint, full = weights(made), weights(made[1])
    loaded = runner(made, has_window_pool=has_window_pool)
    balanced_layers.balance_layers(loaded)
    assert changed(made[:1], checkpoint[: len(full)]) != has_window_pool and changed(made[1:2], full)
    named = "channels of 1 attention layers as they are, because it does not know what Unknown computes"
    assert (named in caplog.text) != has_window_pool

    def update(self):
        assert not changed(made, checkpoint)

    balanced = weights(made)
    balanced_layers.with_plain_weights(update, SimpleNamespace(tp_worker=SimpleNamespace(model_runner=loaded)))
    assert not changed(made, balanced)


def test_a_second_load_changes_nothing(runner):
    made = model()
    balanced_layers.balance_layers(runner(made))
    once, bias = weights(made), output_bias(made).clone()
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, once) and torch.equal(output_bias(made), bias)


@pytest.mark.parametrize(
    "unfit",
    [
        {"path": "olmo.OlmoAttention"},
        {"method": object()},
        {"use_intel_amx_backend": True},
    ],
    ids=["another class", "quantised", "packed"],
)
def test_other_modules_stay_as_they_are(unfit, runner):
    made = model(**unfit)
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, before) and output_bias(made) is None


@pytest.mark.parametrize("unfit", [{"method": object()}, {"use_intel_amx_backend": True}], ids=["quantised", "packed"])
def test_weights_that_are_not_plain_matrices_are_named(unfit, runner, caplog):
    caplog.set_level("INFO")
    balanced_layers.balance_layers(runner(model(**unfit)))
    assert "leaves the channels of 1 attention layers" in caplog.text
    assert "the weights of LlamaAttention are quantised, or packed" in caplog.text


def test_a_subclass_stays_as_it_is(runner):
    made = model()
    made[0].self_attn.__class__ = type("OtherAttention", (type(made[0].self_attn),), {})
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, before) and output_bias(made) is None


def test_weights_of_another_shape_stay_as_they_are(runner):
    made = model()
    made[0].self_attn.qkv_proj.weight = torch.nn.Parameter(torch.randn(100, HIDDEN), requires_grad=False)
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, before)


LORA = {"enable_lora": True, "max_lora_rank": 8, "lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize(
    "arguments", [LORA, {"cpu_offload_gb": 4}, {"offload_group_size": 2}], ids=lambda x: next(iter(x))
)
def test_weights_that_something_else_adds_to_stay_as_they_are(arguments, runner, caplog):
    caplog.set_level("INFO")
    made = model()
    before = weights(made)
    balanced_layers.balance_layers(runner(made, **arguments))
    assert not changed(made, before)
    assert f"--{next(iter(arguments)).replace('_', '-')} is in use" in caplog.text


def test_balance_can_be_switched_off(runner, monkeypatch):
    monkeypatch.setenv("KVARN_BALANCE", "0")
    made = model()
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, before)


def test_the_fingerprint_is_of_what_enters_the_cache(runner):
    plain, made, other = model(), model(), model(factor=8.0)
    for balanced in (made, other):
        balanced_layers.balance_layers(runner(balanced))
    tags = [balanced_layers.fingerprint(each) for each in (plain, made, other)]
    assert len(set(tags)) == 3 and all(len(tag) == 12 for tag in tags)
    # a checkpoint that is read or written meanwhile changes the weights, not the factors of what is cached
    assert balanced_layers.fingerprint(made) == tags[1]
    state = made[0].self_attn.attn.kvarn_balance
    for part in (state.keys, state.values, state.output_bias):
        before = part.clone()
        part.view(-1)[0] += 1
        assert balanced_layers.fingerprint(made) != tags[1]
        part.copy_(before)


def test_an_ordinary_model_stays_as_it_is_and_says_nothing(runner, caplog):
    caplog.set_level("INFO")
    made = model(factor=1.0, bias=False)
    before = weights(made)
    balanced_layers.balance_layers(runner(made))
    assert not changed(made, before) and "KVarN" not in caplog.text


def test_a_module_that_is_not_known_is_named_and_stays_as_it_is(runner, caplog):
    class GatedAttention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv_proj = torch.nn.Linear(8, 8)
            self.attn = compat.RadixAttention(num_heads=4, head_dim=64, scaling=1, num_kv_heads=2, layer_id=0)

    caplog.set_level("INFO")
    made = torch.nn.Sequential(model(), GatedAttention(), GatedAttention())
    before = weights(made[1:])
    balanced_layers.balance_layers(runner(made))
    assert not changed(made[1:], before)
    assert "KVarN balanced the channels of 2 heads" in caplog.text
    assert "channels of 2 attention layers as they are" in caplog.text and "GatedAttention" in caplog.text


def test_whoever_reads_or_writes_weights_sees_those_of_the_checkpoint(runner):
    made = model()
    checkpoint = weights(made)
    balanced_layers.balance_layers(runner(made))
    balanced, bias = weights(made), output_bias(made)
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner(made)))
    assert not changed(made, balanced)

    def update(self, recv_req):
        assert self is manager and not changed(made, checkpoint)
        # a part of the weights, as an update of one tensor
        made[0].self_attn.qkv_proj.weight.mul_(2)
        made[0].self_attn.qkv_proj.bias.mul_(3)
        return recv_req

    assert balanced_layers.with_plain_weights(update, manager, "request") == "request"
    after = weights(made)
    assert torch.equal(after[0], 2 * balanced[0]) and not after[1].any() and torch.equal(after[2], balanced[2])
    # the same tensor, since a CUDA graph reads it
    assert output_bias(made) is bias
    assert torch.equal(bias, 3 * checkpoint[1][-KV_HEADS * D :].view(KV_HEADS, D))


def test_whoever_reads_weights_of_another_server_is_let_through(runner):
    made = model()
    # as LoRA wraps it
    made[0].self_attn.qkv_proj = torch.nn.Identity()
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner(made)))
    assert balanced_layers.with_plain_weights(lambda self: "read", manager) == "read"


def test_weights_are_balanced_again_after_a_failed_update(runner):
    made = model()
    balanced_layers.balance_layers(runner(made))
    balanced = weights(made)
    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner(made)))

    def update(self):
        raise ValueError("no such file")

    with pytest.raises(ValueError, match="no such file"):
        balanced_layers.with_plain_weights(update, manager)
    assert not changed(made, balanced)
