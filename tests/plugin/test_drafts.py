# SPDX-License-Identifier: Apache-2.0
"""What speculative decoding adds to a server with a kvarn cache: arguments, chains, the draft model's memory."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from sglang_kvarn import budget, compat, drafts


@pytest.fixture(autouse=True)
def drafts_are_served(monkeypatch):
    """Let SGLang take the arguments on a CPU too."""
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    monkeypatch.setattr(platform, "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)


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


def test_no_argument_is_published_outside_of_a_server(monkeypatch):
    context = compat.resolve("sglang.srt.runtime_context.get_context")()
    fresh = type(context)(context.parallel)
    monkeypatch.setattr("sglang.srt.runtime_context.get_context", lambda: fresh)
    assert compat.published_argument("kv_cache_dtype") is None


@pytest.mark.parametrize(("dtype", "itemsize"), [(None, 4), ("fp8_e4m3", 1)])
def test_a_token_is_charged_its_bytes_in_the_draft_cache(monkeypatch, server_args, model_dir, dtype, itemsize):
    if dtype and not compat.has_argument("speculative_draft_kv_cache_dtype"):
        pytest.skip("this SGLang has no --speculative-draft-kv-cache-dtype")
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1), raising=False)
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
    kvc.spec_aux_config.eagle_draft_num_layers = None
    configurator._cell_size = 7
    drafts.charge_draft(None, configurator, kvc)
    assert configurator._cell_size == 7
    kvc.is_draft_worker = True
    drafts.charge_draft(None, configurator, kvc)
    assert configurator._cell_size == 7


def test_a_head_that_comes_with_the_model_is_charged_a_layer(monkeypatch, server_args, model_dir):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=1), raising=False)
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
