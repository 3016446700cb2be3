# SPDX-License-Identifier: Apache-2.0
"""Everything that this package takes from SGLang, resolved on first use. No other module imports SGLang."""

from __future__ import annotations

import pkgutil
from importlib import metadata
from typing import Any

TESTED_VERSIONS = ("0.5.16",)

_NAMES = {
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "AttentionType": "sglang.srt.layers.radix_attention:AttentionType",
    "CpuDeviceMixin": "sglang.srt.platforms.cpu:CpuDeviceMixin",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "PagedTokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator",
    "PlatformEnum": "sglang.srt.platforms.device_mixin:PlatformEnum",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "SRTPlatform": "sglang.srt.platforms.interface:SRTPlatform",
    "add_attention_backend_choices": "sglang.srt.server_args:add_attention_backend_choices",
    "envs": "sglang.srt.environ:envs",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "load_plugins": "sglang.srt.plugins:load_plugins",
    "mambaish_config": "sglang.srt.configs.hybrid_arch:mambaish_config",
    "register_attention_backend": "sglang.srt.layers.attention.attention_registry:register_attention_backend",
}


def __getattr__(name: str) -> Any:
    """Return an SGLang object by the name that this package knows it by."""
    if name not in _NAMES:
        raise AttributeError(name)
    return resolve(_NAMES[name])


def resolve(path: str) -> Any:
    """Import and return the object at a dotted path, e.g. ``sglang.srt.server_args.ServerArgs``."""
    return pkgutil.resolve_name(path)


def version() -> str | None:
    """Return the version of the installed SGLang, None where there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Refuse an SGLang that this package was not tested with.

    Raises:
        RuntimeError: names the tested versions and the command that installs one.
    """
    found = version()
    base = (found or "").split(".post")[0].split("+")[0]
    if base not in TESTED_VERSIONS:
        raise RuntimeError(
            f"sglang-kvarn was tested with SGLang {', '.join(TESTED_VERSIONS)} and found "
            f"{found or 'none'}: pip install sglang=={TESTED_VERSIONS[-1]}"
        )
