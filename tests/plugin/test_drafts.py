# SPDX-License-Identifier: Apache-2.0
"""What speculative decoding adds to a server with a kvarn cache: arguments, chains, the draft model's memory."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import drafts_on_cpu
import numpy as np
import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100
from model_table import REFUSED
from sglang_kvarn import budget, capacity, compat, drafts, refusals
from sglang_kvarn.refused import Refused

from benchmarks.common import models


@pytest.fixture(autouse=True)
def drafts_are_served(monkeypatch):
    """Let SGLang take the arguments on a CPU too."""
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    for name in ("supports_speculative_algorithm", "supports_speculative_draft_attention_backend"):
        monkeypatch.setattr(platform, name, lambda *_: True, raising=False)


def test_drafts_are_a_short_chain_where_nobody_chose_how_many(server_args, model_dir):
    model = model_dir()
    eagle = {"speculative_algorithm": "EAGLE3", "speculative_draft_model_path": model}
    made = server_args(model_path=model, kv_cache_dtype="kvarn", **eagle)
    args = compat.resolved_arguments(made)
    chosen = (args.speculative_num_steps, args.speculative_eagle_topk, args.speculative_num_draft_tokens)
    assert chosen == (3, 1, 4) and args.speculative_draft_attention_backend == "triton"
    assert compat.draft_tokens(made) == 4
    ngram = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}
    args = compat.resolved_arguments(server_args(model_path=model, kv_cache_dtype="kvarn", **ngram))
    assert args.speculative_num_draft_tokens == 4


@pytest.mark.parametrize("chosen", [None, 6])
def test_a_block_of_drafts_is_as_large_as_its_model_was_trained_for(monkeypatch, server_args, model_dir, chosen):
    hook = compat.resolve("sglang.srt.arg_groups.speculative_hook")
    if compat.version() == "0.5.16":
        monkeypatch.setattr(hook, "_handle_dflash", drafts_on_cpu.on_a_gpu(hook._handle_dflash))
    drafter = model_dir(architectures=["DFlashDraftModel"], model_type="qwen3", block_size=8)
    dflash = {"speculative_algorithm": "DFLASH", "speculative_draft_model_path": drafter}
    made = server_args(
        model_path=model_dir(), kv_cache_dtype="kvarn", speculative_dflash_block_size=chosen, **dflash
    )
    args = compat.resolved_arguments(made)
    assert args.speculative_num_draft_tokens == compat.draft_tokens(made) == (chosen or 8)
    assert args.speculative_draft_attention_backend == "triton"


def test_a_changing_number_of_drafts_has_an_attention_backend_for_each(server_args, model_dir, tmp_path):
    model, chosen = model_dir(), tmp_path / "adaptive.json"
    eagle = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": model}
    adaptive = {"speculative_adaptive": True, "speculative_adaptive_config": str(chosen)}
    for steps in ([1, 3, 7], [0, 1, 2]):
        chosen.write_text(json.dumps({"1": {"candidate_steps": steps[:2]}, "8": {"candidate_steps": steps[1:]}}))
        made = server_args(model_path=model, kv_cache_dtype="kvarn", **eagle, **adaptive)
        # a step has one more token than the draft model runs steps; the ring has room for the most
        assert compat.attention_backends(made) == 3 and compat.draft_tokens(made) == steps[-1] + 1
    # dropped by SGLang for a draft model of another kind, which has our numbers then
    other = eagle | adaptive | {"speculative_algorithm": "STANDALONE"}
    made = server_args(model_path=model, kv_cache_dtype="kvarn", **other)
    assert compat.attention_backends(made) == 1 and compat.draft_tokens(made) == drafts.DRAFT_TOKENS
    assert compat.attention_backends(server_args(model_path=model, kv_cache_dtype="kvarn", **eagle)) == 1
    assert compat.attention_backends(server_args(model_path=model, kv_cache_dtype="kvarn")) == 1


def test_a_backend_expects_the_drafts_that_sglang_names_before_it_makes_it(monkeypatch, server_args, model_dir):
    model = model_dir()
    assert compat.verified_tokens(server_args(model_path=model, kv_cache_dtype="kvarn")) == 1
    ngram = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1}
    made = server_args(model_path=model, kv_cache_dtype="kvarn", **ngram)
    # as a worker does for each number: in the arguments, or from 0.5.20 on in what it has published of them
    spec = made
    if compat.is_since("0.5.20"):
        spec = SimpleNamespace(speculative_num_draft_tokens=None)
        monkeypatch.setattr("sglang.srt.runtime_context.get_spec", lambda: spec)
    for tokens in (2, 6):
        spec.speculative_num_draft_tokens = tokens
        assert compat.verified_tokens(made) == tokens


def test_a_step_of_a_changing_number_of_drafts_ends_at_most_one_page(server_args, model_dir, tmp_path):
    model, chosen = model_dir(), tmp_path / "adaptive.json"
    eagle = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": model}
    adaptive = {"speculative_adaptive": True, "speculative_adaptive_config": str(chosen)}
    for most, is_refused in ((125, False), (126, True)):
        chosen.write_text(json.dumps({"1": {"candidate_steps": [3, most]}}))
        made = server_args(model_path=model, kv_cache_dtype="kvarn", **eagle, **adaptive, speculative_num_steps=3)
        with pytest.raises(Refused, match="candidate_steps be less than 126") if is_refused else nullcontext():
            refusals.check_arguments(compat.resolved_arguments(made))


def test_heads_of_several_layers_are_of_models_that_are_refused_or_take_none():
    """Why --enable-multi-layer-eagle is refused."""
    files = Path(compat.resolve("sglang.srt.models").__path__[0]).glob("*.py")
    heads = {file.stem for file in files if "draft_model_idx" in file.read_text()}
    models = {
        "mimo_v2_nextn": "MiMoV2ForCausalLM",
        "inkling": "InklingForConditionalGeneration",
        "gigachat35_mtp": "GigaChat35ForCausalLM",
    }
    assert heads and heads <= {*models, "step3p5_mtp"}
    assert refusals._DRAFTS_OF_MODEL["Step3p5ForCausalLM"] == (drafts.NGRAM,)
    reasons = ("sliding-window layers", "latent attention (MLA)")
    assert set(models.values()) <= set().union(*(REFUSED[reason] for reason in reasons))


def test_what_the_user_chose_of_drafts_stays(server_args, model_dir):
    model = model_dir()
    chosen = {
        "speculative_algorithm": "STANDALONE",
        "speculative_draft_model_path": model,
        "speculative_num_steps": 5,
        "speculative_eagle_topk": 1,
        "speculative_num_draft_tokens": 6,
        "speculative_draft_attention_backend": "flashinfer",
    }
    made = server_args(model_path=model, kv_cache_dtype="kvarn", **chosen)
    args = compat.resolved_arguments(made)
    assert {name: getattr(args, name) for name in chosen} == chosen and compat.draft_tokens(made) == 6


@pytest.mark.parametrize("algorithm", ["NGRAM", "STANDALONE", "EAGLE", "EAGLE3"])
def test_mixed_chunks_are_left_to_sglang(server_args, model_dir, algorithm):
    """SGLang turns them off for algorithms whose requests cannot go on with drafts after a step without."""
    model, kind = model_dir(), compat.resolve("sglang.srt.speculative.spec_info.SpeculativeAlgorithm")
    chosen = {"speculative_algorithm": algorithm, "speculative_ngram_max_bfs_breadth": 1, "enable_mixed_chunk": True}
    if algorithm != "NGRAM":
        chosen["speculative_draft_model_path"] = model
    args = compat.resolved_arguments(server_args(model_path=model, kv_cache_dtype="kvarn", **chosen))
    mixes = hasattr(kind, "supports_mixed_chunk") and kind.from_string(algorithm).supports_mixed_chunk()
    assert args.enable_mixed_chunk == mixes == (compat.version() == "0.5.23" and algorithm.startswith("EAGLE"))


def test_a_server_without_drafts_has_one_new_token_per_request(server_args, model_dir):
    args = server_args(model_path=model_dir(), kv_cache_dtype="kvarn")
    assert compat.draft_tokens(args) == 1
    assert compat.resolved_arguments(args).speculative_draft_attention_backend is None


@pytest.mark.parametrize(
    ("capability", "backend"), [((9, 0), "fa3"), ((8, 0), "flashinfer"), ((12, 0), "flashinfer")], ids=str
)
def test_the_draft_model_is_attended_by_what_stock_sglang_takes(monkeypatch, capability, backend):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert compat.draft_attention_backend(SimpleNamespace(device=None)) == backend


# three drafts of two requests; the second has one only, and SGLang fills up behind the root
TREES = np.array([1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 0, 1])


def test_what_fills_up_a_chain_follows_its_last_draft(monkeypatch):
    monkeypatch.setattr(compat, "published_argument", {"kv_cache_dtype": "kvarn_k4v4_g128"}.get)
    tokens = np.array([5, 6, 7, 5, 8, 0])
    kept, mask = drafts.keep_chains((tokens, TREES), None)
    assert kept is tokens and mask.dtype == TREES.dtype
    assert mask.tolist() == [1, 0, 0, 1, 1, 0, 1, 1, 1] * 2


@pytest.mark.parametrize("cache", ["auto", "fp8_e4m3", None])
def test_trees_of_other_caches_stay(monkeypatch, cache):
    monkeypatch.setattr(compat, "published_argument", {"kv_cache_dtype": cache}.get)
    assert drafts.keep_chains((np.zeros(6), TREES), None) is None


@pytest.mark.parametrize(("cache", "packed"), [("kvarn", False), ("auto", True), ("fp8_e4m3", True), (None, True)])
def test_host_memory_packs_a_draft_model_into_pages_of_other_caches_only(monkeypatch, cache, packed):
    monkeypatch.setattr(compat, "published_argument", {"kv_cache_dtype": cache}.get)
    assert drafts.keep_apart(lambda *args: args == (1, 2), 1, 2) is packed
    assert drafts.keep_apart(lambda *args: False, 1, 2) is False


def test_no_argument_is_published_outside_of_a_server(monkeypatch):
    context = compat.resolve("sglang.srt.runtime_context.get_context")()
    fresh = type(context)(context.parallel)
    monkeypatch.setattr("sglang.srt.runtime_context.get_context", lambda: fresh)
    assert compat.published_argument("kv_cache_dtype") is None


def pool_of_8b_with_eagle(monkeypatch, server_args, cache: str, memory: int) -> int:
    """Return the tokens of a pool of a Qwen3-8B beside an EAGLE3 head of one layer, by SGLang's own arithmetic.

    Of the memory a kvarn cache has taken its workspaces, for an H100 with what is installed here.
    """
    chosen = models.arguments(models.DUMMY) | models.draft_arguments(models.DUMMY, models.EAGLE3, drafts.DRAFT_TOKENS)
    args = server_args(kv_cache_dtype=cache, **chosen)
    config, shape = compat.model_config(args), SimpleNamespace(attn_tp_size=1, attn_dcp_size=1, attn_dp_size=1)
    module = compat.resolve("sglang.srt.model_executor.pool_configurator")
    monkeypatch.setattr(module, "get_parallel", lambda: shape)
    monkeypatch.setattr(compat, "get_parallel", lambda: shape, raising=False)
    none = SimpleNamespace(max_total_tokens=None, enable_hisparse=False)
    for name in ("get_schedule", "get_memory"):
        monkeypatch.setattr(module, name, lambda: none, raising=False)
    monkeypatch.setattr(module, "compute_page_shard_scratch_bytes", lambda *_, **__: 0, raising=False)
    split = "sglang.srt.layers.cp.utils.get_glm_dsa_layer_split_effective_num_layers"
    monkeypatch.setattr(split, lambda kvc, num_layers: num_layers)
    kvc = SimpleNamespace(
        is_draft_worker=False,
        server_args=args,
        model_config=config,
        model_dtype=torch.bfloat16,
        kv_cache_dtype=torch.uint8 if cache.startswith("kvarn") else torch.bfloat16,
        kv_cache_dtype_str=cache,
        layer_info=SimpleNamespace(start_layer=0, end_layer=36, num_effective_layers=36),
        spec_algorithm=compat.resolve("sglang.srt.speculative.spec_info.SpeculativeAlgorithm").EAGLE3,
        spec_aux_config=SimpleNamespace(eagle_draft_num_layers=1),
        use_mla_backend=False,
        pp_size=1,
        fused_entry_bytes=lambda kind: None,
    )
    if cache.startswith("kvarn"):
        preset = KVarNConfig.from_preset(cache)
        # with a draft model SGLang admits 48 requests where nobody chooses
        bounds = capacity.Bounds(48, 256, 40_960, 8192, draft_tokens=compat.draft_tokens(args))
        memory -= capacity.charge(budget.model_shape(kvc), preset, memory, bounds, torch.device("cuda"), H100).workspace
    return module.DefaultPoolConfigurator(kvc).calculate_pool_sizes(memory, 128).max_total_num_tokens


def test_an_8b_model_with_an_eagle_head_has_four_times_the_tokens(monkeypatch, server_args):
    memory = 40 << 30
    kvarn, stock = (pool_of_8b_with_eagle(monkeypatch, server_args, cache, memory) for cache in ("kvarn", "auto"))
    # the target's bytes of a token and the head's
    assert stock == memory // (147_456 + 4096) // 128 * 128
    assert memory * 0.98 // (32_256 + 4096) - 128 < kvarn < memory // (32_256 + 4096)
    assert kvarn / stock >= 4.1, (kvarn, stock)


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), ("fp8_e4m3", 1)])
def test_a_token_is_charged_its_bytes_in_the_draft_cache(monkeypatch, server_args, model_dir, dtype, itemsize):
    if dtype and not compat.has_argument("speculative_draft_kv_cache_dtype"):
        pytest.skip("this SGLang has no --speculative-draft-kv-cache-dtype")
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dp_size=1), raising=False)
    # two layers of 2 KV heads of 64 beside a draft of three of 4 heads of 128
    target = model_dir(num_hidden_layers=2)
    draft = model_dir(num_hidden_layers=3, num_key_value_heads=4, head_dim=128)
    chosen = {"speculative_algorithm": "STANDALONE", "speculative_draft_model_path": draft, "dtype": "float32"}
    if dtype:
        chosen["speculative_draft_kv_cache_dtype"] = dtype
    args = server_args(model_path=target, kv_cache_dtype="kvarn", **chosen)
    kvc = SimpleNamespace(
        is_draft_worker=False,
        server_args=args,
        model_config=compat.model_config(args),
        model_dtype=torch.float32,
        layer_info=SimpleNamespace(start_layer=0, end_layer=2),
        spec_aux_config=SimpleNamespace(eagle_draft_num_layers=3),
    )
    configurator = SimpleNamespace(_cell_size=7)
    drafts.charge_draft(None, configurator, kvc)
    token = budget.model_shape(kvc).token_bytes(KVarNConfig.from_preset("kvarn"))
    pool = compat.MHATokenToKVPool(
        128,
        page_size=128,
        dtype=torch.float8_e4m3fn if dtype else torch.float32,
        head_num=4,
        head_dim=128,
        layer_num=3,
        device="cpu",
        enable_memory_saver=False,
    )
    # SGLang adds a page for padding
    assert configurator._cell_size - token == sum(pool.get_kv_size_bytes()) // 256 == 2 * 3 * 4 * 128 * itemsize
    # the layers of another kind of draft model, where SGLang counts those
    kvc.spec_aux_config = SimpleNamespace(eagle_draft_num_layers=None, dflash_draft_num_layers=3)
    configurator._cell_size = 0
    drafts.charge_draft(None, configurator, kvc)
    assert configurator._cell_size - token == 2 * 3 * 4 * 128 * itemsize
    kvc.spec_aux_config.dflash_draft_num_layers = None
    configurator._cell_size = 7
    drafts.charge_draft(None, configurator, kvc)
    assert configurator._cell_size == 7
    kvc.is_draft_worker = True
    drafts.charge_draft(None, configurator, kvc)
    assert configurator._cell_size == 7


def test_a_head_that_comes_with_the_model_is_charged_a_layer(monkeypatch, server_args, model_dir):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1, attn_dp_size=1), raising=False)
    model = model_dir(architectures=["Qwen3MoeForCausalLM"], model_type="qwen3_moe", num_hidden_layers=2)
    args = server_args(model_path=model, kv_cache_dtype="kvarn", speculative_algorithm="NEXTN", dtype="float16")
    # 0.5.16 counts no layers of a head without a path of its own
    kvc = SimpleNamespace(server_args=args, spec_aux_config=SimpleNamespace(eagle_draft_num_layers=None))
    config = compat.model_config(args)
    assert budget.draft_token_bytes(kvc) == 2 * config.num_key_value_heads * config.head_dim * 2
    ngram = server_args(
        model_path=model, kv_cache_dtype="kvarn", speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1
    )
    kvc.server_args = ngram
    assert budget.draft_token_bytes(kvc) == 0
