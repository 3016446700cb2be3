# SPDX-License-Identifier: Apache-2.0
"""The CPU platform applies to machines without an accelerator only, and asks nothing of the user."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import sglang_kvarn
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform as cpu_platform

EARLY = "SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX"
CLASS = "sglang_kvarn.cpu.device.KVarNCpuPlatform"


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch):
    monkeypatch.setattr(cpu_platform, "_has_accelerator", lambda: False)
    for name in ("SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE", "TRITON_INTERPRET", "OMP_WAIT_POLICY", EARLY):
        monkeypatch.delenv(name, raising=False)


def test_activate_names_a_platform_that_sglang_accepts():
    assert sglang_kvarn.activate_cpu_platform() == CLASS
    platform = compat.resolve(CLASS)()
    assert platform.is_out_of_tree() and not platform.is_cpu() and platform.get_device() == "cpu"
    assert issubclass(platform.get_mha_kv_pool_cls(), compat.MHATokenToKVPool)


def test_activate_sets_what_the_child_processes_need_and_keeps_what_the_user_set(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    sglang_kvarn.activate_cpu_platform()
    assert os.environ["TRITON_INTERPRET"] == "1" and os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    assert os.environ[EARLY] == "0"


@pytest.mark.parametrize(
    "case", ["accelerator", "other platform selected", "cpu engine", "other platform installed"]
)
def test_activate_stays_out_of_the_way(monkeypatch, case):
    if case == "accelerator":
        monkeypatch.setattr(cpu_platform, "_has_accelerator", lambda: True)
    elif case == "other platform selected":
        monkeypatch.setenv("SGLANG_PLATFORM", "vendor")
    elif case == "cpu engine":
        monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    else:
        vendor = [SimpleNamespace(name="kvarn_cpu"), SimpleNamespace(name="vendor")]
        monkeypatch.setattr(cpu_platform, "entry_points", lambda group: vendor)
    assert sglang_kvarn.activate_cpu_platform() is None
    cpu_platform.prepare_environment()
    assert "TRITON_INTERPRET" not in os.environ


@pytest.mark.parametrize(
    ("cores", "ranks", "text"),
    [
        ([0, 1, 2, 3], 2, "0,1|2,3"),
        ([0, 1], 2, "0|1"),
        ([4, 6, 7], 2, "4|6"),
        ([0, 1], 4, "0|1|0|1"),
    ],
)
def test_split_cores_gives_every_rank_some(cores, ranks, text):
    assert cpu_platform.split_cores(cores, ranks) == text


ONE_RANK = {"pp_size": 1, "dp_size": 1, "enable_dp_attention": False}


def arguments(**changes) -> SimpleNamespace:
    names = ("device", "attention_backend", "max_running_requests", "max_total_tokens", "mem_fraction_static")
    others = {"disable_cuda_graph": False, "tp_size": 1, "disaggregation_mode": "null"}
    return SimpleNamespace(**(dict.fromkeys(names) | others | ONE_RANK | changes))


def test_apply_defaults_bounds_the_pool_unless_the_user_does():
    args = arguments()
    cpu_platform.apply_defaults(args)
    assert (args.device, args.attention_backend, args.disable_cuda_graph) == ("cpu", "torch_native", True)
    assert args.max_total_tokens == cpu_platform.MAX_TOTAL_TOKENS
    assert args.max_running_requests == cpu_platform.MAX_RUNNING_REQUESTS
    args = arguments(mem_fraction_static=0.5, max_running_requests=3, attention_backend="kvarn")
    cpu_platform.apply_defaults(args)
    assert (args.max_total_tokens, args.max_running_requests, args.attention_backend) == (None, 3, "kvarn")


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ({"dp_size": 2}, "0|1"),
        ({"tp_size": 2, "dp_size": 2}, "0|1|0|1"),
        # replicas of the requests, not of the ranks
        ({"tp_size": 2, "dp_size": 2, "enable_dp_attention": True}, "0|1"),
        ({"tp_size": 2, "pp_size": 2}, "0|1|0|1"),
    ],
    ids=str,
)
def test_apply_defaults_shares_the_cores_among_the_ranks(monkeypatch, ranks, text):
    monkeypatch.setenv("SGLANG_CPU_OMP_THREADS_BIND", "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    cpu_platform.apply_defaults(arguments(**ranks))
    assert os.environ["SGLANG_CPU_OMP_THREADS_BIND"] == text


def test_a_scheduler_without_requests_sleeps_unless_another_server_may_send_pages():
    found = []
    for mode in ("null", "prefill", "decode"):
        args = arguments(disaggregation_mode=mode, sleep_on_idle=False)
        cpu_platform.apply_defaults(args)
        found.append(args.sleep_on_idle)
    assert found == [True, False, False]


def test_apply_defaults_leaves_a_gpu_alone(monkeypatch):
    monkeypatch.setattr(cpu_platform, "_has_accelerator", lambda: True)
    args = arguments()
    cpu_platform.apply_defaults(args)
    assert args == arguments()
