# SPDX-License-Identifier: Apache-2.0
"""The patch for the installed SGLang applies, and the plugin serves through its registry instead of the hooks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kvarn_kernels.config import preset_names
from sglang_kvarn import compat, plugin
from sglang_kvarn.cpu import platform

from benchmarks.common import tiny_model

ROOT = Path(__file__).resolve().parents[2]
# where the hard model and the tiny one are made
ENGINE_TESTS = [str(ROOT / "tests" / "engine"), str(ROOT)]
NEW = 8
# what reads or writes the weights of a running server
_UPDATER = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
WEIGHTS = [
    *(f"{_UPDATER}.update_weights_from_{source}" for source in ("disk", "distributed", "tensor", "ipc")),
    *(f"{_UPDATER}.{name}" for name in ("get_weights_by_name", "check_weights")),
    *(f"{_UPDATER}.save_{kind}_model" for kind in ("remote", "sharded")),
    "managers.scheduler.Scheduler.send_weights_to_remote_instance",
]

PARSE = """
import contextlib, io, json, sys
from sglang.srt.plugins import load_plugins
load_plugins()
from sglang.srt import server_args
from sglang.srt.plugins.hook_registry import HookRegistry
from sglang_kvarn import compat

def parse(arguments):
    # what a launch does before it spawns a process; the error, or what was resolved
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            args = server_args.prepare_server_args(arguments)
            if hasattr(args, "resolve_once"):
                args.resolve_once()
            args.check_server_args()
        except (SystemExit, ValueError) as error:
            return f"{type(error).__name__}: {error} {stderr.getvalue()}"
    seen = compat.resolved_arguments(args)
    return [seen.attention_backend, seen.page_size]

