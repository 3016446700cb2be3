# SPDX-License-Identifier: Apache-2.0
"""States and sliding windows in files: a file ends with a checksum of what is before it.

A page of records has headers, by which it is known. States and sliding windows have none: as many other bytes would
pass for them, and answers would be wrong. So a storage is given, in the place of SGLang's host pools of both, a pool
that seals what is written and takes nothing else back. Keys and values of a draft model need no checksum: damage there
costs drafts, not answers.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch

from sglang_kvarn import compat, settings

# of a CRC-32, little-endian
CHECKSUM_BYTES = 4


def _checksum(data: torch.Tensor) -> bytes:
    return zlib.crc32(data.numpy().data).to_bytes(CHECKSUM_BYTES, "little")


class SealedPool:
    """Stand for a host pool of SGLang's before a storage: pages go with a checksum, and come back with theirs only.

    Attributes:
        page_size: of the pool, in its slots.
    """

    def __init__(self, pool: Any) -> None:
        """Stand for a pool of the memory of the host."""
        self._pool, self.page_size = pool, pool.page_size
        room = pool.get_dummy_flat_data_page()
        self._dtype, self._page_bytes = room.dtype, room.nbytes

    def get_data_page(self, index: Any, flat: bool = True) -> torch.Tensor:
        """Return the bytes of the page that a slot begins, and their checksum: uint8 [page bytes + 4]."""
        assert flat, "a sealed page is bytes"
        sealed = self.get_dummy_flat_data_page()
        data = sealed[:-CHECKSUM_BYTES]
        data.copy_(self._pool.get_data_page(index).contiguous().view(torch.uint8))
        sealed[-CHECKSUM_BYTES:] = torch.tensor(list(_checksum(data)), dtype=torch.uint8)
        return sealed

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        """Return room for what `get_data_page` returns."""
        return torch.zeros(self._page_bytes + CHECKSUM_BYTES, dtype=torch.uint8)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        """Write a page from a storage to the pool's page that a slot begins.

        Args:
            data_page: as `get_data_page` returned it, uint8 [page bytes + 4].

        Raises:
            ValueError: it is another; SGLang counts that as a miss.
        """
        data, found = data_page[:-CHECKSUM_BYTES], data_page[-CHECKSUM_BYTES:]
        if data.numel() != self._page_bytes or _checksum(data) != bytes(found.tolist()):
            raise ValueError(
                f"expected {self._page_bytes} bytes and their checksum from the storage, got {data_page.numel()} bytes "
                "with another: delete the file"
            )
        self._pool.set_from_flat_data_page(index, data.view(self._dtype))


def seal(original: Callable[..., Any], storage: Any, host_pool: Any, host_pool_name: Any) -> Any:
    """Let a storage keep states and sliding windows beside records with a checksum.

    Hook around ``HiCacheStorage.register_mem_host_pool_v2``.
    """
    is_ours = settings.is_kvarn(compat.published_argument("kv_cache_dtype"))
    if is_ours and host_pool_name in (compat.PoolName.MAMBA, compat.PoolName.SWA):
        host_pool = SealedPool(host_pool)
    return original(storage, host_pool, host_pool_name)
