# SPDX-License-Identifier: Apache-2.0
"""A row has a ring of pages, and its exact start is the prefix that its request had when it got the row."""

from __future__ import annotations

from array import array
from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import compat
from sglang_kvarn.rings import ATTRIBUTE, Rings

PAGE, RING = 128, 3
# a prefix cache that holds nothing, as SGLang has without one
NO_TREE = SimpleNamespace(
    is_chunk_cache=lambda: True, supports_prefix_sharing=lambda: False, token_to_kv_pool_allocator=None
)


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


class Allocator:
    """The pages of a pool as SGLang's paged allocator hands them out: any tokens of a page stand for the page."""

    need_sort, page_size, is_not_in_free_group = False, PAGE, True

    def __init__(self, pages: int) -> None:
        self.free_pages = torch.arange(1, pages + 1)

    def alloc(self, tokens: int):
        if tokens > PAGE * len(self.free_pages):
            return None
        pages, self.free_pages = self.free_pages.split([tokens // PAGE, len(self.free_pages) - tokens // PAGE])
        return (pages[:, None] * PAGE + torch.arange(PAGE)).flatten()

    def free_page_ids(self, pages: torch.Tensor) -> None:
        self.free_pages = torch.cat([pages, self.free_pages])


def with_rings(rows, *, hit_reads_as_miss: bool = False, pages: int = 4 * RING + 2) -> Rings:
    """Give rings to SGLang's row pool, and an allocator of so many pages."""
    rings = Rings(5, RING, "cpu", hit_reads_as_miss=hit_reads_as_miss)
    rings.exact_starts.fill_(-1)
    rings.allocator = Allocator(pages)
    setattr(rows, ATTRIBUTE, rings)
    return rings


@pytest.fixture
def pool():
    """SGLang's own row pool with 4 rows and rings."""
    rows = make_rows()
    rings = with_rings(rows)
    return SimpleNamespace(rows=rows, rings=rings, starts=rings.exact_starts)


def free(pool) -> list[int]:
    return sorted(pool.rings.allocator.free_pages.tolist())


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
    before, pages = pool.starts.clone(), free(pool)
    assert pool.rows.alloc([request(128) for _ in range(5)]) is None
    assert torch.equal(pool.starts, before) and not pool.rings.pages.any()
    # a ring that a request was promised stays its own; the last one found none
    assert pool.rings.out == 0 and free(pool) == pages


def test_alloc_of_a_pool_without_rings_is_stock():
    rows = make_rows()
    assert sorted(rows.alloc([request(128), request(0)])) in ([1, 2], [3, 4])


@pytest.mark.parametrize(("hit_reads_as_miss", "found"), [(False, 256), (True, 511)])
def test_a_request_that_lost_its_row_matches_at_most_what_it_matched_at_first(hit_reads_as_miss, found):
    rows = make_rows()
    with_rings(rows, hit_reads_as_miss=hit_reads_as_miss)
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


def test_alloc_gives_every_row_a_ring_of_its_own_and_free_gives_it_back(pool):
    pages = free(pool)
    requests = [request(0), request(128)]
    pool.rows.alloc(requests)
    rings = [pool.rings.pages[row(r)].tolist() for r in requests]
    assert len({*rings[0], *rings[1]}) == 2 * RING and pool.rings.out == 2
    assert free(pool) == sorted(set(pages) - {*rings[0], *rings[1]})
    pool.rows.free(requests[0])
    assert free(pool) == sorted(set(pages) - set(rings[1])) and pool.rings.out == 1
    pool.rows.free(requests[1])
    assert free(pool) == pages and pool.rings.out == 0


def test_a_continued_chunk_keeps_its_ring(pool):
    chunked = request(0)
    pool.rows.alloc([chunked])
    ring = pool.rings.pages[row(chunked)].clone()
    between_chunks(chunked, 256)
    pool.rows.alloc([chunked, request(0)])
    assert torch.equal(pool.rings.pages[row(chunked)], ring) and pool.rings.out == 2


def test_a_promised_ring_is_the_one_that_the_row_gets(pool):
    req, tree = request(0), NO_TREE
    assert pool.rings.promise(req, tree) and pool.rings.out == 1
    left = free(pool)
    pool.rows.alloc([req])
    assert free(pool) == left and pool.rings.out == 1
    assert not set(pool.rings.pages[row(req)].tolist()) & set(left)


def test_a_ring_that_was_taken_back_is_free_and_can_be_promised_again(pool):
    req, tree, pages = request(0), NO_TREE, free(pool)
    assert pool.rings.promise(req, tree)
    pool.rings.take_back(req)
    assert free(pool) == pages and pool.rings.out == 0
    pool.rows.alloc([req])
    assert pool.rings.out == 1


def test_alloc_without_pages_for_every_ring_takes_none(pool):
    pool.rings.allocator = Allocator(2 * RING + 1)
    assert pool.rows.alloc([request(0) for _ in range(3)]) is None
    assert free(pool) == list(range(1, 2 * RING + 2)) and pool.rings.out == 0
    assert pool.rows.available_size() == 4


def test_a_flush_forgets_rings_whose_pages_the_allocator_made_free(pool):
    req = request(0)
    pool.rows.alloc([req])
    pool.rows.clear()
    pool.rings.allocator = Allocator(20)
    assert pool.rings.out == 0
    pool.rings.free_row(row(req))
    assert free(pool) == list(range(1, 21))


@pytest.mark.parametrize("in_group", [False, True])
def test_pages_come_back_to_the_allocator_of_the_installed_sglang(in_group):
    allocator = compat.PagedTokenToKVPoolAllocator(
        10 * PAGE, PAGE, torch.uint8, "cpu", SimpleNamespace(), need_sort=False
    )
    pages = allocator.alloc(3 * PAGE)[::PAGE] // PAGE
    assert allocator.available_size() == 7 * PAGE
    if in_group:
        allocator.free_group_begin()
    compat.free_pages(allocator, pages)
    if in_group:
        assert allocator.available_size() == 7 * PAGE
        allocator.free_group_end()
    assert allocator.available_size() == 10 * PAGE
    assert sorted(allocator.free_pages.tolist()) == list(range(1, 11))


@pytest.mark.parametrize(
    ("need_sort", "in_group", "expected"),
    [
        (False, False, ([3, 1, 7], [8], [])),
        (True, False, ([7], [3, 1, 8], [])),
        # SGLang frees the page of each of these tokens when the group ends
        (False, True, ([7], [8], [3 * PAGE, PAGE])),
        (True, True, ([7], [8], [3 * PAGE, PAGE])),
    ],
)
def test_pages_come_back_to_the_allocator_of_sglang_before_0_5_23(monkeypatch, need_sort, in_group, expected):
    monkeypatch.setattr(compat, "version", lambda: "0.5.16")
    allocator = SimpleNamespace(page_size=PAGE, need_sort=need_sort, is_not_in_free_group=not in_group, free_group=[])
    allocator.free_pages, allocator.release_pages = torch.tensor([7]), torch.tensor([8])
    compat.free_pages(allocator, torch.tensor([3, 1]))
    group = [token for tokens in allocator.free_group for token in tokens.tolist()]
    assert (allocator.free_pages.tolist(), allocator.release_pages.tolist(), group) == expected


def test_the_allocator_of_a_kvarn_pool_is_known_to_its_rings():
    cache = SimpleNamespace()
    rings = Rings(2, RING, "cpu", hit_reads_as_miss=False)
    setattr(cache, ATTRIBUTE, rings)
    allocator = compat.PagedTokenToKVPoolAllocator(10 * PAGE, PAGE, torch.uint8, "cpu", cache, need_sort=False)
    assert rings.allocator is allocator
