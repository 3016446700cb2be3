# SPDX-License-Identifier: Apache-2.0
"""The caches that are compared by name: what SGLang has without the plugin, and the presets."""

from __future__ import annotations

from typing import Any

from kvarn_kernels.config import preset_names

# 16 bit (the dtype of the model, SGLang's default) and 8 bit
BF16, FP8 = "bf16", "fp8_e4m3"
STOCK = (BF16, FP8)
CACHES = (*STOCK, *preset_names())
PAGE = 128


def arguments(cache: str) -> dict[str, Any]:
    """Return what chooses a cache, by the names of SGLang's ServerArgs."""
    return {} if cache == BF16 else {"kv_cache_dtype": cache}


def host_memory(gigabytes: int | None) -> dict[str, Any]:
    """Return what puts host memory behind a cache (HiCache), by the names of SGLang's ServerArgs; None for none."""
    return {} if gigabytes is None else {"enable_hierarchical_cache": True, "hicache_size": gigabytes}


def engine_arguments(cache: str, backend: str | None) -> dict[str, Any]:
    """Return the arguments of sglang.Engine that choose a cache; a stock one gets pages as large as a preset's.

    Args:
        backend: attention backend of the stock caches; None leaves it to SGLang.
    """
    if cache not in STOCK:
        return arguments(cache)
    chosen: dict[str, Any] = {"page_size": PAGE} | ({"attention_backend": backend} if backend else {})
    return chosen | arguments(cache)
