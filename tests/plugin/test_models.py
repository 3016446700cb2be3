# SPDX-License-Identifier: Apache-2.0
"""Every architecture of the installed SGLang is judged, and each verdict is what a launch says at its arguments."""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import os
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import states_on_cpu
from model_table import (
    CHANGES,
    DRAFTS,
    LATENT,
    REFUSED,
    SERVED,
    SERVED_HYBRIDS,
    SERVED_UNCACHED,
    SERVED_WINDOWS,
    SERVED_WINDOWS_IN_RECORDS,
    WINDOWS,
    WRAPPERS,
)
from sglang_kvarn import compat, refusals

TWO_LAYERS = {"num_hidden_layers": 2}
DUAL_CHUNK = {"dual_chunk_attention_config": {"chunk_size": 262144, "local_size": 8192}}
SEVEN_B = {"hidden_size": 4096, "num_attention_heads": 32, "head_dim": 128}
FULL = {"sliding_window": 0, "layer_types": ["full_attention"] * 2, "num_attention_heads_per_layer": [64, 64]}
NO_WINDOW = {"sliding_window": None, "layer_types": ["full_attention"] * 2}
# verdicts that a default configuration does not show: architecture, model_type, configuration, word (None: served)
VARIANTS = [
    ("AfmoeForCausalLM", "afmoe", TWO_LAYERS | WINDOWS, "sliding-window layers"),
    ("BaichuanForCausalLM", "-", SEVEN_B, None),
    ("DeepseekVL2ForCausalLM", "-", {"use_mla": False}, None),
    # without windows too: transformers gives it a pattern of length 0
    ("Exaone4ForCausalLM", "exaone4", TWO_LAYERS | NO_WINDOW, "attention backends of its own"),
    ("Gemma3TextModel", "-", {"use_bidirectional_attention": True}, "attention to later tokens"),
    ("Glm4ForCausalLM", "glm4", DUAL_CHUNK, "dual-chunk attention"),
    ("GraniteMoeHybridForCausalLM", "granitemoehybrid", TWO_LAYERS | {"layer_types": ["attention"] * 2}, None),
    ("HunYuanMoEV1ForCausalLM", "-", {"use_cla": True, "cla_share_factor": 2}, None),
    ("IQuestLoopCoderForCausalLM", "-", {"loop_num": 1}, None),
    ("InternVLChatModel", "internvl_chat", {"llm_config": {"architectures": ["GptOssForCausalLM"]}}, "sliding-window"),
    ("LagunaForCausalLM", "laguna", TWO_LAYERS | FULL, None),
    ("LlamaForCausalLM", "-", {"attn_logit_softcapping": 50.0}, "a logit cap"),
    ("LlamaForCausalLM", "-", {"head_dim": 80}, "head_dim 80"),
    ("LlamaForCausalLM", "-", {"head_dim": 96}, "head_dim 96"),
    ("LlamaForCausalLM", "-", {"index_topk": 2048}, "sparse attention"),
    ("LlamaForCausalLM", "-", {"is_causal": False}, "attention to later tokens"),
    ("LlamaForCausalLM", "-", {"layer_types": ["full_attention", "conv"]}, "layers of type conv"),
    ("LlamaForCausalLM", "-", {"num_attention_heads_per_layer": [4, 4]}, None),
    ("LlamaForCausalLM", "-", {"num_attention_heads_per_layer": [4, 8]}, "different numbers of query heads"),
    ("LlamaForCausalLM", "-", {"num_kv_shared_layers": 1}, "share another layer's keys and values"),
    ("LlamaForCausalLM", "-", {"v_head_dim": 128}, "values of 128 and keys of 64 channels"),
    ("MiMoV2ForCausalLM", "-", {"hybrid_layer_pattern": [0, 0], "v_head_dim": 128}, "sliding-window layers"),
    # SGLang gives these models no window, so a kvarn cache computes what a 16-bit cache does
    ("MistralForCausalLM", "mistral", {"sliding_window": 4096}, None),
    ("Phi3ForCausalLM", "phi3", {"hidden_size": 4096, "sliding_window": 2047}, None),
    ("NemotronHForCausalLM", "nemotron_h", {"hybrid_override_pattern": "M-M-"}, "states of a kind that is not tested"),
    ("Olmo2ForCausalLM", "olmo3", {}, None if compat.is_since("0.5.23") else "sliding-window layers of a kind"),
    ("Gemma3ForCausalLM", "gemma3_text", {"use_bidirectional_attention": True}, "attention to later tokens"),
    ("Gemma3ForCausalLM", "gemma3_text", {"attn_logit_softcapping": 50.0}, "a logit cap"),
    ("PixtralForConditionalGeneration", "deepseek_v3", LATENT, "latent attention"),
    ("Qwen2ForCausalLM", "qwen2", DUAL_CHUNK, "dual-chunk attention"),
    ("Qwen2ForCausalLM", "qwen2", {"use_sliding_window": True, "sliding_window": 512}, "sliding-window layers"),
    ("Qwen2MoeForCausalLM", "qwen2_moe", DUAL_CHUNK, "dual-chunk attention"),
    ("Qwen3MoeForCausalLM", "qwen3_moe", DUAL_CHUNK, "dual-chunk attention"),
]
# what a model of SERVED passes to its attention only if the configuration asks for it, which the variants above check
BY_CONFIGURATION = {
    *("afmoe.sliding_window_size", "olmo2.sliding_window_size"),
    *("granite.sliding_window_size", "granitemoe.sliding_window_size"),  # Granite SWA, an architecture of its own
    *("commandr.sliding_window_size", "sarvam_moe.v_head_dim"),  # Cohere2 and Sarvam MLA likewise
}
PLAIN_ATTENTION = {"layer_id", "num_heads", "head_dim", "scaling", "num_kv_heads", "quant_config", "prefix"}
# what SGLang asks before it wraps attention in a backend, or builds a pool, of another kind than the plain one
WRAPPERS_ASK = {"Dots3Config", "hybrid_gdn_config", "is_minimax_sparse", "mambaish_config"}
POOLS_ASK = {
    *("is_dsa_model", "is_dsv4_model", "use_mla_backend", "is_hybrid_swa", "mambaish_config", "is_minimax_sparse"),
    # arguments and platforms, not models
    *("is_out_of_tree", "attention_backend", "mtp_pool", "is_float4_e2m1fn_x2", "quant_method"),
}


