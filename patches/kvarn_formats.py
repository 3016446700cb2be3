# SPDX-License-Identifier: Apache-2.0
"""The plugin for an SGLang that has the registry of this folder: what would be left of `sglang_kvarn.plugin`.

The registry builds a cache. What stays are the hooks on weights, which are balanced while a server runs, on server
info, on requests that come back, on models that SGLang refuses itself, on drafts, and one that fills arguments.
"""

from __future__ import annotations

from typing import Any

import torch
from kvarn_kernels.config import preset_names
from sglang_kvarn import budget, compat, drafts, hook, plugin, refusals, settings
from sglang_kvarn.cpu import platform

_registry = compat.resolve("sglang.srt.mem_cache.kv_cache_format")


class KVarNFormat(_registry.KVCacheFormat):
    """One preset as a format of SGLang's registry."""

    attention_backend = settings.ATTENTION_BACKEND
    page_size = settings.PAGE_SIZE
    storage_dtype = torch.uint8

    def __init__(self, name: str) -> None:
        self.name = name

    def check_server_args(self, cfg: Any) -> None:
        plugin.register_rest()
        hook.verify_hooks()
        refusals.check_arguments(cfg)

    def bytes_per_token(self, kvc: Any) -> int:
        return budget.model_shape(kvc).token_bytes(settings.target_preset(kvc))

    def fixed_bytes(self, kvc: Any, available_bytes: int) -> int:
        return available_bytes - budget.charge_fixed_bytes(available_bytes, kvc)

    def max_requests(self, kvc: Any) -> int | None:
        return compat.scheduler_argument(kvc.server_args, "max_running_requests")

    def build_pool(self, kvc: Any, *, max_total_num_tokens: int, req_to_token_pool: Any) -> Any:
        from sglang_kvarn import pool

        return pool.build(kvc, max_total_num_tokens=max_total_num_tokens, req_to_token_pool=req_to_token_pool)


def apply_defaults(server_args: Any) -> None:
    """Fill what a CPU and drafts need, except the attention backend of a kvarn cache: that is the format's."""
    if compat.is_resolved(server_args):
        return
    chosen = server_args.attention_backend
    platform.apply_defaults(server_args)
    if settings.preset_of(server_args) is not None:
        server_args.attention_backend = chosen
        drafts.apply_defaults(server_args)


DEFAULTS = hook.Hook(
    compat.resolution_target(),
    "before",
    ("self",),
    apply_defaults,
    why="The user would have to name what a CPU and drafts need.",
    where="arguments",
)


def register() -> None:
    """Register the formats and the attention backend; called by SGLang in every process it starts."""
    platform.prepare_environment()
    hook.declare((DEFAULTS, *(h for h in plugin.HOOKS if h.replaced_by is None)))
    plugin.register_all()
    for name in preset_names():
        _registry.register_kv_cache_format(KVarNFormat(name))
