# SPDX-License-Identifier: Apache-2.0
"""An engine whose cache is one of SGLang's own, with the plugin loaded and without it; the CPU platform in both."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from sglang_kvarn.cpu import platform

from benchmarks.common.tiny_model import prompt

# one request: what is logged of a second depends on when the first is freed
NEW, PROMPT = 12, prompt(300, seed=1)
MODEL = {"skip_tokenizer_init": True, "dtype": "float32", "random_seed": 0}
# what the CPU platform sets, and `platform.apply_defaults` where the user leaves it open
CPU = {
    "device": "cpu",
    "disable_cuda_graph": True,
    "disable_custom_all_reduce": True,
    "sleep_on_idle": True,
    "attention_backend": "torch_native",
    "max_running_requests": platform.MAX_RUNNING_REQUESTS,
    "max_total_tokens": platform.MAX_TOTAL_TOKENS,
}
SIZES = {"max_running_requests": 4, "max_total_tokens": 4096}
# without lines on decode batches, which depend on it too
ENGINE = MODEL | CPU | SIZES | {"decode_log_interval": 1000, "log_level": "info"}

RUN = """
import dataclasses, json, sys
import sglang
from sglang.srt import server_args
from sglang.srt.plugins import load_plugins

def resolved(options):
    args = server_args.ServerArgs(**options)
    if hasattr(args, "resolve_once"):
        args.resolve_once()
    # the fields of later versions keep what the user typed
    values = args.resolved_dict() if hasattr(args, "resolved_dict") else dataclasses.asdict(args)
    return {name: repr(value) for name, value in values.items()}

if __name__ == "__main__":
    model, cpu, options, tokens, new = json.loads(sys.argv[1])
    load_plugins()
    found = {"open": resolved(model), "given": resolved(model | cpu)}
    print("-- engine", file=sys.stderr, flush=True)
    engine = sglang.Engine(**options)
    engine.get_server_info()
    sampling = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
    output = engine.generate(input_ids=tokens, sampling_params=sampling, return_logprob=True)
    found["answer"] = output["meta_info"]["output_token_logprobs"]
    info = engine.get_server_info()
    engine.shutdown()
    (state,) = info["internal_states"]
    found |= {"probe": state.pop("probe"), "keys": sorted(state)}
    found |= {"tokens": info["max_total_num_tokens"], "pool_gib": state["memory_usage"]["kvcache"]}
    print(json.dumps(found))
"""

# counts Python calls in the scheduler process from the first request for server info on
PROBE = """
import sys
from collections import Counter
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

ours, steps = Counter(), Counter()

def count(frame, event, argument):
    if event == "call":
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        if module.startswith(("sglang_kvarn.", "kvarn_kernels.")):
            ours[f"{module}.{name}"] += 1
        elif name == "process_batch_result_decode":
            steps["decode"] += 1

def report(result, *args, **kwargs):
    modules = [name for name in sys.modules if name.startswith(("sglang_kvarn.", "kvarn_kernels."))]
    result.internal_state["probe"] = {"ours": dict(ours), "steps": steps["decode"], "modules": sorted(modules)}
    sys.setprofile(count)

def register():
    HookRegistry.register("sglang.srt.managers.scheduler.Scheduler.get_internal_state", report, HookType.AFTER)
"""


@pytest.fixture(scope="module")
def runs(model, tmp_path_factory) -> dict[str, dict]:
    """Return what a process found with the plugin and without it, and its log."""
    if not platform.is_active():
        pytest.skip("these engines are for a machine without a GPU")
    site = tmp_path_factory.mktemp("site")
    (site / "run.py").write_text(RUN)
    (site / "stock_probe.py").write_text(PROBE)
    info = site / "stock_probe.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stock-probe\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[sglang.srt.plugins]\nstock_probe = stock_probe:register\n")
    named = {"model_path": model}
    options = json.dumps([MODEL | named, CPU, ENGINE | named, PROMPT, NEW])
    path = os.pathsep.join([str(site), *filter(None, sys.path)])
    found = {}
    for name, plugins in (("with", "kvarn,kvarn_cpu,stock_probe"), ("without", "kvarn_cpu,stock_probe")):
        done = subprocess.run(
            [sys.executable, str(site / "run.py"), options],
            env=os.environ | {"PYTHONPATH": path, "SGLANG_PLUGINS": plugins},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        log = done.stderr.partition("-- engine\n")[2]
        found[name] = json.loads(done.stdout.splitlines()[-1]) | {"log": log}
    return found


def lines(log: str) -> list[str]:
    """Return the lines of a log, sorted since processes share it; no progress bars, times, sizes, ports and pids."""
    kept = "\n".join(line for line in log.splitlines() if "it/s]" not in line)
    # SGLang's prefix and torch's; memory in use falls where another process gives some back
    kept = re.sub(r"^\[[-\d]+ [:\d]+|^W\d+ [:.\d]+ +\d+", "", kept, flags=re.MULTILINE)
    return sorted(re.sub(r"-?\d+\.\d+|(?<=pid=)\d+|(?<=port=)\d+", "#", kept).splitlines())


def test_arguments_are_those_without_the_plugin_except_what_a_cpu_needs(runs):
    with_plugin, without = runs["with"], runs["without"]
    assert with_plugin["given"] == without["given"]
    assert with_plugin["open"] == with_plugin["given"]


def test_engine_logs_answers_and_allocates_as_without_the_plugin(runs):
    for name in ("answer", "tokens", "pool_gib", "keys"):
        assert runs["with"][name] == runs["without"][name]
    logged = lines(runs["with"]["log"])
    assert any("max_total_num_tokens=4096" in line for line in logged)
    assert logged == lines(runs["without"]["log"])


def test_a_step_runs_nothing_of_the_plugin(runs):
    probe = runs["with"]["probe"]
    assert probe["steps"] >= NEW - 1
    ours = {name: n for name, n in probe["ours"].items() if ".report." not in name and ".settings." not in name}
    # when the prefix cache is asked for a request that waits, and when the request gets its row
    assert ours.keys() == {
        "sglang_kvarn.admission.add_with_ring",
        "sglang_kvarn.rings.alloc_rows",
        "sglang_kvarn.rings.free_row",
        "sglang_kvarn.rings.limit_prefix",
        "sglang_kvarn.rings.of_pool",
    }
    assert ours["sglang_kvarn.rings.alloc_rows"] == 1 and ours["sglang_kvarn.rings.limit_prefix"] < NEW - 1


def test_a_server_imports_neither_kernels_nor_the_pool(runs):
    loaded = runs["with"]["probe"]["modules"]
    kernels = [name for name in loaded if name.startswith("kvarn_kernels.")]
    light = ("balance", "batch", "config", "device", "device.gpu", "record", "record.tile", "shape")
    assert kernels == [f"kvarn_kernels.{name}" for name in light]
    assert not {"sglang_kvarn.pool", "sglang_kvarn.backend", "sglang_kvarn.metadata"} & set(loaded)
