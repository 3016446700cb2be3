# SPDX-License-Identifier: Apache-2.0
"""Attention modules of SGLang, built tiny: balanced ones put out what they did, and their caches hold no outliers."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from kvarn_kernels import balance
from sglang_kvarn import attention_modules, balanced_layers, compat

HIDDEN, HEADS, KV_HEADS, D, TOKENS = 96, 4, 2, 64, 40
SHAPE = {"hidden_size": HIDDEN, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
CONFIG = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": D,
    "num_hidden_layers": 1,
    "intermediate_size": HIDDEN,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LAGUNA = SHAPE | {
    "head_dim": D,
    "layer_id": 0,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": None,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 512,
    "sliding_window_size": -1,
    "layer_type": "full_attention",
}
STEP = SHAPE | {"head_dim": D, "rms_norm_eps": 1e-6, "rope_theta": 10000, "max_position_embeddings": 512}
GRANITE = CONFIG | {
    "hidden_size": HEADS * D,
    "attention_bias": True,
    "attention_multiplier": 0.1,
    "rope_theta": 10000,
    "rope_scaling": None,
}
MINIMAX = CONFIG | {"use_qk_norm": True, "rotary_dim": 32, "rope_parameters": ROPE}
GEMMA = CONFIG | {
    "attention_bias": False,
    "query_pre_attn_scalar": D,
    "sliding_window": 16,
    "rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}},
}
OLMO = CONFIG | {
    "hidden_size": HEADS * D,
    "attention_bias": False,
    "sliding_window": 16,
    "rope_parameters": ROPE,
    "rope_scaling": None,
}
SLIDING, FULL = ["sliding_attention"], ["full_attention"]
QUARTER = {"partial_rotary_factor": 0.25}
QWEN = CONFIG | QUARTER | {"full_attention_interval": 1, "rope_parameters": ROPE | QUARTER}


def plain(**values: Any) -> SimpleNamespace:
    """Return a configuration of which a module reads nothing but attributes."""
    return SimpleNamespace(**values)


def of(path: str, **values: Any) -> Any:
    """Return a configuration of a class of SGLang's."""
    return compat.resolve(f"sglang.srt.configs.{path}")(**values)


def gemma(layer_types: list[str]) -> dict[str, Any]:
    """Return the arguments of a module of Gemma 3 with a layer of that type."""
    return {"layer_id": 0, "config": plain(**GEMMA, layer_types=layer_types), "max_position_embeddings": 512}


