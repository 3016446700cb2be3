# SPDX-License-Identifier: Apache-2.0
"""SGLang on a machine without a GPU: when the CPU platform applies, and the arguments it needs."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

_GROUP = "sglang.srt.platforms"
_NAME = "kvarn_cpu"
MAX_RUNNING_REQUESTS = 16
MAX_TOTAL_TOKENS = 65_536
_BIND = "SGLANG_CPU_OMP_THREADS_BIND"
_CLASS = "sglang_kvarn.cpu.device.KVarNCpuPlatform"


def is_active() -> bool:
    """Whether SGLang is to run on our CPU platform: no accelerator, no other platform, no CPU engine."""
    selected = os.environ.get("SGLANG_PLATFORM")
    if selected:
        return selected == _NAME and not _has_accelerator()
    others = [e for e in entry_points(group=_GROUP) if e.name != _NAME]
    return not others and os.environ.get("SGLANG_USE_CPU_ENGINE", "0") != "1" and not _has_accelerator()


def activate() -> str | None:
    """Return the dotted name of the platform class if it applies; SGLang calls this in every process."""
    if not is_active():
        return None
    prepare_environment()
    return _CLASS


def prepare_environment() -> None:
    """Set what the processes that SGLang starts need; does nothing where another platform is active.

    These are read when a module is imported, which may have happened in this process; but SGLang's parent
    process computes nothing. What the user has set stays.
    """
    if not is_active():
        return
    # SGLang 0.5.16 allocates pages with Triton kernels, which run in Triton's interpreter here
    os.environ.setdefault("TRITON_INTERPRET", "1")
    # threads that spin for each other stall where another process wants the core: one decode step of one
    # layer of SmolLM2-135M took 90 ms instead of 0.9 on 2 cores with one other busy process
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # a prefill server waits for a CUDA event before it sends a cached prefix ahead
    os.environ.setdefault("SGLANG_DISAGG_PREFILL_EARLY_SEND_CACHED_PREFIX", "0")
    # PyTorch brings NCCL along; where SGLang cannot load it, tensor parallelism runs on gloo
    os.environ.setdefault("SGLANG_NCCL_SO_PATH", "no-nccl-without-a-gpu")


def split_cores(cores: list[int], ranks: int) -> str:
    """Share cores among tensor-parallel ranks as SGLang writes it: [0, 1, 2, 3] among 2 is "0,1|2,3"."""
    size = max(1, len(cores) // ranks)
    starts = [rank * size % len(cores) for rank in range(ranks)]
    return "|".join(",".join(map(str, cores[start : start + size])) for start in starts)


def apply_defaults(server_args: Any) -> None:
    """Fill what the user left open and a CPU needs; does nothing where another platform is active.

    Whatever the cache, since SGLang runs on this platform with any.
    """
    if server_args.device not in (None, "cpu") or not is_active():
        return
    server_args.device = "cpu"
    # of replicas, stages and the ranks that share weights, among which those of DP attention are
    replicas = 1 if server_args.enable_dp_attention else server_args.dp_size
    ranks = server_args.tp_size * server_args.pp_size * replicas
    if ranks > 1 and not os.environ.get(_BIND):
        os.environ[_BIND] = split_cores(sorted(os.sched_getaffinity(0)), ranks)
    server_args.disable_cuda_graph = True
    server_args.disable_custom_all_reduce = True
    if server_args.disaggregation_mode == "null":
        # a scheduler without requests would keep a core busy; asleep it would see pages of another server come late
        server_args.sleep_on_idle = True
    if server_args.attention_backend is None:
        server_args.attention_backend = "torch_native"
    if server_args.max_running_requests is None:
        server_args.max_running_requests = MAX_RUNNING_REQUESTS
    # a pool in main memory is written when it is made, so most of the memory is no sensible default
    if server_args.max_total_tokens is None and server_args.mem_fraction_static is None:
        server_args.max_total_tokens = MAX_TOTAL_TOKENS


def _has_accelerator() -> bool:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type != "cpu"