# parts of these conditions that ask nothing of a model
NEUTRAL = {
    *("runner", "model_config", "hf_config", "hf_text_config", "self", "isinstance", "cfg", "kv_cache_dtype"),
    *("current_platform", "server_args", "get_exec", "kernel", "enable_page_major", "kv_cache_dtype_str"),
}


def sources() -> list[tuple[Path, ast.Module, list[str]]]:
    """Return SGLang's models as (file, source, architectures): importing them takes a minute and a GPU."""
    found = []
    for path in compat.resolve("sglang.srt.models").__path__:
        for file in sorted(Path(path).glob("*.py")):
            tree = ast.parse(file.read_text(encoding="utf-8-sig"))
            for node in tree.body:
                if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EntryClass":
                    entries = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else [node.value]
                    found.append((file, tree, [ast.unparse(entry) for entry in entries]))
    return found


SOURCES = sources()
INSTALLED = [name for _, _, names in SOURCES for name in names]


def here(verdicts: dict[str, str]) -> list[tuple[str, str]]:
    return [row for row in verdicts.items() if row[0] in INSTALLED]


def asked(function) -> set[str]:
    """Return the names in the conditions of a function that decide on its own level which object it returns."""
    tests = []

    def visit(statements: list[ast.stmt]) -> None:
        for statement in statements:
            if isinstance(statement, ast.If):
                tests.append(statement.test)
                visit(statement.orelse)

    visit(ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body)
    return {
        node.attr if isinstance(node, ast.Attribute) else node.id
        for test in tests
        for node in ast.walk(test)
        if isinstance(node, ast.Attribute | ast.Name)
    }


@pytest.fixture(autouse=True)
def environment():
    """Take back the variables that SGLang sets for a model."""
    with mock.patch.dict(os.environ):
        yield


@pytest.fixture
def launch(server_args, model_dir):
    """Return a function that goes as far as a launch goes before it spawns a process."""

    def check(architecture: str, model_type: str, changes: dict, **arguments) -> None:
        kind = "llama+" if model_type == "-" else model_type
        config = {"architectures": [architecture], "model_type": kind.removesuffix("+"), **changes}
        path = model_dir(plain=kind.endswith("+"), **config)
        server_args(model_path=path, kv_cache_dtype="kvarn", **arguments).check_server_args()

    return check


def refused(word: str):
    return pytest.raises(ValueError, match=rf"^\w+ has .*{re.escape(word)}.*: drop --kv-cache-dtype$")


def test_reasons_in_sglangs_code_still_hold():
    where = "sglang.srt.arg_groups.model_hook" if compat.is_since("0.5.23") else "sglang.srt.server_args"
    checks = Path(compat.resolve(where).__file__).read_text()
    accepted = checks.partition('"Exaone4ForCausalLM"')[2].partition("assert")[0]
    assert 'accepted_backends = ["fa3", "triton", "trtllm_mha"]' in accepted
    overrides = inspect.getsource(compat.resolve("sglang.srt.arg_groups.overrides._step3p_overrides"))
    assert 'overrides["disable_hybrid_swa_memory"] = True' in overrides.partition("enable_hierarchical_cache")[2]


def test_windows_of_step_see_the_tokens_that_sglang_keeps_for_them():
    (step,) = (file.read_text() for file, _, names in SOURCES if "Step3p5ForCausalLM" in names)
    # other models hand on a token less, since backends see the query's own token besides
    assert all(f"{line}\n" in step for line in ("sliding_window_size=self.sliding_window,", "= config.sliding_window"))
    # so pool and prefix tree keep the window of the configuration, before a query's own token
    assert "get_attention_sliding_window_size" not in step