# class of the module, its arguments; a configuration is made when it is used
CASES = {
    "llama": ("llama.LlamaAttention", lambda: SHAPE | {"config": plain(head_dim=D)}),
    "llama, biased": ("llama.LlamaAttention", lambda: SHAPE | {"config": plain(head_dim=D), "bias": True}),
    "ernie": ("ernie4.Ernie4Attention", lambda: SHAPE | {"config": plain(head_dim=D), "rope_is_neox_style": False}),
    "mixtral": ("mixtral.MixtralAttention", lambda: SHAPE | {"hidden_size": HEADS * D}),
    "ministral": (
        "ministral3.Ministral3Attention",
        lambda: (
            SHAPE
            | {"config": plain(head_dim=D, rope_parameters=ROPE | {"llama_4_scaling_beta": 0.5}), "rope_scaling": None}
        ),
    ),
    "qwen2": ("qwen2.Qwen2Attention", lambda: SHAPE | {"head_dim": D}),
    "qwen2 moe": ("qwen2_moe.Qwen2MoeAttention", lambda: SHAPE | {"hidden_size": HEADS * D}),
    "qwen3": ("qwen3.Qwen3Attention", lambda: SHAPE | {"head_dim": D, "rms_norm_eps": 1e-6}),
    "qwen3 moe": ("qwen3_moe.Qwen3MoeAttention", lambda: SHAPE | {"head_dim": D}),
    "glm4": ("glm4.Glm4Attention", lambda: SHAPE | {"head_dim": D}),
    "glm4 moe": ("glm4_moe.Glm4MoeAttention", lambda: SHAPE | {"head_dim": D}),
    "glm4 moe, norms": ("glm4_moe.Glm4MoeAttention", lambda: SHAPE | {"head_dim": D, "use_qk_norm": True}),
    "hy3": ("hunyuan_v3.HYV3Attention", lambda: SHAPE | {"config": plain(head_dim=D)}),
    "hy3, norms": ("hunyuan_v3.HYV3Attention", lambda: SHAPE | {"config": plain(head_dim=D, use_qk_norm=True)}),
    "laguna": ("laguna.LagunaAttention", lambda: LAGUNA | {"attention_bias": False, "gating": False}),
    "laguna, gate of channels": ("laguna.LagunaAttention", lambda: LAGUNA | {"attention_bias": True, "gating": True}),
    "laguna, gate of heads": (
        "laguna.LagunaAttention",
        lambda: LAGUNA | {"attention_bias": True, "gating": "per-head"},
    ),
    "step": ("step3p5.Step3p5Attention", lambda: STEP | {"partial_rotary_factor": 0.5}),
    "step, gate of heads": ("step3p5.Step3p5Attention", lambda: STEP | {"use_head_wise_attn_gate": True}),
    "minimax": ("minimax_m2.MiniMaxM2Attention", lambda: {"config": plain(**MINIMAX)}),
    "gemma3": ("gemma3_causal.Gemma3Attention", lambda: gemma(FULL)),
    "gemma3, window": ("gemma3_causal.Gemma3Attention", lambda: gemma(SLIDING)),
    "olmo": ("olmo2.Olmo2Attention", lambda: {"config": plain(**OLMO, layer_types=FULL)}),
    "olmo, window": ("olmo2.Olmo2Attention", lambda: {"config": plain(**OLMO, layer_types=SLIDING)}),
    "granite": (
        "granitemoehybrid.GraniteMoeHybridAttention",
        lambda: {"config": plain(**GRANITE, position_embedding_type="nope"), "layer_id": 0},
    ),
    "granite, rope": (
        "granitemoehybrid.GraniteMoeHybridAttention",
        lambda: {"config": plain(**GRANITE, position_embedding_type="rope"), "layer_id": 0},
    ),
    "nemotron": (
        "nemotron_h.NemotronHAttention",
        lambda: {"config": plain(**CONFIG, sliding_window=None), "layer_idx": 0},
    ),
    "falcon": (
        "falcon_h1.FalconH1HybridAttentionDecoderLayer",
        lambda: {
            "config": of("falcon_h1.FalconH1Config", **CONFIG, rope_parameters=ROPE, key_multiplier=0.6),
            "layer_id": 0,
        },
    ),
    "qwen3 next": (
        "qwen3_next.Qwen3HybridAttentionDecoderLayer",
        lambda: {"config": of("qwen3_next.Qwen3NextConfig", **QWEN), "layer_id": 0},
    ),
    "qwen3.5": (
        "qwen3_5.Qwen3_5AttentionDecoderLayer",
        lambda: {"config": of("qwen3_5.Qwen3_5TextConfig", **QWEN), "layer_id": 0},
    ),
    "qwen3.5, no gate": (
        "qwen3_5.Qwen3_5AttentionDecoderLayer",
        lambda: {"config": of("qwen3_5.Qwen3_5TextConfig", **QWEN, attn_output_gate=False), "layer_id": 0},
    ),
}


# norms of Gemma's form, whose weights are no factors
MULTIPLIED = {"qwen3 next", "qwen3.5", "qwen3.5, no gate", "gemma3", "gemma3, window", "step", "step, gate of heads"}
# biases of the values
BIASED = {"llama, biased", "qwen2", "qwen2 moe", "glm4", "glm4 moe", "glm4 moe, norms", "granite", "granite, rope"}
BIASED |= {"laguna, gate of channels", "laguna, gate of heads"}


class Absent(torch.nn.Module):
    """What a decoder layer has besides attention."""

    n_groups = 1

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def scale_output(self, x: torch.Tensor) -> torch.Tensor:
        """Be there to be named."""
        raise AssertionError("no decoder layer runs here")


