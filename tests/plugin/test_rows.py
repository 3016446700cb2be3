# SPDX-License-Identifier: Apache-2.0
"""The exact start of a row is the prefix that its request had when it got the row."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import compat
from sglang_kvarn.rows import Tail

SHAPE = AttentionShape(4, 2, 64, torch.float32)


def request(prefix: int):
    """Return SGLang's own request object with so many tokens in the prefix cache."""
    req = compat.resolve("sglang.srt.managers.schedule_batch.Req")(
        rid="",
        origin_input_text="",
        origin_input_ids=array("q", [1] * 1000),
        sampling_params=compat.resolve("sglang.srt.sampling.sampling_params.SamplingParams")(),
    )
    set_prefix(req, prefix)
    return req


def set_prefix(req, prefix: int) -> None:
    if hasattr(req, "prefix_len"):
        req.prefix_len = prefix
    else:
        req.prefix_indices = torch.arange(prefix)


def between_chunks(req, prefix: int) -> None:
    """Let a request have computed a chunk that ends here."""
    set_prefix(req, prefix)
    req.inflight_middle_chunks = 1
    if req.kv is not None:
        req.kv.kv_allocated_len = prefix


row = compat.request_row


def make_rows():
    """Return SGLang's own row pool with 4 rows."""
    return compat.resolve("sglang.srt.mem_cache.memory_pool.ReqToTokenPool")(
        size=4, max_context_len=1024, device="cpu", enable_memory_saver=False
    )


@pytest.fixture
def pool():
    """SGLang's own row pool with 4 rows and a tail."""
    pool = make_rows()
    tail = Tail(5, 1, SHAPE, KVarNConfig.from_preset("kvarn"), "cpu")
    tail.exact_starts.fill_(-1)
    tail.attach(pool)
    return SimpleNamespace(rows=pool, starts=tail.exact_starts)


def test_alloc_records_the_prefix_of_each_request(pool):
    requests = [request(256), request(0), request(128)]
    pool.rows.alloc(requests)
    assert [pool.starts[row(r)].item() for r in requests] == [256, 0, 128]
    assert pool.starts[0] == -1


def test_alloc_keeps_the_exact_start_of_a_continued_chunk(pool):
    chunked, fresh = request(128), request(256)
    pool.rows.alloc([chunked])
    between_chunks(chunked, 640)
    pool.rows.alloc([chunked, fresh])
    assert pool.starts[row(chunked)] == 128
    assert pool.starts[row(fresh)] == 256


def test_alloc_overwrites_the_exact_start_of_a_reused_row(pool):
    pool.rows.alloc([request(128) for _ in range(3)])
    last = request(384)
    pool.rows.alloc([last])
    freed = row(last)
    pool.rows.free(last)
    again = request(0)
    pool.rows.alloc([again])
    assert row(again) == freed and pool.starts[freed] == 0


def test_alloc_without_a_free_row_changes_nothing(pool):
    before = pool.starts.clone()
    assert pool.rows.alloc([request(128) for _ in range(5)]) is None
    assert torch.equal(pool.starts, before)


def test_alloc_of_a_pool_without_a_tail_is_stock():
    rows = make_rows()
    assert sorted(rows.alloc([request(128), request(0)])) in ([1, 2], [3, 4])


@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_tail_counts_its_bytes(preset):
    config = KVarNConfig.from_preset(preset)
    tail = Tail(5, 3, AttentionShape(4, 2, 64, torch.bfloat16), config, "cpu")
    assert tail.num_bytes == 5 * 3 * 2 * config.ring_len * 2 * 64 * 2


@pytest.mark.parametrize(("preset", "found"), [("kvarn", 256), ("kvarn_canonical", 511)])
def test_a_request_that_lost_its_row_matches_at_most_what_it_matched_at_first(preset, found):
    rows = make_rows()
    Tail(5, 1, SHAPE, KVarNConfig.from_preset(preset), "cpu").attach(rows)
    req = request(256)
    assert req._compute_max_prefix_len(512) == 511
    rows.alloc([req])
    rows.free(req)
    req.reset_for_retract()
    # its own pages are in the prefix cache by now
    assert req._compute_max_prefix_len(512) == found
    # fewer may be left there, which is no new limit
    set_prefix(req, 128)
    rows.alloc([req])
    rows.free(req)
    req.reset_for_retract()
    assert req._compute_max_prefix_len(512) == found
    assert req._compute_max_prefix_len(200) == 199


def test_a_request_that_found_nothing_finds_nothing_when_it_comes_back(pool):
    req = request(0)
    pool.rows.alloc([req])
    pool.rows.free(req)
    req.reset_for_retract()
    assert req._compute_max_prefix_len(512) == 0