lines = [parse([*sys.argv[2:], *line]) for line in json.loads(sys.argv[1])]
print(json.dumps([server_args.__file__, sorted(HookRegistry._hooks), lines]))
"""
LINES = {
    "preset": ["--kv-cache-dtype", "kvarn_k2v2_g128"],
    "wrong name": ["--kv-cache-dtype", "kvarn_k3v3_g128"],
    "other page size": ["--kv-cache-dtype", "kvarn", "--page-size", "64"],
}

SERVE = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
import sglang, test_hard_model
from benchmarks.common import tiny_model
if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    engine = sglang.Engine(**options, custom_sigquit_handler=tiny_model.fail)
    shared, tokens = tiny_model.prompt(300, seed=1), tiny_model.prompt(300, seed=1) + tiny_model.prompt(90, seed=2)
    found = {"answers": [tiny_model.answers(engine, [t], int(sys.argv[3]))[0] for t in (shared, tokens)]}
    found["info"] = engine.get_server_info()["internal_states"][0].get("kvarn")
    found["scores"] = []
    for _ in range(2):
        # not from the prefix cache; SGLang ends a server whose weights are updated while its last step is in flight
        tiny_model.flush(engine)
        tokens, scores = test_hard_model.answer(engine)
        found["scores"].append([tokens, scores.tolist()])
        tiny_model.flush(engine)
        assert engine.update_weights_from_disk(options["model_path"])[0]
    engine.shutdown()
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def patched(tmp_path_factory) -> dict[str, str]:
    """Return the environment of a process that sees SGLang patched and the plugin that uses the registry."""
    folder = ROOT / "patches" / f"sglang-{compat.version()}"
    if not folder.exists():
        pytest.skip(f"there is no patch for SGLang {compat.version()}")
    if not platform.is_active():
        pytest.skip("its engine is for a machine without a GPU")
    site = tmp_path_factory.mktemp("site")
    installed = Path(compat.resolve("sglang.srt.server_args").__file__).parents[1]
    ignored = shutil.ignore_patterns("__pycache__", "multimodal_gen")
    shutil.copytree(installed, site / "sglang", copy_function=os.symlink, ignore=ignored)
    for patch in sorted(folder.glob("*.patch")):
        touched = [line[len("--- a/python/") :] for line in patch.read_text().splitlines() if line.startswith("--- a/")]
        for name in touched:
            copied = (site / name).resolve().read_bytes()
            (site / name).unlink()
            (site / name).write_bytes(copied)
        subprocess.run(["git", "apply", "-p2", str(patch)], cwd=site, check=True)
    info = site / "kvarn_formats.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kvarn-formats\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nkvarn_formats = kvarn_formats:register\n")
    path = os.pathsep.join([str(site), str(ROOT / "patches"), *filter(None, sys.path)])
    return os.environ | {"PYTHONPATH": path, "SGLANG_PLUGINS": "kvarn_formats,kvarn_cpu"}


def run(environment: dict[str, str], script: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, script, *arguments], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """Return the folder of the tiny model of the engine tests."""
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def parsed(patched, model, tmp_path_factory) -> dict:
    """Return what each command line of `LINES` was resolved to, or the error."""
    script = tmp_path_factory.mktemp("parse") / "parse.py"
    script.write_text(PARSE)
    done = run(patched, str(script), json.dumps(list(LINES.values())), "--model-path", model)
    assert done.returncode == 0, done.stderr[-3000:]
    file, hooked, lines = json.loads(done.stdout.splitlines()[-1])
    return {"file": file, "hooked": hooked, **dict(zip(LINES, lines, strict=True))}


def test_parsing_takes_backend_and_page_size_from_the_registry(parsed, patched):
    assert parsed["file"].startswith(patched["PYTHONPATH"].split(os.pathsep)[0])
    # the arguments that a CPU needs, and what has nothing to do with how a cache is built
    kept = ["managers.scheduler.Scheduler.get_internal_state", compat.resolution_target(), *WEIGHTS]
    kept += ["managers.schedule_batch.Req._compute_max_prefix_len", "managers.scheduler.Scheduler.__init__"]
    kept += ["server_args.ServerArgs.add_cli_args", "entrypoints.engine._wait_for_scheduler_ready"]
    kept.append("entrypoints.engine.Engine._launch_scheduler_processes")
    kept.append("model_executor.model_runner.ModelRunner.load_model")
    # states of hybrid models, which SGLang takes out of the memory before it asks a format
    kept.append("mem_cache.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache")
    # drafts, whose own cache SGLang charges after it asked a format
    kept.append("model_executor.pool_configurator.DefaultPoolConfigurator.__init__")
    kept.append("speculative.cpp_ngram.ngram_corpus.NgramCorpus.batch_get")
    kept += [h.target for h in plugin.HOOKS if h.target.endswith("_can_pack_hicache_mtp")]
    # rings of requests, which are pages of the pool
    kept += [f"mem_cache.memory_pool.ReqToTokenPool.{name}" for name in ("alloc", "free", "clear")]
    kept += ["mem_cache.allocator.paged.PagedTokenToKVPoolAllocator.__init__"]
    kept.append("mem_cache.pool_host.mha.get_mha_host_pool_cls")
    beside = ("_MambaStrategy.matches", "init_load_back", "register_mem_host_pool_v2")
    kept += [h.target for h in plugin.HOOKS if h.target.endswith(beside)]
    kept += [f"managers.cache_controller.HiCacheController.start_{what}" for what in ("writing", "loading")]
    kept.append("managers.scheduler.Scheduler.attach_hicache_storage_wrapped")
    kept += ["managers.schedule_policy.PrefillAdder.add_one_req", "managers.scheduler.Scheduler.init_model_worker"]
    kept.append(
        "managers.scheduler_components.invariant_checker.SchedulerInvariantChecker._get_total_uncached_sizes"
    )
    # models with sliding windows, whose pool is made of two formats
    kept.append("model_executor.pool_configurator.create_memory_pool_configurator")
    kept.append("layers.attention.attention_registry.attn_backend_wrapper")
    # requests that go from one server to another
    kept += [h.target for h in plugin.HOOKS if h.target.startswith("disaggregation.")]
    assert parsed["hooked"] == sorted({f"sglang.srt.{target}" for target in kept})
    assert parsed["preset"] == ["kvarn", 128]


def test_parsing_lists_the_registered_formats_for_a_wrong_name(parsed):
    assert parsed["wrong name"].startswith("SystemExit: 2")
    assert all(f"'{name}'" in parsed["wrong name"] for name in [*preset_names(), "fp8_e4m3"])


def test_parsing_refuses_what_the_format_refuses(parsed):
    assert parsed["other page size"].startswith("Refused: --kv-cache-dtype kvarn needs a page size of 128, not 64")


@pytest.fixture(scope="module")
def served(patched, model, tmp_path_factory) -> dict:
    """Return what an engine with the hard model answers, its log, and its answers to one prompt after a reload each."""
    import test_hard_model

    script = tmp_path_factory.mktemp("serve") / "serve.py"
    script.write_text(SERVE)
    options = {
        "model_path": test_hard_model.save(tmp_path_factory.mktemp("hard"), model),
        "kv_cache_dtype": "kvarn",
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "max_total_tokens": 14_336,
        "max_running_requests": 4,
        "chunked_prefill_size": 256,
        "random_seed": 0,
        "log_level": "info",
    }
    done = run(patched, str(script), json.dumps(ENGINE_TESTS), json.dumps(options), str(NEW))
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"log": done.stderr}


def test_engine_gives_the_oracles_tokens_through_the_registry(served, model):
    # fixed bytes and the pool, as the hooks log them
    log = served["log"]
    assert "KVarN: workspaces for at most 4 requests" in log and "KVarN kvarn_k4v2_g128: 236 bytes" in log
    miss, hit = served["answers"]
    shared, tokens = tiny_model.prompt(300, seed=1), tiny_model.prompt(300, seed=1) + tiny_model.prompt(90, seed=2)
    assert miss["tokens"] == tiny_model.expected(model, shared, "kvarn", new_tokens=NEW)
    assert hit["cached"] == 256
    assert hit["tokens"] == tiny_model.expected(model, tokens, "kvarn", cached=256, new_tokens=NEW)


def test_engine_answers_as_before_after_the_same_checkpoint_is_loaded_again(served):
    # outliers and a bias of the values, which the reload would put back
    assert "KVarN balanced the channels" in served["log"]
    (tokens, scores), (again, scores_again) = served["scores"]
    assert again == tokens
    assert scores_again == pytest.approx(scores, rel=0, abs=1e-5)


def test_server_info_has_the_sizes_of_the_cache_through_the_registry(served):
    assert served["info"]["preset"] == "kvarn_k4v2_g128" and served["info"]["pool_tokens"] == 14_336
