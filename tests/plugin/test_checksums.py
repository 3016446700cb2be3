# SPDX-License-Identifier: Apache-2.0
"""States and sliding windows before a storage: sealed with a checksum, and taken back with theirs only."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import checksums, compat
from sglang_kvarn.checksums import SealedPool

PAGE = 3


class HostPool:
    """A host pool as SGLang's are for a storage: pages of values, `PAGE` slots of 5 values each."""

    page_size = PAGE

    def __init__(self, dtype: torch.dtype) -> None:
        self.values = torch.arange(4 * PAGE * 5, dtype=torch.float32).view(-1, 5).to(dtype)

    def get_data_page(self, index: int, flat: bool = True) -> torch.Tensor:
        page = self.values[index : index + PAGE]
        return page.flatten() if flat else page

    def get_dummy_flat_data_page(self) -> torch.Tensor:
        return torch.zeros(PAGE * 5, dtype=self.values.dtype)

    def set_from_flat_data_page(self, index: int, data_page: torch.Tensor) -> None:
        self.values[index : index + PAGE] = data_page.view(PAGE, 5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32])
def test_a_page_comes_back_with_its_checksum(dtype):
    pool = HostPool(dtype)
    sealed, before = SealedPool(pool), pool.values.clone()
    assert sealed.page_size == PAGE
    stored = sealed.get_data_page(torch.tensor(2 * PAGE))
    assert stored.dtype == torch.uint8 and torch.equal(stored[:-4].view(dtype), before[2 * PAGE : 3 * PAGE].flatten())
    # SGLang reads a file into this
    room = sealed.get_dummy_flat_data_page()
    assert room.shape == stored.shape
    pool.values.zero_()
    sealed.set_from_flat_data_page(PAGE, room.copy_(stored))
    assert torch.equal(pool.values[PAGE : 2 * PAGE], before[2 * PAGE : 3 * PAGE])
    assert not pool.values[:PAGE].any() and not pool.values[2 * PAGE :].any()


def flip(data: torch.Tensor, at: int) -> torch.Tensor:
    data[at] ^= 1
    return data


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: flip(data, 0),
        lambda data: flip(data, 29),
        lambda data: flip(data, -1),
        lambda data: flip(data, -4),
        torch.zeros_like,
        lambda data: data[:-1],
        lambda data: data[:-4],
        lambda data: data[:0],
        lambda data: torch.cat([data, data[-4:]]),
        lambda data: data.roll(1),
    ],
    ids=["first", "last", "checksum", "its first", "zeros", "cut", "bare", "empty", "longer", "moved"],
)
def test_bytes_without_their_checksum_are_not_taken(damage):
    pool = HostPool(torch.bfloat16)
    sealed, before = SealedPool(pool), pool.values.clone()
    stored = damage(sealed.get_data_page(PAGE))
    with pytest.raises(ValueError, match=f"expected 30 bytes and their checksum .* got {len(stored)} bytes"):
        sealed.set_from_flat_data_page(2 * PAGE, stored)
    assert torch.equal(pool.values, before)


@pytest.mark.skipif(not compat.hosts_states(), reason="no pool reaches a storage by a name in this SGLang")
@pytest.mark.parametrize("cache", ["kvarn", "kvarn_canonical", "auto", None])
def test_states_and_sliding_windows_beside_records_are_sealed_and_nothing_else(monkeypatch, cache):
    monkeypatch.setattr(compat, "published_argument", {"kv_cache_dtype": cache}.get)
    register = compat.resolve("sglang.srt.mem_cache.hicache_storage.HiCacheStorage.register_mem_host_pool_v2")
    storage, pools = SimpleNamespace(), {name: HostPool(torch.bfloat16) for name in compat.PoolName}
    for name, pool in pools.items():
        checksums.seal(register, storage, pool, name)
    found = {name.value for name, pool in storage.registered_pools.items() if pool is not pools[name]}
    assert found == ({"mamba", "swa"} if cache and cache.startswith("kvarn") else set())
    assert all(isinstance(storage.registered_pools[compat.PoolName(name)], SealedPool) for name in found)
