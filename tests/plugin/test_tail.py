# SPDX-License-Identifier: Apache-2.0
"""The exact start of a row is the prefix that its request had when it got the row."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from sglang_kvarn import compat
from sglang_kvarn.tail import Tail


class Request:
    """What ReqToTokenPool reads of SGLang's Req, and of its ReqKvInfo where that has the row."""

    def __init__(self, prefix: int) -> None:
        self.req_pool_idx = None
        self.prefix_indices = torch.arange(prefix)
        self.inflight_middle_chunks = self.kv_committed_len = 0
        self.kv = self
        self.kv_allocated_len = 1

    @property
    def holds_kv(self) -> bool:
        return self.req_pool_idx is not None


@pytest.fixture
def pool():
    """SGLang's own row pool with 4 rows and a tail."""
    pool = compat.resolve("sglang.srt.mem_cache.memory_pool.ReqToTokenPool")(
        size=4, max_context_len=1024, device="cpu", enable_memory_saver=False
    )
    tail = Tail(5, 1, 2, 64, KVarNConfig.from_preset("kvarn"), torch.float32, "cpu")
    tail.exact_starts.fill_(-1)
    tail.attach(pool)
    return SimpleNamespace(rows=pool, starts=tail.exact_starts)


def test_alloc_records_the_prefix_of_each_request(pool):
    requests = [Request(256), Request(0), Request(128)]
    pool.rows.alloc(requests)
    assert [pool.starts[r.req_pool_idx].item() for r in requests] == [256, 0, 128]
    assert pool.starts[0] == -1


def test_alloc_keeps_the_exact_start_of_a_continued_chunk(pool):
    request = Request(128)
    pool.rows.alloc([request])
    request.prefix_indices, request.inflight_middle_chunks = torch.arange(640), 1
    fresh = Request(256)
    pool.rows.alloc([request, fresh])
    assert pool.starts[request.req_pool_idx] == 128
    assert pool.starts[fresh.req_pool_idx] == 256


def test_alloc_overwrites_the_exact_start_of_a_reused_row(pool):
    pool.rows.alloc([Request(128) for _ in range(3)])
    last = Request(384)
    pool.rows.alloc([last])
    row = last.req_pool_idx
    pool.rows.free(last)
    again = Request(0)
    pool.rows.alloc([again])
    assert again.req_pool_idx == row and pool.starts[row] == 0


def test_alloc_without_a_free_row_changes_nothing(pool):
    before = pool.starts.clone()
    assert pool.rows.alloc([Request(128) for _ in range(5)]) is None
    assert torch.equal(pool.starts, before)


def test_alloc_of_a_pool_without_a_tail_is_stock():
    rows = compat.resolve("sglang.srt.mem_cache.memory_pool.ReqToTokenPool")(
        size=4, max_context_len=1024, device="cpu", enable_memory_saver=False
    )
    assert sorted(rows.alloc([Request(128), Request(0)])) in ([1, 2], [3, 4])


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_tail_counts_its_bytes(preset):
    config = KVarNConfig.from_preset(preset)
    tail = Tail(5, 3, 2, 64, config, torch.bfloat16, "cpu")
    assert tail.num_bytes == 5 * 3 * 2 * config.ring_len * 2 * 64 * 2
