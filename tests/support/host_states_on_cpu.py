# SPDX-License-Identifier: Apache-2.0
"""States in host memory on a machine without a GPU: torch in the place of the kernels that SGLang copies them with."""

from __future__ import annotations

import functools

import torch
from sglang_kvarn import compat


def install() -> None:
    """Put the torch forms in place, for good."""
    pool = compat.resolve("sglang.srt.mem_cache.pool_host.mamba.MambaPoolHost")
    # page-locked memory is for copies of a GPU
    pool.__init__ = functools.partialmethod(pool.__init__, pin_memory=False)
    pool._copy_tensor_pf_lf = staticmethod(load_layer)
    pool._copy_tensor_all_layers_lf_pf = staticmethod(write_layers)


def load_layer(src, dst, src_indices, dst_indices, layer_id, **kwargs) -> None:
    """Copy one layer of states of the host, src [slots, layers, 1, ...], to those of the device, dst [slots, ...]."""
    dst[dst_indices.long()] = src[src_indices.long(), layer_id, 0]


def write_layers(src_layers: torch.Tensor, dst, src_indices, dst_indices, **kwargs) -> None:
    """Copy all layers of states of the device, [layers, slots, ...], to those of the host, [slots, layers, 1, ...]."""
    dst[dst_indices.long(), :, 0] = src_layers[:, src_indices.long()].transpose(0, 1)
