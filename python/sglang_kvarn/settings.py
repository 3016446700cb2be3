# SPDX-License-Identifier: Apache-2.0
"""What the user chose with ``--kv-cache-dtype``, and the arguments that follow from it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.record.tile import TILE_SIZE

from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

ATTENTION_BACKEND = "kvarn"
# a page of SGLang's pool is a tile of every KV head
PAGE_SIZE = TILE_SIZE


def is_kvarn(name: Any) -> bool:
    """Whether a value of ``--kv-cache-dtype`` means one of our caches, right or misspelt."""
    return isinstance(name, str) and name.startswith("kvarn")


def preset_of(server_args: Any) -> KVarNConfig | None:
    """Return the preset of ``server_args.kv_cache_dtype``, None for one of SGLang's own formats.

    Raises:
        ValueError: the name starts with ``kvarn`` but is no preset; the message lists them.
    """
    name = server_args.kv_cache_dtype
    return KVarNConfig.from_preset(name) if is_kvarn(name) else None


def target_preset(configurator: Any) -> KVarNConfig | None:
    """Return the preset of SGLang's KVCacheConfigurator, None for a draft model, whose cache is SGLang's."""
    return None if configurator.is_draft_worker else preset_of(configurator.server_args)


def add_choices(result: Any, parser: argparse.ArgumentParser) -> None:
    """Accept the presets on the command line. Hook after ``ServerArgs.add_cli_args``."""
    action = next(a for a in parser._actions if "--kv-cache-dtype" in a.option_strings)
    action.choices = [*(action.choices or []), *preset_names()]
    action.help = (
        f"{action.help}. kvarn* (plugin sglang-kvarn) quantises K and V in tiles of {PAGE_SIZE} tokens, k4v2 "
        "to 4-bit K and 2-bit V; with _canonical a prefix-cache hit reads the same values as a miss."
    )


def apply_defaults(server_args: Any) -> None:
    """Fill what the user left open, before SGLang resolves the arguments."""
    if compat.is_resolved(server_args):
        return
    preset = preset_of(server_args)
    if preset is not None:
        if server_args.attention_backend is None:
            server_args.attention_backend = _attention_backend(server_args)
        if server_args.page_size is None:
            server_args.page_size = PAGE_SIZE
        receives = server_args.disaggregation_mode == "decode" and compat.transfers_requests()
        if receives and server_args.disaggregation_decode_retraction_backup is None:
            # what SGLang takes for a multi-head cache, pages in host memory, would lose the rings
            server_args.disaggregation_decode_retraction_backup = "cpu_tensor"
    platform.apply_defaults(server_args)


def _attention_backend(server_args: Any) -> str | None:
    """Return the attention backend where nobody chose one; None: SGLang's choice, for sliding windows."""
    if not compat.splits_sliding_windows(server_args):
        return ATTENTION_BACKEND
    # the one for a CPU, torch_native, is refused
    return "triton" if server_args.device in (None, "cpu") and platform.is_active() else None


def cache_dtype(original: Any, **kwargs: Any) -> tuple[str | None, torch.dtype]:
    """Name the storage type of what is not in records. Hook around ``configure_kv_cache_dtype``.

    The pool of records is bytes whatever this says.
    """
    name = kwargs["server_args_kv_cache_dtype"]
    if not is_kvarn(name):
        return original(**kwargs)
    KVarNConfig.from_preset(name)
    if kwargs["is_draft_worker"]:
        # its own format where one was given, else that of the model; the name that SGLang keeps is the target's
        _, dtype = original(**kwargs | {"server_args_kv_cache_dtype": "auto"})
        return None, dtype
    return None, kwargs["model_dtype"]