class Attention:
    """Exact attention in the place of a RadixAttention, with what the backend does around it.

    Attributes:
        seen: the last queries, keys and values [T, heads, D]; keys and values as they enter the cache.
    """

    def __init__(self, layer: Any) -> None:
        self.layer, self.seen = layer, ()

    def __call__(self, q, k, v, forward_batch=None, **kwargs):
        layer = self.layer
        q, k, v = q.reshape(-1, layer.tp_q_head_num, D), k.reshape(-1, KV_HEADS, D), v.reshape(-1, KV_HEADS, D)
        q, k = balanced_layers.multiplied(layer, q, k)
        self.seen = q.clone(), k.clone(), v.clone()
        q, k, v = q.transpose(0, 1), *(x.transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0) for x in (k, v))
        later = torch.ones(len(q[0]), len(q[0]), dtype=torch.bool).triu(1)
        scores = (q @ k.mT * layer.scaling).masked_fill(later, -torch.inf)
        out = (scores.softmax(-1) @ v).transpose(0, 1).contiguous()
        balanced_layers.add_output_bias(layer, out)
        return out.view(len(out), -1)


@pytest.fixture
def build(server_args, model_dir, monkeypatch):
    """Return a function that makes a module of SGLang's, of float32 and on a CPU, without the rest of its layer."""
    args = server_args(model_path=model_dir(), kv_cache_dtype="kvarn")
    compat.resolve("sglang.srt.server_args.set_global_server_args_for_scheduler")(args)

    def make(path: str, arguments: dict[str, Any], rank: int = 0, size: int = 1) -> Any:
        cls = compat.resolve(f"sglang.srt.models.{path}")
        source = inspect.getmodule(cls)
        for name in ("Qwen2MoeSparseMoeBlock", "Qwen2MoeMLP", "FalconH1MLP", "MambaMixer2"):
            monkeypatch.setattr(source, name, Absent, raising=False)
        for name in ("LayerCommunicator", "declare_attn", "declare_ffn", "OutputTransform"):
            monkeypatch.setattr(source, name, lambda *args, **kwargs: None, raising=False)
        monkeypatch.setattr(source, "append_stages", lambda *args, **kwargs: (None, None), raising=False)
        monkeypatch.setattr(source, "LayerScatterModes", SimpleNamespace(init_new=lambda **kwargs: None), raising=False)
        ranks = {"pp_rank": 0} | dict.fromkeys(("tp_rank", "attn_tp_rank"), rank)
        ranks |= dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), size)
        ranks |= dict.fromkeys(("tp_group", "attn_tp_group"))
        monkeypatch.setattr(source, "enable_fused_set_kv_buffer", lambda forward_batch: False, raising=False)
        if hasattr(linear := compat.resolve("sglang.srt.layers.linear"), "get_tp_group"):
            monkeypatch.setattr(linear, "get_tp_group", lambda: None)
        stack.enter_context(compat.get_parallel().override(**ranks))
        module = cls(**arguments).requires_grad_(False)
        module.attn.forward = Attention(module.attn)
        if (norms := getattr(module, "qk_norm_impl", None)) is not None:
            # the kernels that run both of them at once are for GPUs
            norms._forward_impl = lambda q, k: (module.q_norm(q), module.k_norm(k))
        if hasattr(module, "llama_4_scaling_beta"):
            # so that its factor is another one from token 16 on
            module.max_position_embeddings = 16
        return module

    with ExitStack() as stack:
        yield make
    compat.resolve("sglang.srt.runtime_context.reset_context")()


def layer_of(module: torch.nn.Module) -> torch.nn.Module:
    """Return a decoder layer with the module in it, behind a norm that multiplies by one."""
    layer = torch.nn.Module()
    layer.input_layernorm, layer.mixer = compat.RMSNorm(inputs_of(module)), module
    return layer


def inputs_of(module: Any) -> int:
    """Return how many inputs the projections of a module have."""
    return module.qkv_proj.weight.shape[1]


def runner_of(module: Any, args: Any) -> SimpleNamespace:
    """Return a model runner of a layer with the module in it, whose sliding windows are read from records."""
    config = SimpleNamespace(layer_types=SLIDING + FULL, sliding_window=16)
    model_config = SimpleNamespace(is_hybrid_swa=False, hf_text_config=config)
    return SimpleNamespace(model=torch.nn.Sequential(layer_of(module)), server_args=args, model_config=model_config)