def test_every_architecture_of_sglang_is_judged():
    refused = [name for verdicts in REFUSED.values() for name in verdicts]
    judged = [*SERVED, *SERVED_HYBRIDS, *SERVED_UNCACHED, *SERVED_WINDOWS, *refused, *DRAFTS, *WRAPPERS]
    judged += SERVED_WINDOWS_IN_RECORDS
    assert len(INSTALLED) > 150 and len(judged) == len(set(judged))
    new = sorted(set(INSTALLED) - set(judged))
    assert not new, f"SGLang {compat.version()} adds architectures that nobody judged: {', '.join(new)}"


@pytest.mark.parametrize(("architecture", "model_type"), here(SERVED), ids=lambda value: value)
def test_launch_takes(launch, architecture, model_type):
    launch(architecture, model_type, CHANGES.get(architecture, {}))


@pytest.fixture
def checkpoints(monkeypatch):
    states_on_cpu.accept_states(monkeypatch)


# arguments with which the installed SGLang serves a hybrid
HYBRID_ARGUMENTS = {} if compat.saves_states_at_page_ends() else {"disable_radix_cache": True}
# the one whose code is wrong until 0.5.20
WRONG = set() if compat.has_argument("attn_dp_size") else {"GraniteMoeHybridForCausalLM"}
HYBRIDS = [row for row in here(SERVED_HYBRIDS) if row[0] not in WRONG]
needs_checkpoints = pytest.mark.skipif(bool(HYBRID_ARGUMENTS), reason="this SGLang saves states of other tokens")


@pytest.mark.parametrize(("architecture", "model_type"), HYBRIDS, ids=lambda value: value)
def test_launch_takes_a_hybrid(launch, checkpoints, architecture, model_type):
    launch(architecture, model_type, CHANGES.get(architecture, {}), **HYBRID_ARGUMENTS)


@pytest.mark.parametrize(("architecture", "model_type"), here(SERVED_UNCACHED), ids=lambda value: value)
def test_launch_takes_a_hybrid_without_a_prefix_cache_only(launch, checkpoints, architecture, model_type):
    launch(architecture, model_type, {}, disable_radix_cache=True)
    with pytest.raises(ValueError, match=rf"^a prefix cache for the states of {architecture} .*--disable-radix-cache"):
        launch(architecture, model_type, {})


@pytest.mark.parametrize(("architecture", "model_type"), HYBRIDS, ids=lambda value: value)
def test_launch_refuses_a_prefix_cache_of_states_that_sglang_saves_at_other_tokens(
    launch, checkpoints, monkeypatch, architecture, model_type
):
    monkeypatch.setattr(compat, "saves_states_at_page_ends", lambda: False)
    launch(architecture, model_type, CHANGES.get(architecture, {}), disable_radix_cache=True)
    with pytest.raises(ValueError, match=r"saves states of other tokens if pages have 128: .* add --disable-radix"):
        launch(architecture, model_type, CHANGES.get(architecture, {}))


def test_launch_refuses_a_hybrid_whose_code_in_sglang_is_wrong(launch, checkpoints, monkeypatch):
    monkeypatch.setattr(compat, "_RIGHT_SINCE", {"GraniteMoeHybridConfig": "99.0"})
    with pytest.raises(ValueError, match="adds the residual of the last layer twice"):
        launch("GraniteMoeHybridForCausalLM", "granitemoehybrid", {})


FOUR_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64}
# heads and groups of states
SHARED_STATES = [
    ("FalconH1ForCausalLM", "falcon_h1", {"mamba_n_heads": 32, "mamba_n_groups": 1, "mamba_d_ssm": 1024}, None),
    ("FalconH1ForCausalLM", "falcon_h1", {"mamba_n_heads": 32, "mamba_n_groups": 2, "mamba_d_ssm": 1024}, "1 or 2"),
    ("NemotronHForCausalLM", "nemotron_h", {"mamba_num_heads": 128, "n_groups": 8}, None),
    ("NemotronHForCausalLM", "nemotron_h", {"mamba_num_heads": 6, "n_groups": 1}, "1 or 2 or 3"),
    ("Qwen3NextForCausalLM", "qwen3_next", {"linear_num_value_heads": 32, "linear_num_key_heads": 16}, None),
    ("Qwen3NextForCausalLM", "qwen3_next", {"linear_num_value_heads": 4, "linear_num_key_heads": 1}, "1"),
]


@pytest.mark.parametrize(("architecture", "model_type", "states", "sizes"), SHARED_STATES)
def test_launch_refuses_ranks_that_cannot_share_states(
    launch, checkpoints, monkeypatch, architecture, model_type, states, sizes
):
    monkeypatch.setattr(compat, "_SUMS_ONCE_SINCE", {})
    changes = FOUR_HEADS | states
    arguments = CHANGES.get(architecture, {}) | changes, HYBRID_ARGUMENTS | {"tp_size": 4}
    if sizes is None:
        launch(architecture, model_type, arguments[0], **arguments[1])
        return
    with pytest.raises(ValueError, match=rf"cannot share the states of {architecture}, .* set --tp-size to {sizes}$"):
        launch(architecture, model_type, arguments[0], **arguments[1])


