# SPDX-License-Identifier: Apache-2.0
"""The platform class that SGLang instantiates on a machine without a GPU."""

from __future__ import annotations

from typing import Any

from sglang_kvarn import compat


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
        return compat.PagedTokenToKVPoolAllocator