def spread(*size: int) -> torch.Tensor:
    """Return positive numbers from 1 / 16 to 16."""
    return (8 * torch.rand(size) - 4).exp2()


def fill(module: Any) -> None:
    """Write random weights: channels of keys and values have any size, those of queries and o_proj the inverse one."""
    group, keys, values = HEADS // KV_HEADS, spread(KV_HEADS, D), spread(KV_HEADS, D)
    queries = (1 / keys).repeat_interleave(group, 0)[:, None]
    if getattr(module, "attn_output_gate", False):
        queries = torch.cat([queries, torch.ones_like(queries)], 1)
    rows = torch.cat([queries.view(-1), keys.view(-1), values.view(-1)])
    for name, weight in module.named_parameters():
        weight.copy_(torch.randn(weight.shape) / (weight.shape[-1] ** 0.5 if weight.dim() == 2 else 1))
        if name.startswith("qkv_proj"):
            weight *= rows.view([-1] + [1] * (weight.dim() - 1))
        elif name == "o_proj.weight":
            weight /= values.repeat_interleave(group, 0).view(-1)
        elif name == "input_layernorm.weight":
            weight.fill_(1 - compat.rms_norm_offset(module.input_layernorm))
        elif name.startswith(("q_norm", "k_norm")):
            size = spread(*weight.shape)
            weight.copy_(size - compat.rms_norm_offset(getattr(module, name[:6])))


def put_out(module: Any) -> torch.Tensor:
    """Return what a module makes of some tokens, [T, n]."""
    x = torch.randn(TOKENS, inputs_of(module), generator=torch.Generator().manual_seed(1))
    modes = SimpleNamespace(is_idle=lambda: False, is_extend=lambda: True)
    call = getattr(module, "self_attention", module)
    names = inspect.signature(getattr(module, "self_attention", module.forward)).parameters
    arguments = {
        "positions": torch.arange(TOKENS),
        "hidden_states": x,
        "forward_batch": SimpleNamespace(forward_mode=modes),
    }
    if "position_embeddings" in names:
        cosines, sines = module.rotary_emb.cos_sin_cache[None, :TOKENS].chunk(2, -1)
        arguments["position_embeddings"] = torch.cat([cosines, cosines], -1), torch.cat([sines, sines], -1)
    with torch.compiler.set_stance("force_eager"):
        out = call(**{name: value for name, value in arguments.items() if name in names})
    return (out[0] if isinstance(out, tuple) else out).clone()


def errors(module: Any) -> list[torch.Tensor]:
    """Return the power of the error of q . k and of the output for each KV head [Hk], if that of a head is even.

    See the docstring of `balance`: the sum over the squares of the cached side, times that of the other side.
    """
    q, k, v, columns = (
        x.square().mean(0).view(KV_HEADS, -1).sum(-1) for x in (*module.attn.forward.seen, module.o_proj.weight)
    )
    return [q * k, columns * v]


def test_every_known_module_is_built_here_and_of_the_installed_sglang():
    known = {f"sglang.srt.models.{path}" for path in attention_modules.KNOWN}
    classes = {compat.resolve(f"sglang.srt.models.{path}") for path, _ in CASES.values()}
    assert {f"{cls.__module__}.{cls.__qualname__}" for cls in classes} == known


@pytest.mark.parametrize("case", CASES)
def test_a_balanced_module_puts_out_what_it_did(case, build, model_dir, server_args, caplog):
    caplog.set_level("INFO")
    path, arguments = CASES[case]
    module = build(path, arguments())
    fill(module)
    expected, noise = put_out(module), errors(module)
    args = server_args(kv_cache_dtype="kvarn", model_path=model_dir())
    balanced_layers.balance_layers(runner_of(module, args))
    assert "KVarN balanced" in caplog.text and "leaves the channels" not in caplog.text
    chosen = module.attn.kvarn_balance
    # in all heads, of keys and of values
    assert (chosen.keys.abs().amax(-1) >= 2).all() and (chosen.values.abs().amax(-1) >= 3).all()
    assert (chosen.queries_and_keys is not None) == (case in MULTIPLIED)
    assert (chosen.output_bias is not None) == (case in BIASED)
    got = put_out(module)
    # factors are powers of two, so that nothing is rounded otherwise; a bias is added later than it was
    error = ((got - expected).norm() / expected.norm()).item()
    assert error < 1e-6 if case in BIASED else torch.equal(got, expected), error
    for before, after in zip(noise, errors(module), strict=True):
        assert (after < before / balance.GAIN).all()