def test_launch_refuses_ranks_of_a_hybrid_that_sglang_sums_wrongly(launch, checkpoints, monkeypatch):
    monkeypatch.setattr(compat, "_SUMS_ONCE_SINCE", {"FalconH1Config": "99.0"})
    launch("FalconH1ForCausalLM", "falcon_h1", FOUR_HEADS, **HYBRID_ARGUMENTS)
    with pytest.raises(ValueError, match=r"once for each rank, .*take SGLang 0\.5\.23 or set --tp-size to 1$"):
        launch("FalconH1ForCausalLM", "falcon_h1", FOUR_HEADS, tp_size=2, **HYBRID_ARGUMENTS)


HOST_MEMORY = {"enable_hierarchical_cache": True}


@pytest.mark.parametrize(("architecture", "model_type"), HYBRIDS, ids=lambda value: value)
def test_launch_takes_host_memory_for_states_where_they_are_of_page_ends(launch, checkpoints, architecture, model_type):
    chosen = CHANGES.get(architecture, {}), HOST_MEMORY
    if compat.hosts_states():
        for files in ({}, {"hicache_storage_backend": "file"}):
            launch(architecture, model_type, chosen[0], **chosen[1], **files)
        return
    why = rf"^--enable-hierarchical-cache .*{architecture} in SGLang .* saves states of other tokens if pages have 128"
    with pytest.raises(ValueError, match=f"{why}.*: use SGLang 0.5.23, or drop --enable-hierarchical-cache$"):
        launch(architecture, model_type, chosen[0], **chosen[1])


