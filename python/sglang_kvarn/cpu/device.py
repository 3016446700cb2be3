# SPDX-License-Identifier: Apache-2.0
"""The platform class that SGLang instantiates on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from sglang_kvarn import compat


def _make_allocator(*args: Any, **kwargs: Any) -> Any:
    """Make SGLang's allocator of a pool; 0.5.16 asks here for that of two parts too, and says the size of one."""
    pool = kwargs.get("kvcache")
    if isinstance(pool, compat.SWAKVPool):
        return compat.SWATokenToKVPoolAllocator(pool.size, pool.size_swa, **kwargs)
    return compat.PagedTokenToKVPoolAllocator(*args, **kwargs)


class KVarNCpuPlatform(compat.CpuDeviceMixin, compat.SRTPlatform):
    """Run every layer by its torch form (``forward_native``) on the CPU.

    An out-of-tree platform rather than SGLang's CPU engine, which needs a build of sgl_kernel for the CPU.
    """

    _enum = compat.PlatformEnum.OOT

    def get_device(self, device_id: int = 0) -> str:
        """Return the device name as ``ServerArgs.device`` expects it, a string."""
        return "cpu"

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_mha_kv_pool_cls(self) -> Any:
        return compat.MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> Any:
        """Return SGLang's own class; takes the place of `get_mha_kv_pool_cls` in later versions."""
        return None

    def support_mamba_cache_extra_buffer(self) -> bool:
        """Return that states of linear attention can be copied at checkpoints, which pages of 128 tokens need."""
        return True

    def get_paged_allocator_cls(self) -> Any:
        return _make_allocator