@pytest.mark.parametrize("case", CASES)
def test_weights_say_how_large_a_channel_is(case, build):
    path, arguments = CASES[case]
    module = build(path, arguments())
    fill(module)
    put_out(module)
    weights, (q, k, v) = attention_modules.weights(module, layer_of(module)), module.attn.forward.seen
    pairs = torch.arange(D) if weights.keys.partners is None else weights.keys.partners
    for x, side in ((q, weights.keys.other), (k, weights.keys.cached), (v, weights.values.cached)):
        found, said = x.square().mean(0).view(KV_HEADS, -1, D).sum(1), sum(rows.squares() for rows in side).sum(1)
        if x is not v:
            # RoPE turns the two channels of a pair
            found, said = found + found[:, pairs], said + said[:, pairs]
        if len(said) == 1:
            # the weights of a norm that all heads share
            found = found.sum(0)
        octaves = (found / said).log2()
        # the mean of 40 squares deviates by 0.3 octaves; sizes that have nothing to do with the channels by 4
        assert (octaves - octaves.mean()).std() < 0.7


def test_a_rank_of_olmo_balances_its_own_heads_in_a_norm_of_all(build, model_dir, server_args, monkeypatch):
    sizes = {"hidden_size": 2 * HEADS * D, "num_attention_heads": 2 * HEADS, "num_key_value_heads": 2 * KV_HEADS}
    config = plain(**OLMO | sizes, layer_types=FULL)
    module = build("olmo2.Olmo2Attention", {"config": config}, rank=1, size=2)
    module.o_proj.reduce_results = False
    # what the other rank projects
    gather = f"{type(module).__module__}.tensor_model_parallel_all_gather"
    monkeypatch.setattr(gather, lambda x: torch.cat([x.flip(-1), x], -1))
    fill(module)
    expected, noise = put_out(module), errors(module)
    before = {name: norm.weight.clone() for name, norm in module.named_children() if name.endswith("_norm")}
    balanced_layers.balance_layers(runner_of(module, server_args(kv_cache_dtype="kvarn", model_path=model_dir())))
    assert torch.equal(put_out(module), expected)
    for old, new in zip(noise, errors(module), strict=True):
        assert (new < old / balance.GAIN).all()
    for name, weight in before.items():
        others, own = (getattr(module, name).weight == weight).view(2, -1)
        assert others.all() and not own.all()


def test_an_update_of_norms_of_gemmas_form_meets_the_weights_of_the_checkpoint(build, model_dir, server_args):
    path, arguments = CASES["qwen3 next"]
    module = build(path, arguments())
    fill(module)
    args = server_args(kv_cache_dtype="kvarn", model_path=model_dir())
    runner = runner_of(module, args)
    checkpoint = {name: x.clone() for name, x in module.named_parameters()}
    balanced_layers.balance_layers(runner)
    assert all(torch.equal(x, checkpoint[name]) for name, x in module.named_parameters() if "norm" in name)
    of_queries, of_keys = module.attn.kvarn_balance.queries_and_keys
    assert torch.equal(of_queries, (1 / of_keys).repeat_interleave(HEADS // KV_HEADS, 0)) and (of_keys != 1).any()

    def update(self):
        assert all(torch.equal(x, checkpoint[name]) for name, x in module.named_parameters())
        for weight in module.parameters():
            weight *= 1.5

    manager = SimpleNamespace(tp_worker=SimpleNamespace(model_runner=runner))
    balanced_layers.with_plain_weights(update, manager)
    got = put_out(module)
    del module.attn.kvarn_balance
    for name, weight in module.named_parameters():
        weight.copy_(checkpoint[name] * 1.5)
    assert torch.equal(got, put_out(module))