@needs_checkpoints
@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"mamba_radix_cache_strategy": "no_buffer"}, "no_buffer needs pages of one token"),
        ({"enable_mixed_chunk": True}, "not tested yet: drop --enable-mixed-chunk"),
        (HOST_MEMORY | {"hicache_mem_layout": "layer_first"}, "order page_first only: drop --hicache-mem-layout"),
        ({"mamba_track_interval": 192}, "--mamba-track-interval that is a multiple of the page size 128, not 192"),
        ({"linear_attn_backend": "cutedsl"}, "with --linear-attn-backend cutedsl needs pages of one token"),
    ],
    ids=["strategy", "mixed", "layout", "interval", "backend"],
)
def test_launch_refuses_arguments_of_a_hybrid(launch, checkpoints, arguments, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        launch("Qwen3NextForCausalLM", "qwen3_next", CHANGES["Qwen3NextForCausalLM"], **arguments)


# before, SGLang's code of Nemotron-H hands its hidden states to no draft model
WITH_DFLASH = ", STANDALONE or DFLASH" if compat.is_since("0.5.23") else " or STANDALONE"


@pytest.mark.parametrize(
    ("architecture", "model_type", "algorithm", "way_out"),
    [
        ("Qwen3NextForCausalLM", "qwen3_next", "NGRAM", None),
        ("Qwen3NextForCausalLM", "qwen3_next", "NEXTN", None),
        ("Qwen3NextForCausalLM", "qwen3_next", "EAGLE", None),
        ("Qwen3NextForCausalLM", "qwen3_next", "STANDALONE", None),
        ("Qwen3NextForCausalLM", "qwen3_next", "EAGLE3", None),
        ("NemotronHForCausalLM", "nemotron_h", "NGRAM", None),
        ("NemotronHForCausalLM", "nemotron_h", "STANDALONE", None),
        ("NemotronHForCausalLM", "nemotron_h", "NEXTN", f"set it to NGRAM{WITH_DFLASH}"),
    ],
    ids=lambda value: value,
)
def test_launch_takes_drafts_that_are_tested_beside_states(
    launch, checkpoints, monkeypatch, architecture, model_type, algorithm, way_out
):
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    monkeypatch.setattr(platform, "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)
    chosen = {"speculative_algorithm": algorithm, "speculative_ngram_max_bfs_breadth": 1, **HYBRID_ARGUMENTS}
    with pytest.raises(ValueError, match=f": {way_out}$") if way_out else contextlib.nullcontext():
        launch(architecture, model_type, CHANGES.get(architecture, {}), **chosen)


def test_launch_refuses_a_changing_number_of_drafts_beside_states(launch, checkpoints, monkeypatch):
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    monkeypatch.setattr(platform, "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)
    chosen = {"speculative_algorithm": "NEXTN", "speculative_adaptive": True, **HYBRID_ARGUMENTS}
    with pytest.raises(ValueError, match="beside states yet: drop --speculative-adaptive"):
        launch("Qwen3NextForCausalLM", "qwen3_next", CHANGES["Qwen3NextForCausalLM"], **chosen)


# what refusals read of ranks with requests of their own
ONE_RANK = {"enable_dp_attention": False, "dp_size": 1, "attn_dp_size": 1}


def test_drafts_beside_states_are_a_trial_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    monkeypatch.setattr(compat, "hybrid_config", lambda model_config: object())
    monkeypatch.setattr(compat, "has_gated_delta_nets", lambda states: True)
    monkeypatch.setattr(compat, "verifies_drafts", lambda states: True)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3NextForCausalLM"]))
    off = dict.fromkeys(("enable_mixed_chunk", "enable_hierarchical_cache", "speculative_adaptive"), False)
    off |= {"disable_radix_cache": True, "pp_size": 1, "disaggregation_mode": "null", **ONE_RANK}
    args = SimpleNamespace(speculative_algorithm="NGRAM", device="cpu", **off)
    refusals.check_states(args, model_config)
    for algorithm in ("NGRAM", "NEXTN", "EAGLE", "DFLASH"):
        refusals.check_states(SimpleNamespace(**vars(args) | {"speculative_algorithm": algorithm}), model_config)
    args.device = "cuda"
    for algorithm in ("NGRAM", "NEXTN", "EAGLE"):
        args.speculative_algorithm = algorithm
        refusals.check_states(args, model_config)
    args.speculative_algorithm = "DFLASH"
    monkeypatch.setattr(refusals, "_DRAFTS_ON_GPUS_SINCE", "0")
    refusals.check_states(args, model_config)
    monkeypatch.setattr(refusals, "_DRAFTS_ON_GPUS_SINCE", "99")
    with pytest.raises(ValueError, match=r"on a CPU only: use SGL.*, set it to NGRAM, or set KVARN_UNTESTED_DRAFTS=1"):
        refusals.check_states(args, model_config)
    monkeypatch.setenv(refusals.UNTESTED_DRAFTS_ENV, "1")
    refusals.check_states(args, model_config)


@pytest.mark.skipif(not compat.hosts_states(), reason="refused in this SGLang")
def test_host_memory_for_states_is_a_trial_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    monkeypatch.setattr(compat, "hybrid_config", lambda model_config: object())
    monkeypatch.setattr(compat, "has_gated_delta_nets", lambda states: True)
    monkeypatch.setattr(compat, "checkpoints_states", lambda server_args, model_config: True)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3NextForCausalLM"]))
    args = SimpleNamespace(
        device="cpu",
        speculative_algorithm=None,
        pp_size=1,
        **ONE_RANK,
        enable_mixed_chunk=False,
        disaggregation_mode="null",
        enable_hierarchical_cache=True,
        hicache_storage_backend=None,
        hicache_mem_layout="page_first",
        disable_radix_cache=False,
        mamba_radix_cache_strategy="extra_buffer",
        mamba_track_interval=256,
    )
    refusals.check_states(args, model_config)
    args.device = "cuda"
    with pytest.raises(ValueError, match=r"on a GPU yet, .*: drop --enable-h.*, or set KVARN_UNTESTED_HICACHE=1"):
        refusals.check_states(args, model_config)
    monkeypatch.setenv(refusals.UNTESTED_HICACHE_ENV, "1")
    refusals.check_states(args, model_config)


@pytest.mark.skipif(not compat.transfers_requests(), reason="refused in this SGLang")
@pytest.mark.parametrize("mode", ["prefill", "decode"])
@pytest.mark.parametrize(("architecture", "model_type"), HYBRIDS, ids=lambda value: value)
def test_launch_takes_transfers_of_states(launch, checkpoints, architecture, model_type, mode):
    launch(architecture, model_type, CHANGES.get(architecture, {}), disaggregation_mode=mode)


def test_transfers_of_states_are_a_trial_on_a_gpu(monkeypatch):
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    monkeypatch.setattr(compat, "hybrid_config", lambda model_config: object())
    monkeypatch.setattr(compat, "has_gated_delta_nets", lambda states: True)
    model_config = SimpleNamespace(hf_config=SimpleNamespace(architectures=["Qwen3NextForCausalLM"]))
    off = dict.fromkeys(("enable_mixed_chunk", "enable_hierarchical_cache", "speculative_adaptive"), False)
    off |= {"disable_radix_cache": True, "pp_size": 1, "speculative_algorithm": None, **ONE_RANK}
    for mode in ("prefill", "decode"):
        refusals.check_states(SimpleNamespace(device="cpu", disaggregation_mode=mode, **off), model_config)
    args = SimpleNamespace(device="cuda", disaggregation_mode="decode", **off)
    sentence = r"transfers of states beside records .* a CPU only: drop --disagg.*, or set KVARN_UNTESTED_TRANSFERS=1"
    with pytest.raises(ValueError, match=sentence):
        refusals.check_states(args, model_config)
    monkeypatch.setenv(refusals.UNTESTED_TRANSFERS_ENV, "1")
    refusals.check_states(args, model_config)


def test_launch_refuses_drafts_where_the_layers_of_sglang_stop_at_them(launch, checkpoints, monkeypatch):
    monkeypatch.setattr(compat, "_VERIFIES_SINCE", {"FalconH1Config": "99.0"})
    chosen = {"speculative_algorithm": "NGRAM", "speculative_ngram_max_bfs_breadth": 1, **HYBRID_ARGUMENTS}
    with pytest.raises(ValueError, match=r"stop at drafts: take SGLang 0\.5\.23 or drop --speculative-algorithm$"):
        launch("FalconH1ForCausalLM", "falcon_h1", CHANGES.get("FalconH1ForCausalLM", {}), **chosen)


@pytest.mark.parametrize(
    ("word", "architecture", "model_type"),
    [(word, *row) for word, verdicts in REFUSED.items() for row in here(verdicts)],
    ids=lambda value: value,
)
def test_launch_refuses(launch, word, architecture, model_type):
    with refused(word):
        launch(architecture, model_type, CHANGES.get(architecture, {}))


@pytest.mark.parametrize(
    ("architecture", "model_type", "changes", "word"),
    VARIANTS,
    ids=[f"{architecture}-{word or 'served'}" for architecture, _, _, word in VARIANTS],
)
def test_launch_judges_by_the_configuration(launch, architecture, model_type, changes, word):
    with refused(word) if word else contextlib.nullcontext():
        launch(architecture, model_type, changes)


@pytest.mark.parametrize("architecture", ["MiMoV2ForCausalLM", "UnlimitedOCRForCausalLM"])
def test_launch_refuses_windows_also_where_their_memory_is_disabled(launch, architecture):
    model_type = REFUSED["sliding-window layers"][architecture]
    with refused("sliding-window layers"):
        launch(architecture, model_type, CHANGES.get(architecture, {}), disable_hybrid_swa_memory=True)


@pytest.mark.parametrize(("architecture", "model_type"), here(SERVED_WINDOWS), ids=lambda value: value)
def test_launch_takes_models_with_sliding_windows(launch, architecture, model_type):
    if not compat.is_since(since := refusals.WITH_WINDOWS[architecture]):
        with refused(f"sliding-window layers of a kind that is not tested before SGLang {since}"):
            launch(architecture, model_type, CHANGES.get(architecture, {}))
        return
    launch(architecture, model_type, CHANGES.get(architecture, {}))
    with refused("of which --disable-hybrid-swa-memory keeps all tokens"):
        launch(architecture, model_type, CHANGES.get(architecture, {}), disable_hybrid_swa_memory=True)


STEP = [row for row in here(SERVED_WINDOWS) if row[0].startswith("Step") and compat.is_since("0.5.23")]


@pytest.mark.parametrize(("architecture", "model_type"), STEP, ids=lambda value: value)
def test_launch_refuses_step_with_heads_host_memory_and_ranks_that_cannot_share_its_windows(
    launch, monkeypatch, architecture, model_type
):
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    monkeypatch.setattr(platform, "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)
    model = architecture, model_type, CHANGES[architecture]
    flag = "--enable-hierarchical-cache"
    with pytest.raises(ValueError, match=rf"^{flag} .*{architecture}, .* keeps all tokens of its s.*: drop {flag}$"):
        launch(*model, enable_hierarchical_cache=True)
    launch(*model, speculative_algorithm="NGRAM", speculative_ngram_max_bfs_breadth=1)
    for algorithm in ("EAGLE", "NEXTN", "EAGLE3"):
        with pytest.raises(ValueError, match=rf"^--speculative-.*{architecture}, because drafts .*: set it to NGRAM$"):
            launch(*model, speculative_algorithm=algorithm)
    launch(*model, tp_size=8)
    with pytest.raises(ValueError, match=r"the 64 or 96 query heads and 8 KV .*: set --tp-size to 1 or 2 or 4 or 8$"):
        launch(*model, tp_size=64)


@pytest.mark.parametrize(("architecture", "model_type"), here(SERVED_WINDOWS_IN_RECORDS), ids=lambda value: value)
def test_launch_takes_models_whose_windows_are_read_from_records(launch, architecture, model_type):
    if not compat.calls_attention_causal(architecture):
        with refused("does not call causal"):
            launch(architecture, model_type, CHANGES.get(architecture, {}))
        return
    launch(architecture, model_type, CHANGES.get(architecture, {}))
    flag = "--attention-backend"
    with pytest.raises(ValueError, match=f"needs the attention backend kvarn, not triton.*: drop {flag}"):
        launch(architecture, model_type, CHANGES.get(architecture, {}), attention_backend="triton")
    flag = "--enable-hierarchical-cache"
    refusal = pytest.raises(ValueError, match=rf"^{flag} cannot .*{architecture}.*: drop {flag}")
    with contextlib.nullcontext() if compat.hosts_windows() else refusal:
        launch(architecture, model_type, CHANGES.get(architecture, {}), enable_hierarchical_cache=True)


@pytest.mark.parametrize("kind", ["sliding_attention", "full_attention"])
def test_launch_refuses_models_with_one_kind_of_layer_in_a_pool_for_two(launch, kind):
    with refused("only layers with full attention or only sliding-window layers"):
        launch("GptOssForCausalLM", "gpt_oss", TWO_LAYERS | {"layer_types": [kind] * 2})


@pytest.mark.parametrize(
    ("arguments", "flag"),
    [
        pytest.param(
            {"enable_hierarchical_cache": True},
            "--enable-hierarchical-cache",
            marks=pytest.mark.skipif(compat.hosts_windows(), reason="served in this SGLang"),
        ),
        pytest.param(
            {"pp_size": 2},
            "--pp-size",
            marks=pytest.mark.skipif(not compat.runs_pipelines(), reason="refused beside any layers"),
        ),
        ({"prefill_attention_backend": "fa3"}, "--prefill-attention-backend and --decode-attention-backend"),
        ({"attention_backend": "kvarn"}, "--attention-backend"),
        ({"attention_backend": "torch_native"}, "--attention-backend"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_launch_refuses_arguments_beside_sliding_windows(launch, arguments, flag):
    architecture = "LagunaForCausalLM"
    with pytest.raises(ValueError, match=rf"^{flag}.* cannot .*{architecture}.*: drop {flag}"):
        launch(architecture, "laguna", CHANGES[architecture], **arguments)


@pytest.mark.skipif(not compat.hosts_windows(), reason="refused in this SGLang")
def test_launch_takes_files_behind_host_memory_of_sliding_windows(launch):
    files = {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"}
    launch("LagunaForCausalLM", "laguna", CHANGES["LagunaForCausalLM"], **files)


EAGLE3 = {"speculative_algorithm": "EAGLE3", "speculative_eagle_topk": 1, "speculative_num_steps": 3}
# the version with which DP attention has run beside some of them
RUN = compat.is_since("0.5.23")


@pytest.mark.parametrize(
    ("architecture", "model_type", "beside", "arguments"),
    [
        ("LagunaForCausalLM", "laguna", "its sliding windows", {}),
        ("GptOssForCausalLM", "gpt_oss", None if RUN else "its sliding windows", {}),
        ("GptOssForCausalLM", "gpt_oss", "its sliding windows and drafts", EAGLE3),
        ("Qwen3NextForCausalLM", "qwen3_next", None if RUN else "states of its kind", HYBRID_ARGUMENTS),
        ("NemotronHForCausalLM", "nemotron_h", "states of its kind", HYBRID_ARGUMENTS),
    ],
)
def test_launch_takes_dp_attention_where_it_has_run(
    launch, checkpoints, monkeypatch, architecture, model_type, beside, arguments
):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "0|1")
    platform = type(compat.resolve("sglang.srt.platforms.current_platform"))
    monkeypatch.setattr(platform, "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)
    ranks = {"enable_dp_attention": True, "dp_size": 2, "tp_size": 2}
    sentence = rf"^DP attention .*{architecture}.* beside {beside}: drop --enable-dp-attention .*_RANKS=1 to try it$"
    with pytest.raises(ValueError, match=sentence) if beside else contextlib.nullcontext():
        launch(architecture, model_type, FOUR_HEADS | CHANGES.get(architecture, {}), **ranks, **arguments)


def test_some_draft_models_beside_sliding_windows_are_refused_and_a_gpu_is_a_trial(monkeypatch):
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)
    config = SimpleNamespace(is_hybrid_swa=True, hf_config=SimpleNamespace(architectures=["GptOssForCausalLM"]))
    off = {"enable_hierarchical_cache": False, "hicache_storage_backend": None, "speculative_algorithm": None}
    off |= {"device": "cpu"}
    off |= {"tp_size": 1, "pp_size": 1, "disaggregation_mode": "null", **ONE_RANK}
    off |= {"attention_backend": "fa3", "prefill_attention_backend": None, "decode_attention_backend": None}
    refusals.check_windows(SimpleNamespace(**off), config)
    refusals.check_windows(SimpleNamespace(**off | {"attention_backend": "flashinfer"}), config)
    refusals.check_windows(SimpleNamespace(**off | {"speculative_algorithm": "NGRAM"}), config)
    with pytest.raises(ValueError, match=r"of that kind are not tested beside sliding .* NGRAM, EAGLE or EAGLE3$"):
        refusals.check_windows(SimpleNamespace(**off | {"speculative_algorithm": "STANDALONE"}), config)
    refusals.check_windows(SimpleNamespace(**off | {"speculative_algorithm": "EAGLE3"}), config)
    of_flashinfer = {"speculative_algorithm": "NGRAM", "attention_backend": "flashinfer"}
    with pytest.raises(ValueError, match=r"flashinfer cannot verify drafts .* first tokens .*: set --attention"):
        refusals.check_windows(SimpleNamespace(**off | of_flashinfer), config)
    on_gpu = SimpleNamespace(**off | {"device": "cuda"})
    monkeypatch.setattr(compat, "is_since", lambda version: True)
    refusals.check_windows(on_gpu, config)
    for changes in ({"enable_hierarchical_cache": True}, *({"speculative_algorithm": x} for x in ("NGRAM", "EAGLE3"))):
        refusals.check_windows(SimpleNamespace(**vars(on_gpu) | changes), config)
    on_cpus = {"--tp-size": {"tp_size": 2}, "--speculative-algorithm": {"speculative_algorithm": "EAGLE"}}
    on_cpus["--hicache-storage-backend"] = {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"}
    for flag, changes in on_cpus.items():
        refusals.check_windows(SimpleNamespace(**off | changes), config)
        with pytest.raises(ValueError, match=rf"^{flag} .*on a CPU only: drop {flag}, or set KVARN_UNTESTED_WINDOWS=1"):
            refusals.check_windows(SimpleNamespace(**vars(on_gpu) | changes), config)
    config.hf_config.architectures[0] = "MellumForCausalLM"
    with pytest.raises(ValueError, match=r"on a CPU only: drop --kv-cache-dtype, or set KVARN_UNTESTED_WINDOWS=1"):
        refusals.check_windows(on_gpu, config)
    config.hf_config.architectures[0] = "GptOssForCausalLM"
    monkeypatch.setattr(compat, "is_since", lambda version: False)
    with pytest.raises(ValueError, match=r"on a CPU only: drop --kv-cache-dtype, or set KVARN_UNTESTED_WINDOWS=1"):
        refusals.check_windows(on_gpu, config)
    kept = SimpleNamespace(is_hybrid_swa=False, hf_config=config.hf_config)
    kept.hf_text_config = SimpleNamespace(layer_types=["full_attention"], sliding_window=512)
    refusals.check_windows(on_gpu, kept)
    kept.hf_text_config.layer_types.append("sliding_attention")
    # all layers are attended by ours
    refusals.check_windows(SimpleNamespace(**off | of_flashinfer), kept)
    with pytest.raises(ValueError, match=r"on a CPU only: drop --kv-cache-dtype, or set KVARN_UNTESTED_WINDOWS=1"):
        refusals.check_windows(on_gpu, kept)
    monkeypatch.setenv(refusals.UNTESTED_WINDOWS_ENV, "1")
    for model_config in (config, kept):
        refusals.check_windows(SimpleNamespace(**vars(on_gpu) | {"tp_size": 2}), model_config)
    # between servers windows go along, in records and beside them
    sentence = r"transfers of sliding windows .* a CPU only: drop --disagg.*, or set KVARN_UNTESTED_TRANSFERS=1"
    for mode, model_config in itertools.product(("prefill", "decode"), (config, kept)):
        refusals.check_windows(SimpleNamespace(**off | {"disaggregation_mode": mode}), model_config)
        sent = SimpleNamespace(**vars(on_gpu) | {"disaggregation_mode": mode})
        with pytest.raises(ValueError, match=sentence):
            refusals.check_windows(sent, model_config)
        with monkeypatch.context() as patch:
            patch.setenv(refusals.UNTESTED_TRANSFERS_ENV, "1")
            refusals.check_windows(sent, model_config)
    # of gpt-oss and Laguna drafts are verified behind it
    drafted = SimpleNamespace(**off | {"disaggregation_mode": "decode", "speculative_algorithm": "EAGLE3"})
    refusals.check_windows(drafted, config)
    config.hf_config.architectures = ["LagunaForCausalLM"]
    refusals.check_windows(drafted, config)
    config.hf_config.architectures = ["MellumForCausalLM"]
    with pytest.raises(ValueError, match=r"drafts between servers beside sliding .*: drop --speculative-algorithm$"):
        refusals.check_windows(drafted, config)


def test_resolution_leaves_errors_that_are_not_about_the_model_to_sglang(server_args, model_dir):
    def fail(args):
        raise AssertionError("a port in use")

    with pytest.raises(AssertionError, match="a port in use"):
        refusals.resolve_or_refuse(fail, server_args(model_path=model_dir(), kv_cache_dtype="kvarn"))
    with pytest.raises(ValueError, match="head_dim 96"):
        refusals.resolve_or_refuse(fail, server_args(model_path=model_dir(head_dim=96), kv_cache_dtype="kvarn"))
    with pytest.raises(AssertionError, match="a port in use"):
        refusals.resolve_or_refuse(fail, server_args(model_path=model_dir(head_dim=96)))


def test_served_architectures_pass_nothing_else_to_attention():
    passed = {
        f"{file.stem}.{keyword.arg}"
        for file, tree, names in SOURCES
        if set(names) & set(SERVED)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "RadixAttention"
        for keyword in node.keywords
        if keyword.arg not in PLAIN_ATTENTION
    }
    assert passed <= BY_CONFIGURATION, f"served, and something else than plain attention: {passed - BY_CONFIGURATION}"


def test_sglang_wraps_attention_for_no_other_reason():
    wrapper = compat.resolve("sglang.srt.layers.attention.attention_registry.attn_backend_wrapper")
    assert not asked(wrapper) - WRAPPERS_ASK - NEUTRAL


def test_sglang_builds_another_pool_for_no_other_reason():
    configurator = compat.resolve("sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator")
    assert not asked(configurator._build_token_to_kv_pool) - POOLS_ASK - NEUTRAL
