# SPDX-License-Identifier: Apache-2.0
"""SGLang on a machine without a GPU: when the CPU platform applies, and the arguments it needs."""

from __future__ import annotations

import os
from importlib.metadata import entry_points
from typing import Any

_GROUP = "sglang.srt.platforms"
_NAME = "kvarn_cpu"
_CLASS = "sglang_kvarn.cpu_device.KVarNCpuPlatform"


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
    """Run SGLang's own Triton kernels (page allocation) in Triton's interpreter, also in child processes.

    Triton reads the variable when a kernel is declared, so it is set before SGLang's modules are imported;
    the parent process, where some are already, runs none of them.
    """
    if is_active():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def apply_defaults(server_args: Any) -> None:
    """Fill what the user left open and a CPU needs; does nothing where another platform is active."""
    if server_args.device not in (None, "cpu") or not is_active():
        return
    server_args.device = "cpu"
    server_args.disable_cuda_graph = True
    if server_args.attention_backend is None:
        server_args.attention_backend = "torch_native"


def _has_accelerator() -> bool:
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator is not None and accelerator.type != "cpu"
