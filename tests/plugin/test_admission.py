# SPDX-License-Identifier: Apache-2.0
"""A request is added only with a ring; lengths leave room for one; SGLang's checks count those that are out."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import admission, compat
from sglang_kvarn.rings import ATTRIBUTE, Rings

PAGE, RING = 128, 3


class Tree:
    """SGLang's prefix cache as far as the hook needs it: pages that can be evicted, of which some are locked."""

    def __init__(self, allocator, rings, evictable: list[int]) -> None:
        self.token_to_kv_pool_allocator, self.evictable, self.locked = allocator, evictable, set()
        self.req_to_token_pool = SimpleNamespace(**{ATTRIBUTE: rings})



@pytest.fixture(autouse=True)
def evict(monkeypatch) -> None:
    """Evict as SGLang does: only what is missing, and nothing that is locked."""

    def from_tree(tree: Tree, tokens: int) -> None:
        missing = tokens - tree.token_to_kv_pool_allocator.available_size()
        for page in [p for p in tree.evictable if p not in tree.locked][: max(-(-missing // PAGE), 0)]:
            tree.evictable.remove(page)
            compat.free_pages(tree.token_to_kv_pool_allocator, torch.tensor([page]))

    monkeypatch.setattr(compat, "evict", from_tree, raising=False)


class Adder:
    """SGLang's PrefillAdder as far as the hook needs it."""

    def __init__(self, tree: Tree) -> None:
        self.tree_cache, self.can_run_list = tree, []

    @contextmanager
    def _lock_node(self, node):
        self.tree_cache.locked |= set(node)
        yield
        self.tree_cache.locked -= set(node)


def make(free: int, evictable: int = 0) -> Adder:
    """Return an adder over `free` free pages and as many evictable ones as said."""
    allocator = compat.PagedTokenToKVPoolAllocator(
        (free + evictable) * PAGE, PAGE, torch.uint8, "cpu", SimpleNamespace(), need_sort=False
    )
    rings = Rings(9, RING, "cpu", hit_reads_as_miss=False)
    rings.allocator = allocator
    taken = [] if not evictable else (allocator.alloc(evictable * PAGE)[::PAGE] // PAGE).tolist()
    return Adder(Tree(allocator, rings, taken))


def request(prefix: list[int] = ()) -> SimpleNamespace:
    """Return a request without a row whose prefix is in these pages."""
    return SimpleNamespace(last_node=list(prefix), req_pool_idx=None, kv=SimpleNamespace(req_pool_idx=None))


def add(adder: Adder, req, *, fits: bool = True):
    def original(adder, req, *args, **kwargs):
        if fits:
            adder.can_run_list.append(req)
        return "added" if fits else "refused"

    return admission.add_with_ring(original, adder, req, False, truncation_align_size=None)


def available(adder: Adder) -> int:
    return adder.tree_cache.token_to_kv_pool_allocator.available_size() // PAGE


def rings_of(adder: Adder) -> Rings:
    return getattr(adder.tree_cache.req_to_token_pool, ATTRIBUTE)


def test_a_request_that_is_added_has_a_ring_and_the_pool_is_smaller_by_it():
    adder = make(free=10)
    assert add(adder, request()) == "added"
    assert available(adder) == 10 - RING and rings_of(adder).out == 1


def test_a_request_that_sglang_refuses_leaves_no_ring_behind():
    adder = make(free=10)
    assert add(adder, request(), fits=False) == "refused"
    assert available(adder) == 10 and rings_of(adder).out == 0


def test_a_request_without_a_ring_is_refused_before_sglang_looks_at_it():
    adder = make(free=RING - 1)
    assert add(adder, request()) is compat.AddReqResult.NO_TOKEN
    assert adder.can_run_list == [] and available(adder) == RING - 1


def test_a_ring_is_evicted_for_as_any_allocation_is():
    adder = make(free=1, evictable=RING)
    assert add(adder, request()) == "added"
    # one page was free already
    assert len(adder.tree_cache.evictable) == 1 and available(adder) == 0
    assert rings_of(adder).out == 1


def test_the_prefix_of_the_request_itself_is_not_evicted():
    adder = make(free=1, evictable=RING)
    prefix = list(adder.tree_cache.evictable)
    assert add(adder, request(prefix)) is compat.AddReqResult.NO_TOKEN
    assert adder.tree_cache.evictable == prefix and adder.tree_cache.locked == set()


def test_a_request_that_has_a_row_needs_no_other_ring():
    adder, req = make(free=0), request()
    req.req_pool_idx = req.kv.req_pool_idx = 3
    assert add(adder, req) == "added" and rings_of(adder).out == 0


def test_another_cache_is_not_asked():
    adder = make(free=0)
    adder.tree_cache.req_to_token_pool = SimpleNamespace()
    assert add(adder, request()) == "added"


@pytest.mark.parametrize(
    ("context", "drafts", "longest"),
    [
        (10_000, 1, 128 * (20 - RING - 1) - 1),
        # SGLang allocates twice the drafts ahead
        (10_000, 4, 128 * (20 - RING - 1) - 1 - 8),
        (500, 4, 499),
    ],
)
def test_lengths_leave_room_for_a_ring(monkeypatch, context, drafts, longest):
    monkeypatch.setattr(compat, "draft_tokens", lambda args: drafts)
    rows = SimpleNamespace(**{ATTRIBUTE: Rings(9, RING, "cpu", hit_reads_as_miss=False)})
    scheduler = SimpleNamespace(
        tp_worker=SimpleNamespace(get_memory_pool=lambda: (rows, None)),
        server_args=None,
        max_total_num_tokens=20 * PAGE,
        max_req_len=min(context - 1, 20 * PAGE - 1),
        max_req_input_len=min(context - 1, 20 * PAGE - 1) - 5,
    )
    assert admission.limit_lengths(None, scheduler) is None
    assert (scheduler.max_req_len, scheduler.max_req_input_len) == (longest, longest - 5)


def test_memory_checks_count_rings():
    adder = make(free=10)
    add(adder, request())
    checker = SimpleNamespace(req_to_token_pool=adder.tree_cache.req_to_token_pool)
    assert admission.count_rings((256, 0), checker) == (256 + RING * PAGE, 0)
    assert admission.count_rings((256, 0), SimpleNamespace(req_to_token_pool=SimpleNamespace())) is None
