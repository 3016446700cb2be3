# SPDX-License-Identifier: Apache-2.0
"""``python -m sglang_kvarn plan`` counts as a server does, and refuses what a server refuses."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.shape import AttentionShape
from model_table import CHANGES
from sglang_kvarn import __main__ as command
from sglang_kvarn import capacity, compat, refusals
from sglang_kvarn.commands import plan
from sglang_kvarn.refused import Refused

from benchmarks.common.models import GPT_OSS_20B, QWEN3_5_27B_HALF

GIB = 1 << 30
# 92 MiB for a cache
TIGHT = (
    *("--gpu-gib", "11.1", "--mem-fraction-static", "0.9", "--weights-gib", "8.4"),
    *("--max-running-requests", "900000"),
)
SHAPE_8B = AttentionShape(32, 8, 128, torch.bfloat16)
QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "num_hidden_layers": 36,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "torch_dtype": "bfloat16",
}
NEMOTRON_H = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
    "mamba_num_heads": 128,
    "mamba_head_dim": 64,
    "ssm_state_size": 128,
    "n_groups": 8,
}


@pytest.fixture(scope="module")
def qwen3(model_dir) -> str:
    return model_dir(plain=False, **QWEN3_8B)


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    code = command.main(["plan", *arguments])
    return code, *capsys.readouterr()


def test_plan_says_what_a_server_had(qwen3, capsys):
    code, out, _ = run(capsys, qwen3, "--gpu-gib", "79.65", "--context", "40960", "--json")
    facts = json.loads(out)
    caches = {cache["cache"]: cache for cache in facts["caches"]}
    assert code == 0 and facts["model"] == "Qwen3ForCausalLM" and facts["weights_gib"] == 15.26
    # benchmarks/results/serving_flag_only_8b.csv, one H100, nothing but the flags
    assert caches["16 bit"]["pool_tokens"] == pytest.approx(362_496, rel=0.01)
    # when 256 rings of 1,170 tokens were set apart, a server had 1,348,992
    assert caches["kvarn_k4v2_g128"]["pool_tokens"] == pytest.approx(1_348_992 + 257 * 1170, rel=0.01)
    assert caches["kvarn_k4v2_g128"]["requests_at_a_time"] == caches["kvarn_k4v2_g128"]["pool_tokens"] // (40960 + 1280)
    assert caches["16 bit"]["bytes_per_token"] == 2 * caches["fp8"]["bytes_per_token"] == 147_456
    assert caches["kvarn_k4v2_g128"]["sessions"] == caches["kvarn_k4v2_g128"]["pool_tokens"] // 40960


def test_plan_counts_as_the_budget_does(qwen3, capsys):
    flags = ("--mem-fraction-static", "0.5", "--weights-gib", "15", "--max-running-requests", "40", "--context", "4000")
    _, out, _ = run(capsys, qwen3, *flags, "--json")
    facts = json.loads(out)
    available = int(80 * GIB * 0.5) - 15 * GIB - plan.TAKEN
    assert facts["kv_gib"] == round(available / GIB, 2)
    shape = capacity.ModelShape(36, capacity.AttentionShape(32, 8, 128, torch.bfloat16))
    for cache in facts["caches"][2:]:
        config = KVarNConfig.from_preset(cache["cache"])
        bounds = capacity.Bounds(requests=40, graph_batch=256, context_len=4000, chunk_len=8192)
        charge = capacity.charge(shape, config, available, bounds, torch.device("cuda"), H100)
        pages = (available - charge.workspace) // (shape.token_bytes(config) * 128)
        ring = 128 * capacity.ring_pages(shape.attention, config)
        running = capacity.requests_of(128 * pages, ring, 4000, 40)
        assert (cache["pool_tokens"], cache["requests_at_a_time"]) == (128 * pages, running) and running == 40
        # 4,000 tokens take 32 pages
        assert cache["sessions"] == pages // 32


def test_plan_prints_a_row_for_each_cache_and_marks_those_that_are_too_small(qwen3, capsys):
    code, out, _ = run(capsys, qwen3, "--context", "50000", "--sessions", "30")
    lines = out.splitlines()
    # a head of two lines, and the command
    assert code == 0 and len(lines) == 2 + 12 + 2 and lines[0].startswith("Qwen3ForCausalLM: served.")
    (sixteen,) = (line for line in lines if line.startswith("16 bit"))
    (dense,) = (line for line in lines if line.startswith("kvarn_k2v2_g128 "))
    assert sixteen.endswith("(fewer than 30)") and "fewer" not in dense


def test_plan_counts_the_sessions_that_host_memory_holds(qwen3, capsys):
    flags = ("--context", "50000", "--hicache-size", "64", "--sessions", "1")
    _, out, _ = run(capsys, qwen3, *flags, "--json")
    caches = {cache["cache"]: cache for cache in json.loads(out)["caches"]}
    plain, ours = caches["16 bit"], caches["kvarn_k4v2_g128"]
    assert plain["host_tokens"] == 64 * 10**9 // 147_456 // 128 * 128
    assert ours["host_tokens"] == 64 * 10**9 // 32_256 // 128 * 128
    # of 391 pages each
    assert (plain["host_sessions"], ours["host_sessions"]) == (8, 39)
    _, out, _ = run(capsys, qwen3, *flags)
    lines = out.splitlines()
    assert lines[1].endswith("in host memory") and lines[2].split()[-1] == "8"
    _, out, _ = run(capsys, qwen3)
    assert "host" not in out and "hicache" not in out


@pytest.mark.skipif(not compat.saves_states_at_page_ends(), reason="knows this model only as one that sees")
def test_plan_splits_the_memory_of_a_hybrid_as_its_server_did(model_dir, capsys):
    folder = model_dir(plain=False, **QWEN3_5_27B_HALF)
    flags = ("--gpu-gib", "79.65", "--mem-fraction-static", "0.8", "--weights-gib", "25.2", "--context", "32768")
    code, out, _ = run(capsys, folder, *flags, "--max-running-requests", "32", "--json")
    facts = json.loads(out)
    caches = {cache["cache"]: cache for cache in facts["caches"]}
    sixteen, ours = caches["16 bit"], caches["kvarn_k4v2_g128"]
    assert code == 0 and facts["bytes_per_state"] / (1 << 20) == pytest.approx(73.4, abs=0.05)
    # benchmarks/results/engine_hybrid_27b.csv, one H100
    assert sixteen["pool_tokens"] == pytest.approx(640_384, rel=0.02) and sixteen["sessions"] == 19
    assert ours["pool_tokens"] == pytest.approx(2_807_168, rel=0.02) and ours["sessions"] == 85
    assert sixteen["runs_out"] == "tokens" and ours["requests_at_a_time"] == 32
    _, out, _ = run(capsys, folder, *flags)
    assert "states; tokens run out first)" in out


@pytest.mark.skipif(not compat.hosts_states(), reason="refused in this SGLang")
def test_plan_shares_host_memory_between_tokens_and_states_as_the_gpu_does(model_dir, capsys):
    folder = model_dir(plain=False, **NEMOTRON_H)
    flags = ("--weights-gib", "16", "--context", "32768", "--hicache-size", "256", "--json")
    _, out, _ = run(capsys, folder, *flags)
    facts = json.loads(out)
    caches = {cache["cache"]: cache for cache in facts["caches"]}
    for cache in caches.values():
        states, tokens = cache["host_states"], cache["host_tokens"]
        size = states * facts["bytes_per_state"] + tokens * cache["bytes_per_token"]
        assert size == pytest.approx(256e9, rel=0.001)
        assert tokens / cache["pool_tokens"] == pytest.approx(states / cache["states"], rel=0.02)
        assert cache["host_sessions"] == min(states // 3, tokens // 32768)
    # both run out at the same number of sessions of 32,768 tokens
    ours = caches["kvarn_k4v2_g128"]
    assert ours["host_states"] // 3 == pytest.approx(ours["host_tokens"] // 32768, rel=0.05)
    assert ours["host_sessions"] > caches["16 bit"]["host_sessions"]


@pytest.mark.skipif(not compat.hosts_windows(), reason="refused in this SGLang")
def test_plan_shares_host_memory_between_tokens_and_sliding_windows_as_the_gpu_does(model_dir, capsys):
    folder = model_dir(plain=False, **GPT_OSS_20B)
    flags = ("--weights-gib", "14", "--context", "32768", "--hicache-size", "64", "--json")
    _, out, _ = run(capsys, folder, *flags)
    for cache in json.loads(out)["caches"]:
        windows, tokens = cache["host_sliding_tokens"], cache["host_tokens"]
        # 12 layers with windows, 8 KV heads of 64
        of_window = 12 * 8 * 64 * 2 * (1 if cache["cache"] == "fp8" else 2)
        assert windows * of_window + tokens * cache["bytes_per_token"] == pytest.approx(64e9, rel=0.001)
        assert tokens / cache["pool_tokens"] == pytest.approx(windows / cache["sliding_tokens"], rel=0.001)
        assert 0 < cache["host_sessions"] <= tokens // 32768


def test_plan_counts_the_states_of_a_rank(model_dir, capsys):
    folder = model_dir(plain=False, **NEMOTRON_H)
    found = {}
    for ranks in (1, 2):
        code, out, _ = run(capsys, folder, "--tp", str(ranks), "--weights-gib", "16", "--json")
        found[ranks] = json.loads(out)
        assert code == 0
    # 24 layers; 4 with attention, 8 KV heads of 128
    assert found[1]["bytes_per_state"] == 24 * (128 * 64 * 128 * 4 + 10240 * 3 * 2) == 2 * found[2]["bytes_per_state"]
    token, halved = (found[ranks]["caches"][0]["bytes_per_token"] for ranks in (1, 2))
    assert token == 4 * 2 * 8 * 128 * 2 == 2 * halved


def test_plan_shares_memory_with_sliding_windows_as_the_budget_does(model_dir, capsys):
    # 40 GiB for the cache of gpt-oss-20b
    flags = ("--mem-fraction-static", "0.9", "--weights-gib", "30.5", "--max-running-requests", "256")
    folder = model_dir(plain=False, **GPT_OSS_20B)
    code, out, _ = run(capsys, folder, *flags, "--json")
    caches = {cache["cache"]: cache for cache in json.loads(out)["caches"]}
    sixteen, fp8, ours = (caches[name] for name in ("16 bit", "fp8", "kvarn_k4v2_g128"))
    assert code == 0 and sixteen["bytes_per_token"] == 12 * 8 * 64 * 4
    # SGLang's ratio: 0.8 tokens of sliding windows for each other one
    assert [row["pool_tokens"] for row in (sixteen, fp8)] == pytest.approx([970_880, 2 * 970_880], rel=0.001)
    # what a server has, workspaces aside
    assert [row["sliding_tokens"] for row in (sixteen, ours)] == pytest.approx([776_704] * 2, rel=0.01)
    assert ours["pool_tokens"] == pytest.approx(4_212_736, rel=0.01)
    _, out, _ = run(capsys, folder, *flags)
    assert "tokens of sliding windows)" in out


@pytest.mark.skipif(not compat.calls_attention_causal("Gemma3ForCausalLM"), reason="refused with this SGLang")
def test_plan_counts_layers_with_a_window_like_others_where_all_have_records(model_dir, capsys):
    text = {"num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256}
    text |= {"sliding_window": 512, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
    model = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text"} | text
    code, out, _ = run(capsys, model_dir(plain=False, **model), "--weights-gib", "1", "--json")
    assert code == 0
    assert [cache["bytes_per_token"] for cache in json.loads(out)["caches"][:3]] == [6 * 1024, 6 * 512, 6 * 218]


def test_plan_takes_the_size_of_weights_that_are_there(model_dir, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_8B))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(7 * GIB)
    _, out, _ = run(capsys, str(tmp_path), "--json")
    assert json.loads(out)["weights_gib"] == 7


def launch_lines(capsys, *arguments: str) -> tuple[str, str]:
    """Return the last two lines of a plan: what the command has room for, and the command."""
    code, out, err = run(capsys, *arguments)
    assert code == 0, err
    *_, what, line = out.splitlines()
    return what, line.removeprefix("    ")


HEAD = QWEN3_8B | {"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1}
EAGLE3 = ("--speculative-algorithm", "EAGLE3", "--speculative-draft-model-path")


def test_plan_charges_the_drafts_of_a_head(qwen3, model_dir, capsys):
    def caches(*flags: str) -> dict[str, dict]:
        flags = ("--weights-gib", "16", "--max-running-requests", "8", *flags)
        return {cache["cache"]: cache for cache in json.loads(run(capsys, qwen3, *flags, "--json")[1])["caches"]}

    plain, drafted = caches(), caches(*EAGLE3, model_dir(plain=False, **HEAD))
    # a layer of 8 heads of 128 channels in 16 bits, whatever the cache of the model
    assert {drafted[name]["bytes_per_token"] - plain[name]["bytes_per_token"] for name in plain} == {4096}
    ours, sixteen = drafted["kvarn_k4v2_g128"], drafted["16 bit"]
    assert ours["pool_tokens"] / sixteen["pool_tokens"] == pytest.approx(4.14, abs=0.02)
    # with NGRAM drafts take room in rings only
    flags = ("--gpu-gib", "40", "--context", "256", "--max-running-requests", "999", "--speculative-algorithm", "ngram")
    few, many = (caches(*flags, "--speculative-num-draft-tokens", n)["kvarn_k4v2_g128"] for n in ("2", "32"))
    assert few["bytes_per_token"] == many["bytes_per_token"] == plain["kvarn_k4v2_g128"]["bytes_per_token"]
    rings = [capacity.ring_pages(SHAPE_8B, KVarNConfig.from_preset("kvarn"), n) * 128 for n in (2, 32)]
    assert [row["requests_at_a_time"] for row in (few, many)] == [
        (row["pool_tokens"] - 128) // (256 + ring) for row, ring in zip((few, many), rings, strict=True)
    ]
    assert rings[0] < rings[1]


def test_plan_counts_the_weights_of_a_draft_model(qwen3, model_dir, tmp_path, capsys):
    folder = tmp_path / "head"
    shutil.copytree(model_dir(plain=False, **HEAD), folder)
    (folder / "model.safetensors").write_bytes(bytes(3 << 20))

    def weights(*flags: str) -> float:
        return json.loads(run(capsys, qwen3, *flags, "--json")[1])["weights_gib"]

    without, beside = weights(), weights(*EAGLE3, str(folder))
    assert beside * GIB - without * GIB == pytest.approx(3 << 20, abs=0.02 * GIB)


@pytest.mark.skipif(not compat.saves_states_at_page_ends(), reason="knows this model only as one that sees")
def test_plan_keeps_the_share_of_states_beside_drafts(model_dir, capsys):
    folder = model_dir(plain=False, **QWEN3_5_27B_HALF)
    flags = ("--weights-gib", "25.2", "--max-running-requests", "32", "--speculative-algorithm", "NEXTN", "--json")
    facts = json.loads(run(capsys, folder, *flags)[1])
    (ours,) = (cache for cache in facts["caches"] if cache["cache"] == "kvarn_k4v2_g128")
    assert facts["drafts"] == 4
    by_states, by_tokens = ours["states"] // capacity.STATES_PER_SESSION, ours["pool_tokens"] // 32_768
    assert abs(by_states - by_tokens) <= 1 and ours["sessions"] == min(by_states, by_tokens)


def test_plan_gives_the_command_the_flags_of_drafts(qwen3, model_dir, capsys):
    head = model_dir(plain=False, **HEAD)
    ngram = launch_lines(capsys, qwen3, "--speculative-algorithm", "ngram")[1]
    assert ngram.endswith(" --speculative-algorithm NGRAM --speculative-ngram-max-bfs-breadth 1")
    chain = launch_lines(capsys, qwen3, *EAGLE3, head, "--speculative-num-draft-tokens", "8")[1]
    assert chain.endswith(f" {head} --speculative-num-draft-tokens 8 --speculative-num-steps 7")


def test_plan_takes_as_many_drafts_of_dflash_as_its_model_was_trained_for(qwen3, model_dir, capsys):
    drafter = model_dir(plain=False, **QWEN3_8B | {"num_hidden_layers": 5, "dflash_config": {"block_size": 12}})
    flags = ("--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", drafter, "--json")
    facts = json.loads(run(capsys, qwen3, *flags)[1])
    assert facts["drafts"] == 12
    assert facts["caches"][0]["bytes_per_token"] == (36 + 5) * 4096


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (EAGLE3[:2], "expected the folder of a draft model with EAGLE3: add --speculative-draft-model-path"),
        ((*EAGLE3, "nowhere"), "expected the folder of a draft model, with config.json, got nowhere: name one"),
        (("--speculative-algorithm", "NEXTN"), "expected a head for drafts in the checkpoint of"),
        (("--speculative-algorithm", "NGRAM", EAGLE3[2], "x"), "expected no draft model with NGRAM, got x: drop"),
        (("--speculative-num-draft-tokens", "4"), "expected --speculative-algorithm with the flags of drafts"),
    ],
    ids=["no-folder", "no-model", "no-head", "ngram", "no-algorithm"],
)
def test_plan_says_what_drafts_lack(flags, sentence, qwen3, capsys):
    code, out, err = run(capsys, qwen3, *flags)
    assert code == 1 and out == "" and err.startswith(sentence) and err.count("\n") == 1


def test_plan_ends_with_the_command_for_what_was_asked(qwen3, capsys):
    server = f"python -m sglang.launch_server --model-path {qwen3} --kv-cache-dtype"
    assert launch_lines(capsys, qwen3) == ("Launch, with room for 32 sessions of 32,768:", f"{server} kvarn")
    flags = ("--tp", "2", "--mem-fraction-static", "0.85", "--max-running-requests", "64", "--hicache-size", "200")
    given = "--tp-size 2 --mem-fraction-static 0.85 --max-running-requests 64 --enable-hierarchical-cache"
    assert launch_lines(capsys, qwen3, *flags)[1] == f"{server} kvarn {given} --hicache-size 200"


# 50, 58 and 70 sessions fit with the three presets
@pytest.mark.parametrize(
    ("sessions", "flags", "preset", "room"),
    [
        (50, (), "kvarn", "with room for"),
        (55, (), "kvarn_k3v2_g128", "with room for"),
        (65, (), "kvarn_k2v2_g128", "with room for"),
        (80, (), "kvarn", "no preset has room for"),
        # 94 sessions in host memory
        (80, ("--hicache-size", "100"), "kvarn", "with room for"),
    ],
)
def test_plan_recommends_the_default_unless_the_sessions_need_fewer_bytes(sessions, flags, preset, room, qwen3, capsys):
    what, line = launch_lines(capsys, qwen3, "--sessions", str(sessions), *flags)
    assert what == f"Launch, {room} {sessions} sessions of 32,768:"
    assert shlex.split(line)[5:7] == ["--kv-cache-dtype", preset]


def test_plan_writes_a_command_that_a_shell_reads(model_dir, tmp_path, capsys):
    folder = tmp_path / "a model's folder"
    shutil.copytree(model_dir(plain=False, **QWEN3_8B), folder)
    assert shlex.split(launch_lines(capsys, str(folder))[1])[4] == str(folder)


class OnGpu:
    """Resolved arguments, of a server on a GPU."""

    device = "cuda"

    def __init__(self, args) -> None:
        self._args = args

    def __getattr__(self, name):
        return getattr(self._args, name)


GEMMA3 = {"architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "num_hidden_layers": 6}
GEMMA3 |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512}
GEMMA3 |= {"layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
STEP = CHANGES["Step3p5ForCausalLM"] | {"architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5"}
NO_STEP = pytest.mark.skipif(not compat.is_since("0.5.23"), reason="refused here")
NO_WINDOWS = pytest.mark.skipif(not compat.calls_attention_causal("Gemma3ForCausalLM"), reason="refused here")
WINDOWS_TRIAL = None if compat.is_since("0.5.23") else refusals.UNTESTED_WINDOWS_ENV
NO_HOST = pytest.mark.skipif(not compat.hosts_states(), reason="refused in this SGLang")


@pytest.mark.parametrize(
    ("model", "flags", "variable"),
    [
        (QWEN3_8B, ("--tp", "2", "--hicache-size", "9"), None),
        (NEMOTRON_H, (), None),
        pytest.param(NEMOTRON_H, ("--hicache-size", "9"), refusals.UNTESTED_HICACHE_ENV, marks=NO_HOST),
        (GPT_OSS_20B, (), WINDOWS_TRIAL),
        (GPT_OSS_20B, ("--speculative-algorithm", "NGRAM"), WINDOWS_TRIAL),
        (GPT_OSS_20B, ("--tp", "2"), refusals.UNTESTED_WINDOWS_ENV),
        pytest.param(GPT_OSS_20B, ("--hicache-size", "9"), WINDOWS_TRIAL, marks=NO_HOST),
        pytest.param(STEP, ("--trust-remote-code",), refusals.UNTESTED_WINDOWS_ENV, marks=NO_STEP),
        pytest.param(GEMMA3, (), WINDOWS_TRIAL, marks=NO_WINDOWS),
    ],
    ids=["dense", "states", "states-host", "windows", "drafts", "ranks", "windows-host", "step", "windows-in-records"],
)
def test_a_server_on_a_gpu_takes_the_command_of_a_plan(model, flags, variable, model_dir, capsys, monkeypatch):
    folder = model_dir(plain=False, **model)
    words = shlex.split(launch_lines(capsys, folder, "--weights-gib", "10", *flags)[1])
    start = words.index("python")
    assert ("--trust-remote-code" in words) == ("--trust-remote-code" in flags)
    assert words[:start] == ([] if variable is None else [f"{variable}=1"])
    config, parser = compat.ModelConfig(folder), argparse.ArgumentParser()
    compat.resolve("sglang.srt.server_args.ServerArgs").add_cli_args(parser)
    args = OnGpu(parser.parse_args(words[start + 3 :]))
    monkeypatch.setattr(compat, "resolved_arguments", lambda given: given)
    if variable is not None:
        with pytest.raises(Refused, match=f"set {variable}=1 to try it"):
            check(args, config)
        monkeypatch.setenv(variable, "1")
    check(args, config)


def check(args, config) -> None:
    refusals.check_states(args, config)
    refusals.check_windows(args, config)


def test_plan_refuses_host_memory_that_a_server_refuses(qwen3, capsys, monkeypatch):
    monkeypatch.setattr(compat, "fences_host_copies", lambda: False)
    code, _, err = run(capsys, qwen3, "--hicache-size", "8")
    assert code == 1 and err.endswith(": take SGLang 0.5.23 or drop --hicache-size\n")
    assert run(capsys, qwen3)[0] == 0


@pytest.mark.parametrize(
    ("changes", "flags", "sentence"),
    [
        pytest.param(
            *(GPT_OSS_20B, ("--hicache-size", "8"), "GptOssForCausalLM has layers with sliding windows"),
            marks=pytest.mark.skipif(compat.hosts_windows(), reason="served in this SGLang"),
        ),
        pytest.param(
            *(STEP, ("--hicache-size", "8"), "--hicache-size cannot be combined with a kvarn cache of Step3p5"),
            marks=NO_STEP,
        ),
        ({"head_dim": 96}, (), "LlamaForCausalLM has head_dim 96, which a kvarn cache does not serve"),
        ({}, ("--tp", "3"), "--tp-size 3 cannot share"),
        ({}, ("--weights-gib", "90"), "the weights take 90.0 GiB of each GPU"),
        ({}, TIGHT, "a kvarn cache needs"),
        (GPT_OSS_20B, ("--speculative-algorithm", "STANDALONE"), "--speculative-algorithm STANDALONE cannot be"),
        pytest.param(
            *(NEMOTRON_H, ("--hicache-size", "8"), "NemotronHForCausalLM has layers with states"),
            marks=pytest.mark.skipif(compat.hosts_states(), reason="served in this SGLang"),
        ),
    ],
    ids=["windows", "step", "model", "ranks", "weights", "requests", "drafts", "host"],
)
def test_plan_refuses_in_one_sentence(changes, flags, sentence, model_dir, capsys):
    folder = model_dir(**changes)
    code, out, err = run(capsys, folder, *flags)
    assert code == 1 and out == "" and err.startswith(sentence) and err.count("\n") == 1
    code, out, _ = run(capsys, folder, *flags, "--json")
    assert code == 1 and json.loads(out)["refused"] == err.strip()


def test_plan_names_a_folder_without_a_model(tmp_path, capsys):
    code, _, err = run(capsys, str(tmp_path))
    assert code == 1 and err == f"expected the folder of a model, with config.json, got {tmp_path}: name one\n"
