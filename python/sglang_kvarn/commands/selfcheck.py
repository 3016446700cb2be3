# SPDX-License-Identifier: Apache-2.0
"""The facts that ``python -m sglang_kvarn`` prints."""

from __future__ import annotations

import platform
from importlib import metadata
from importlib.metadata import entry_points
from typing import Any

import torch
from kvarn_kernels.attention import Attention, choose_kernels
from kvarn_kernels.batch import Limits
from kvarn_kernels.config import SUPPORTED_HEAD_DIMS, KVarNConfig, preset_names
from kvarn_kernels.device.gpu import gpu_of
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn import compat, hook, plugin
from sglang_kvarn.cpu import platform as cpu_platform


def collect() -> dict[str, Any]:
    """Return versions, device, hooks, presets and problems; loads SGLang's plugins as a server would."""
    problems = _entry_point_problems()
    in_place: dict[str, bool] = {}
    try:
        compat.check_version()
        problems += hook.signature_problems()
        compat.load_plugins()
        plugin.register_rest()
        missing = set(hook.missing_hooks())
        in_place = {h.path: h.path not in missing for h in plugin.HOOKS}
        if missing:
            problems.append(f"hooks not in place: {', '.join(sorted(missing))}")
    except (RuntimeError, ImportError) as error:
        problems.append(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not cpu_platform.is_active():
        problems.append(
            "no CUDA device, and another platform than the CPU platform of sglang-kvarn is selected"
        )
    return {
        "versions": _versions(),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "kernels": _kernels(device),
        "hooks": in_place,
        "bytes_per_token_and_head": {
            name: {str(d): KVarNConfig.from_preset(name).bytes_per_token(d) for d in SUPPORTED_HEAD_DIMS}
            for name in preset_names()
        },
        "problems": problems,
    }


def report(facts: dict[str, Any]) -> str:
    """Return the facts as lines of text; the last one says ok or what is wrong."""
    lines = [f"{name:14} {value or 'not installed'}" for name, value in facts["versions"].items()]
    lines += [f"{'device':14} {facts['device']}", f"{'kernels':14} {facts['kernels']}"]
    lines += [f"hook {'ok' if ok else 'MISSING':8} {path}" for path, ok in facts["hooks"].items()]
    lines += ["bytes per token and KV head" + "".join(f"{f'D={d}':>8}" for d in SUPPORTED_HEAD_DIMS)]
    for name, sizes in facts["bytes_per_token_and_head"].items():
        lines.append(f"  {name:25}" + "".join(f"{size:8}" for size in sizes.values()))
    lines.append(f"  {'16 bit':25}" + "".join(f"{4 * d:8}" for d in SUPPORTED_HEAD_DIMS))
    verdict = [f"problem: {problem}" for problem in facts["problems"]] or ["ok"]
    return "\n".join([*lines, *verdict])


def _versions() -> dict[str, str | None]:
    names = ("sglang-kvarn", "sglang", "torch", "triton")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _kernels(device: torch.device) -> str:
    """Return what would serve a model of heads of 128 channels in bfloat16, as most are."""
    shape, config = AttentionShape(8, 1, 128, torch.bfloat16), KVarNConfig.from_preset("kvarn")
    limits = Limits(decode_batch=1, request_pages=1, extend_requests=1, chunk_pages=1)
    kernels = choose_kernels(shape, config, device)
    return Attention(shape, config, torch.device("meta"), limits, kernels, gpu_of(device)).describe()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _entry_point_problems() -> list[str]:
    groups = {"sglang.srt.plugins": "kvarn", "sglang.srt.platforms": "kvarn_cpu"}
    return [
        f"entry point {name} of group {group} is not installed: pip install -e ."
        for group, name in groups.items()
        if name not in entry_points(group=group).names
    ]
