# SPDX-License-Identifier: Apache-2.0
"""SGLang's own pools in host memory on a machine without a GPU, with torch in the place of the kernels that copy.

They hold what a kvarn cache leaves to SGLang: states, sliding windows and keys and values of draft models.
"""

from __future__ import annotations

import functools

import torch
from sglang_kvarn import compat


def install() -> None:
    """Put the torch forms in place, for good."""
    plain = _without_page_locks(compat.resolve("sglang.srt.mem_cache.pool_host.mha.MHATokenToKVPoolHost"))
    plain.load_to_device_per_layer, plain.backup_from_device_all_layer = load_tokens, write_tokens
    if compat.hosts_states():
        states = _without_page_locks(compat.resolve("sglang.srt.mem_cache.pool_host.mamba.MambaPoolHost"))
        states._copy_tensor_pf_lf = staticmethod(load_layer)
        states._copy_tensor_all_layers_lf_pf = staticmethod(write_layers)


def _without_page_locks(pool: type) -> type:
    """Let a pool take ordinary memory, as page-locked memory is for copies of a GPU; once."""
    if not hasattr(pool, "on_cpu"):
        pool.__init__, pool.on_cpu = functools.partialmethod(pool.__init__, pin_memory=False), True
    return pool


def load_tokens(host, device_pool, host_indices, device_indices, layer_id: int, io_backend: str, **kwargs) -> None:
    """Copy one layer of slots of the host to those of a 16-bit pool of the device."""
    for stored, cache in ((host.k_data_refs, device_pool.k_buffer), (host.v_data_refs, device_pool.v_buffer)):
        cache[layer_id][device_indices.long()] = stored[layer_id][host_indices.long()]


def write_tokens(host, device_pool, host_indices, device_indices, io_backend: str) -> None:
    """Copy all layers of slots of a 16-bit pool of the device to those of the host."""
    for stored, cache in ((host.k_data_refs, device_pool.k_buffer), (host.v_data_refs, device_pool.v_buffer)):
        for layer in range(host.layer_num):
            stored[layer][host_indices.long()] = cache[layer][device_indices.long()]


def load_layer(src, dst, src_indices, dst_indices, layer_id, **kwargs) -> None:
    """Copy one layer of states of the host, src [slots, layers, 1, ...], to those of the device, dst [slots, ...]."""
    dst[dst_indices.long()] = src[src_indices.long(), layer_id, 0]


def write_layers(src_layers: torch.Tensor, dst, src_indices, dst_indices, **kwargs) -> None:
    """Copy all layers of states of the device, [layers, slots, ...], to those of the host, [slots, layers, 1, ...]."""
    dst[dst_indices.long(), :, 0] = src_layers[:, src_indices.long()].transpose(0, 1)
