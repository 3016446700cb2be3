# SPDX-License-Identifier: Apache-2.0
"""HiCache: pages of records in host memory.

A page is copied when it enters the prefix cache or leaves the device, by the write policy, and copied back when a
request finds it again. SGLang decides when, on streams of its own; `fences` says what its copies wait for. Pages of
rings are not in the prefix cache, so they never leave the device.
"""

from __future__ import annotations

from typing import Any

import torch
from kvarn_kernels.record import tile
from kvarn_kernels.record.format import first_token_dtype
from kvarn_kernels.transfer.copy_pages import StagedWrite, copy_pages, copy_pages_by_torch

from sglang_kvarn import compat, storage_keys
from sglang_kvarn.pool import HostSource, KVarNTokenToKVPool

# what SGLang calls pages that are contiguous
LAYOUT = "page_first"


class KVarNHostPool(compat.HostKVCache):
    """Hold pages in the memory of the host: uint8 [host pages, layers, Hk * record_bytes].

    A page of all layers is contiguous, whatever layout SGLang asks for: one object for a storage, one run of memory for
    a copy to the host. SGLang counts in slots, 128 to a page; slots of a page come together and in order.
    """

    def __init__(
        self,
        source: KVarNTokenToKVPool | HostSource,
        host_to_device_ratio: float,
        host_size: float,
        page_size: int,
        layout: str,
        **kwargs: Any,
    ) -> None:
        """Allocate it.

        Args:
            source: the pool of the device, until 0.5.20 itself; host_to_device_ratio: tokens here for each of its own,
                unless host_size gives GB, in which what a draft model keeps of the same tokens has room, too.
            layout: of what SGLang keeps beside it.

        Raises:
            ValueError: the memory is not there.
        """
        pool = source.pool if isinstance(source, HostSource) else source
        assert not kwargs.get("draft_buffer_infos"), "a draft model has a host pool of its own"
        self._pool = self.device_pool = pool
        self._layout_beside = layout
        self.layer_num = self.target_layer_num = pool.layer_num
        self._row_bytes = pool.slab[0, 0].nbytes
        self.page_bytes = pool.layer_num * self._row_bytes
        self._load = self._write = copy_pages_by_torch
        if pool.slab.is_cuda:
            self._load = copy_pages
            self._write = StagedWrite(pool.layer_num, self._row_bytes, pool.slab.device)
        self.can_use_jit = False
        first_tokens = first_token_dtype(pool.shape.dtype)
        self._header = int(tile.header(first_tokens == torch.bfloat16))
        token_bytes = self.page_bytes // page_size
        if not pool.slab.is_cuda:
            # SGLang leaves 10 GB free, for the other processes of a machine with GPUs
            compat.reserve_no_host_memory()
        super().__init__(
            **compat.host_pool_arguments(pool, token_bytes),
            host_to_device_ratio=host_to_device_ratio,
            host_size=host_size * token_bytes / (token_bytes + pool.draft_token_bytes),
            page_size=page_size,
            layout=LAYOUT,
            pin_memory=pool.slab.is_cuda,
            device="cpu",
            allocator_type=kwargs.get("allocator_type") or "default",
        )
        # SGLang then leaves the slots of the host on the host when it writes, as a copy engine needs them
        self.can_use_write_back_jit = True
        pool.attach_host(self)

    @property
    def storage_format_tag(self) -> str:
        """Return a part of the keys of a storage: pages of other formats, or balanced otherwise, are misses.

        The keys are also those of what SGLang keeps of the same tokens, so that the part stands for the format of
        states, too, and for the order in which keys and values of sliding windows and of draft models lie.
        """
        pool = self._pool
        parts = [str(pool.shape.dtype), pool.balance_tag(), "" if pool.states is None else pool.states.format]
        if pool.sliding_tokens or pool.draft_token_bytes:
            parts.append(self._layout_beside)
        return storage_keys.tag(pool.config.name, parts)

    def get_size_per_token(self) -> int:
        """Return the bytes of a token in all layers."""
        return self.page_bytes // self._pool.page_size

    def init_kv_buffer(self) -> torch.Tensor:
        """Allocate the pages, page-locked where a GPU copies them."""
        size = (self.page_num, self.layer_num, self._row_bytes)
        allocate = compat.host_memory_function(self._pool.slab.device.type)
        return allocate(
            size, dtype=torch.uint8, device=self.device, pin_memory=self.pin_memory, allocator=self.allocator
        )

    def _firsts(self, slots: torch.Tensor) -> torch.Tensor:
        """Return the first slot of each page, a view where SGLang has them on the device already."""
        return slots[:: self.page_size].to(self._pool.slab.device, non_blocking=True)

    @property
    def _device_pages(self) -> torch.Tensor:
        # [P, layers, Hk * record_bytes]
        return self._pool.slab.flatten(2).transpose(0, 1)

    def backup_from_device_all_layer(
        self, device_pool: Any, host_indices: torch.Tensor, device_indices: torch.Tensor, io_backend: str
    ) -> None:
        """Copy the pages of slots of the device to those of slots of the host, on the current stream."""
        slots = self._firsts(device_indices), host_indices[:: self.page_size]
        self._write(self._device_pages, self.kv_buffer, *slots, self.page_size)

    def load_to_device_per_layer(
        self,
        device_pool: Any,
        host_indices: torch.Tensor,
        device_indices: torch.Tensor,
        layer_id: int,
        io_backend: str,
        **kwargs: Any,
    ) -> None:
        """Copy one layer of the pages of slots of the host, on the current stream.

        Args:
            layer_id: among the layers of the pool.
        """
        one = slice(layer_id, layer_id + 1)
        slots = self._firsts(host_indices), self._firsts(device_indices)
        self._load(self.kv_buffer[:, one], self._device_pages[:, one], *slots, self.page_size)

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """Return the bytes of the page that a slot begins, for a storage."""
        page = self.kv_buffer[int(index) // self.page_size]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return room for the bytes of a page."""
        return torch.zeros(self.page_bytes, dtype=torch.uint8, pin_memory=self.pin_memory)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write the bytes of a page from a storage to the page that a slot begins.

        Raises:
            ValueError: they are not of a page that was ever encoded; SGLang counts that as a miss.
        """
        if data_page.numel() != self.page_bytes:
            raise ValueError(f"expected a page of {self.page_bytes} bytes from the storage, got {data_page.numel()}")
        page = data_page.view(self.layer_num, self._row_bytes)
        # the header is in the lowest 4 bits of a record
        if not bool((page[:, :: self._pool.slab.shape[3]] & 0xF == self._header).all()):
            raise ValueError("expected a page of records from the storage, got bytes without their headers")
        self.kv_buffer[int(index) // self.page_size] = page
