# SPDX-License-Identifier: Apache-2.0
"""Failures that other KVarN caches had in service with prefix sharing, each as a test of its own.

Sources: SGLang pull request 31967 and its regression tests, the trackers of the vLLM ports.
"""

from __future__ import annotations

import pytest
import torch
from history import PAGE
from prefix_cache import calls
from sglang_kvarn import capacity, compat
from world import CONTEXT, ROWS, SLIDING_PAGES, World, prefill, tokens, use_plain_allocation_kernels

PRESETS = ["kvarn", "kvarn_canonical"]


@pytest.fixture
def world(request, monkeypatch) -> World:
    """A world whose free memory is NaN; the preset is the parameter, else the default."""
    use_plain_allocation_kernels(monkeypatch)
    return World(getattr(request, "param", "kvarn"))


def pages_in(world: World, request) -> list[int]:
    return (world.rows.req_to_token[request.row, : request.cached : PAGE] // PAGE).tolist()


def ring_of(world: World, request) -> list[int]:
    return world.rings.pages[request.row].tolist()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_a_stolen_tail_an_evicted_page_id_does_not_touch_the_exact_rows_of_its_next_owner(world):
    """The fork mapped page ids to exact slots; a load-back for an old id stole the slot of a live request."""
    first = prefill(world, tokens(3 * PAGE, 1))
    pages = set(pages_in(world, first))
    world.finish(first)
    live = prefill(world, tokens(PAGE + 40, 2))
    world.evict(world.pool_pages * PAGE)
    guests = [prefill(world, tokens(2 * PAGE + 5, seed)) for seed in (3, 4)]
    recycled = {page for guest in guests for page in pages_in(world, guest) + ring_of(world, guest)}
    assert pages & recycled, "no page id was recycled"
    for _ in range(PAGE):
        # every step checks the output and the ring of all three
        world.decode()
    assert live in world.running


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_a_recycled_page_id_is_encoded_again_by_its_next_owner(world):
    """A page id with a record from its last owner looked complete to the next one."""
    world.poison = False
    stale = prefill(world, tokens(6 * PAGE, 1))
    stale_pages = set(pages_in(world, stale) + ring_of(world, stale))
    world.finish(stale)
    world.evict(world.pool_pages * PAGE)
    # newest pages are handed out first
    request = prefill(world, tokens(2 * PAGE - 3, 2))
    assert set(pages_in(world, request)) <= stale_pages
    for _ in range(6):
        world.decode()
    records = world.cache.records[pages_in(world, request)[:2]]
    assert torch.equal(records, request.history.records(2))


@pytest.mark.parametrize("world", PRESETS, indirect=True)
@pytest.mark.parametrize("over", [-2, -1, 0, 1, 2])
def test_prompt_length_around_a_page_with_a_prefix_hit(world, over):
    """One prompt length in 128 was corrupt, and only on a prefix-cache hit."""
    shared = tokens(2 * PAGE, 1)
    world.finish(prefill(world, shared + tokens(10, 2)))
    request = prefill(world, shared + tokens(PAGE + over, 3))
    assert request.exact_start == 2 * PAGE
    for _ in range(4):
        world.decode()
    # the whole prompt again: now the hit ends one page later where the prompt fills it
    world.finish(request)
    again = prefill(world, shared + tokens(PAGE + over, 3))
    assert again.exact_start == (3 if over > 0 else 2) * PAGE
    for _ in range(PAGE):
        world.decode()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_a_retired_tile_is_read_from_its_record_when_a_prefix_hit_brings_it_back(world):
    """A cached page must never be looked for among the exact rows of the request that hits it."""
    donor = prefill(world, tokens(2 * PAGE + 30, 1))
    world.finish(donor)
    for _ in range(ROWS + 1):
        # one after the other in every row, each with the ring of a stranger (or NaN) behind it
        guest = prefill(world, tokens(2 * PAGE + 30, 1)[: 2 * PAGE] + tokens(5, 9))
        assert guest.exact_start == 2 * PAGE
        world.decode()
        world.finish(guest)
        world.finish(prefill(world, tokens(40, 5)))


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_the_first_page_of_a_finished_chat_turn_serves_the_next_turn(world):
    """The page kept exact for a first turn was dropped with it, and the second turn read nothing there."""
    turn = prefill(world, tokens(PAGE - 5, 1))
    for _ in range(PAGE + 10):
        world.decode()
    said = list(turn.history.tokens)
    world.finish(turn)
    following = prefill(world, said + tokens(20, 2))
    assert following.exact_start == len(said) // PAGE * PAGE == 2 * PAGE
    for _ in range(3):
        world.decode()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_padded_rows_hold_nothing_of_an_earlier_batch(world):
    """After a batch of three, one of one padded to three must store into page 0 and its own ring only."""
    requests = [prefill(world, tokens(PAGE - 2 - n, n)) for n in range(ROWS - 1)]
    for _ in range(4):
        world.decode()
    for request in requests[1:]:
        world.finish(request)
    world.poison = False
    records = world.cache.records.clone()
    step = world.prepare_decode(padding=2)
    size = step.batch.num_tokens
    assert not step.batch.ring_pages[1:].any() and step.batch.ring_pages[0].all()
    assert step.batch.seq_lens[1:].tolist() == [1] * (size - 1)
    assert step.batch.store_pages[1:].tolist() == [0] * (size - 1)
    position, ring = requests[0].cached - 1, world.rings.pages[requests[0].row]
    world.run(step)
    changed = (world.cache.records != records).flatten(1).any(1).nonzero().flatten().tolist()
    tokens_of_page = world.cache.exact.shape[2] // (2 * world.cache.head_dim)
    assert changed == sorted([0, int(ring[position // tokens_of_page % len(ring)])])
    # of that page, one token
    changed_elements = (world.cache.records[changed[1]] != records[changed[1]]).any(0).nonzero().flatten()
    place, token_bytes = position % tokens_of_page, 2 * world.cache.head_dim * world.cache.dtype.itemsize
    assert (changed_elements // token_bytes).unique().tolist() == [place]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [PAGE - 2, PAGE - 1, PAGE, 2 * PAGE - 1])
def test_a_freed_row_with_a_wasted_step_is_clean_for_its_next_owner(preset, length, monkeypatch):
    """Row, ring and pages have a new owner, and req_to_token is rewritten, before the wasted step runs."""
    use_plain_allocation_kernels(monkeypatch)
    world = World(preset, rings=ROWS)
    stay = prefill(world, tokens(PAGE + 60, 1))
    leave = prefill(world, tokens(length, 2))
    filler = [prefill(world, tokens(20, seed)) for seed in (3, 4)]
    row, ring = leave.row, set(ring_of(world, leave))
    following = world.admit(tokens(2 * PAGE + 7, 5))
    world.decode_with_wasted_step(leave, reuse=True, chunk=200)
    assert following.row == row, "the row was not reused at once"
    assert ring & set(ring_of(world, following) + pages_in(world, following)), "no page of the ring was reused at once"
    for _ in range(3):
        world.extend(200)
        world.decode()
    # what the wasted step completed is in the tree, and right
    assert {stay, *filler} <= set(world.running)
    again = world.admit(leave.history.tokens + tokens(3, 6))
    for request in filler:
        world.finish(request)
    world.extend(1000)
    assert again.exact_start == (length + 1) // PAGE * PAGE


def test_a_wasted_step_reads_from_the_exact_start_of_its_own_request(monkeypatch):
    """The row's next owner found nothing in the prefix cache, and would read in the ring what its last owner found."""
    use_plain_allocation_kernels(monkeypatch)
    world = World("kvarn", rings=ROWS)
    world.finish(prefill(world, tokens(2 * PAGE + 5, 1)))
    leave = prefill(world, tokens(2 * PAGE, 1) + tokens(20, 2))
    for seed in (3, 4, 5):
        prefill(world, tokens(20, seed))
    row, following = leave.row, world.admit(tokens(PAGE + 7, 6))
    assert leave.exact_start == 2 * PAGE
    world.decode_with_wasted_step(leave, reuse=True, chunk=200)
    assert (following.row, following.exact_start) == (row, 0)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("length", [PAGE + 60, 2 * PAGE - 1])
def test_a_freed_ring_page_becomes_a_record_of_another_request_while_a_wasted_step_runs(preset, length, monkeypatch):
    """The wasted step writes a token to its old ring; the record that takes the page comes later, and is whole."""
    use_plain_allocation_kernels(monkeypatch)
    world = World(preset, rings=ROWS)
    stay, leave = prefill(world, tokens(3 * PAGE - 3, 1)), prefill(world, tokens(length, 2))
    ring = set(ring_of(world, leave))
    wasted = world.prepare_decode()
    world.running.remove(leave)
    world.release(leave, insert=True)
    # every free page but those of the ring is taken, so that the next pages are among those
    others = [page for page in world.allocator.free_pages.tolist() if page not in ring]
    world.allocator.free_pages = torch.tensor(sorted(ring), dtype=torch.int64)
    world.run(wasted)
    assert stay.cached == 3 * PAGE - 2
    for _ in range(PAGE + 5):
        world.decode()
    records = set(pages_in(world, stay)[: stay.cached // PAGE])
    world.allocator.free_pages = torch.cat([world.allocator.free_pages, torch.tensor(others)])
    assert records & ring, "no page of the ring became a record"
    world.check_accounts()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_a_request_waits_for_a_ring_and_gets_the_one_that_is_given_back(world):
    """A pool that is full of rings and of locked pages admits no one, loses nothing, and goes on after a finish."""
    running = [prefill(world, tokens(PAGE + 9 * n, n)) for n in range(ROWS - 1)]
    for _ in range(2 * PAGE):
        world.decode()
    late = world.admit(tokens(70, 9))
    before = world.allocator.free_pages.tolist()
    world.extend(1000)
    assert late.row is None and world.rings.out == len(world.holders())
    assert sorted(world.allocator.free_pages.tolist()) == sorted(before)
    world.check_accounts()
    given = set(ring_of(world, running[0]))
    world.finish(running[0])
    world.extend(1000)
    assert late in world.running and given & set(ring_of(world, late))
    world.check_accounts()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_two_requests_that_compute_one_prefix_at_once_go_on_with_one_copy(world):
    """The later one's pages are freed under it and used by others while it goes on with the tree's."""
    twins = [world.admit(tokens(2 * PAGE + 50, 1) + tokens(9, seed)) for seed in (2, 3)]
    world.extend(1000)
    world.decode()
    assert pages_in(world, twins[0])[:2] == pages_in(world, twins[1])[:2]
    prefill(world, tokens(5 * PAGE, 4))
    for _ in range(PAGE):
        world.decode()


@pytest.mark.parametrize("world", PRESETS, indirect=True)
def test_a_retracted_request_reads_the_same_again(world):
    """Back from retraction, its tokens come from the prefix cache or are computed again in other chunks."""
    request = prefill(world, tokens(PAGE + 100, 1))
    for _ in range(50):
        world.decode()
    world.retract(request)
    prefill(world, tokens(70, 2))
    while request not in world.running:
        world.extend(97)
    for _ in range(5):
        world.decode()


@pytest.fixture
def drafting(request, monkeypatch) -> World:
    """A world whose requests verify up to 8 drafts in a step; the preset is the parameter."""
    use_plain_allocation_kernels(monkeypatch)
    return World(request.param, drafts=8)


@pytest.mark.parametrize("drafting", PRESETS, indirect=True)
@pytest.mark.parametrize("accepted", [1, 2, 8])
def test_a_rejected_draft_is_in_no_record_that_the_next_turn_reads(drafting, accepted):
    """A page was encoded with drafts in it, some of them rejected, before the tokens that belong there came."""
    world = drafting
    turn = prefill(world, tokens(PAGE - 11, 1))
    while turn.cached < PAGE + 5:
        world.verify(8, [accepted])
    said = list(turn.history.tokens)
    world.finish(turn)
    following = prefill(world, said + tokens(20, 2))
    assert following.exact_start == PAGE
    for _ in range(3):
        world.verify(8, [accepted])


@pytest.mark.parametrize("drafting", PRESETS, indirect=True)
def test_a_request_that_ends_inside_an_accepted_run_leaves_the_page_that_the_run_filled(drafting):
    """The run fills a page and the request is over: nothing comes later that could encode it."""
    world = drafting
    turn = prefill(world, tokens(PAGE - 3, 1))
    world.verify(8, [7])
    assert turn.cached == PAGE + 4
    said = list(turn.history.tokens)
    world.finish(turn)
    assert prefill(world, [*said, 7, 8]).exact_start == PAGE


@pytest.mark.parametrize("drafting", PRESETS, indirect=True)
def test_a_page_that_is_freed_while_its_drafts_are_verified_is_clean_for_its_next_owner(drafting):
    """The step was launched when its request had ended: its page, and those ahead, have a new owner already."""
    world = drafting
    stay, leave = prefill(world, tokens(PAGE + 60, 1)), prefill(world, tokens(2 * PAGE - 4, 2))
    world.verify(8, [1])
    pages = set(world.rows.req_to_token[leave.row, PAGE : 3 * PAGE : PAGE].div(PAGE, rounding_mode="floor").tolist())
    guest = world.admit(tokens(3 * PAGE + 7, 5))
    world.decode_with_wasted_step(leave, reuse=True, chunk=1000)
    assert guest in world.running and pages & set(pages_in(world, guest) + ring_of(world, guest))
    for _ in range(3):
        world.verify(8, [3, 8])
    assert stay in world.running


@pytest.mark.parametrize("drafting", PRESETS, indirect=True)
def test_padded_requests_of_a_verify_step_write_to_page_0_only(drafting):
    """A graph that was captured for three requests verifies one."""
    world = drafting
    request = prefill(world, tokens(PAGE - 4, 1))
    world.poison = False
    records = world.cache.records.clone()
    for _ in range(2):
        world.verify(8, [2], padding=2)
    changed = set((world.cache.records != records).flatten(1).any(1).nonzero().flatten().tolist())
    own = world.rows.req_to_token[request.row, : 2 * PAGE : PAGE] // PAGE
    assert 0 in changed and changed <= {0, *ring_of(world, request), *own.tolist()}


@pytest.mark.parametrize("preset", PRESETS)
def test_a_hit_at_a_state_before_the_end_of_the_cached_pages_reads_exactly_from_there(preset, monkeypatch):
    """In a hybrid a hit ends at a state; the pages behind it are cached, and the request computes its own."""
    use_plain_allocation_kernels(monkeypatch)
    world = World(preset, checkpoint=2 * PAGE)
    shared = tokens(3 * PAGE, 1)
    donor = prefill(world, shared + tokens(30, 2))
    cached = pages_in(world, donor)[:3]
    request = world.admit(shared + tokens(20, 3))
    # the chunk ends amid the page that is cached and computed again
    world.extend(PAGE // 2)
    assert request.exact_start == int(world.rings.exact_starts[request.row]) == 2 * PAGE
    own = pages_in(world, request)
    assert own[:2] == cached[:2] and own[2] not in cached
    world.extend(1000)
    world.finish(donor)
    for _ in range(PAGE):
        world.decode()
    assert request in world.running
    world.check_accounts()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_state_that_is_evicted_while_its_pages_stay_costs_the_hit_and_nothing_else(preset, monkeypatch):
    """Without the state nothing of the cached pages may be used, and who found it before goes on with them."""
    use_plain_allocation_kernels(monkeypatch)
    world = World(preset, checkpoint=2 * PAGE)
    shared = tokens(2 * PAGE, 1)
    world.finish(prefill(world, shared + tokens(30, 2)))
    early = prefill(world, shared + tokens(40, 3))
    cached = pages_in(world, early)[:2]
    # no match is that long
    world.checkpoint = 2 * CONTEXT
    late = prefill(world, shared + tokens(50, 4))
    assert (early.exact_start, late.exact_start) == (2 * PAGE, 0)
    assert int(world.rings.exact_starts[late.row]) == 0 and int(world.rings.exact_starts[early.row]) == 2 * PAGE
    for _ in range(PAGE):
        world.decode()
    # the later copy was a duplicate, and is free
    assert pages_in(world, late)[:2] == cached and {early, late} <= set(world.running)
    world.check_accounts()


@pytest.fixture(params=PRESETS)
def sliding(request, monkeypatch) -> World:
    """A world of which other layers have sliding windows of 150 tokens."""
    use_plain_allocation_kernels(monkeypatch)
    return World(request.param, sliding=150)


def test_pages_whose_sliding_windows_are_gone_are_replaced_by_those_of_who_computes_them_again(sliding):
    """Nobody holds the pages: the prefix cache takes those of the request, with their windows."""
    first = prefill(sliding, tokens(3 * PAGE + 5, 1))
    sliding.finish(first)
    sliding.evict_sliding(2 * PAGE)
    again = prefill(sliding, tokens(3 * PAGE + 5, 1) + [7])
    assert again.exact_start == 0, "a match ends where a window is whole"
    sliding.check_accounts()
    for _ in range(PAGE):
        # every step checks outputs, records, the ring and the window
        sliding.decode()
    sliding.finish(again)
    hit = prefill(sliding, tokens(3 * PAGE + 5, 1) + [8])
    # 0.5.23 has freed more windows while the request went on
    assert hit.exact_start in (PAGE, 3 * PAGE)
    sliding.decode()
    sliding.check_accounts()


def test_pages_that_a_request_holds_get_the_sliding_windows_of_who_computes_them_again(sliding):
    """The pages are locked by a request that is past them: they stay, and the windows are mapped to them."""
    holder = prefill(sliding, tokens(3 * PAGE + 5, 1))
    for _ in range(2 * PAGE):
        sliding.decode()
    sliding.evict_sliding(12 * PAGE)
    again = prefill(sliding, tokens(3 * PAGE + 5, 1) + [7])
    sliding.check_accounts()
    assert holder in sliding.running and again in sliding.running
    for _ in range(PAGE):
        sliding.decode()
    sliding.finish(holder)
    hit = prefill(sliding, tokens(3 * PAGE + 5, 1) + [8])
    assert hit.exact_start == 3 * PAGE
    sliding.decode()
    sliding.check_accounts()


def test_a_ring_is_evicted_for_without_the_loss_of_sliding_windows(sliding):
    """A ring has no window: SGLang's eviction for so many tokens would drop as many of both kinds."""
    for seed in (1, 2):
        sliding.finish(prefill(sliding, tokens(2 * PAGE + 5, seed)))
    before = sliding.tree.swa_evictable_size()
    # more than the free pages, and than all pages of sliding windows
    compat.evict(sliding.tree, sliding.allocator.full_available_size())
    assert sliding.tree.swa_evictable_size() == before > 0
    compat.evict(sliding.tree, sliding.allocator.full_available_size() + PAGE)
    assert sliding.tree.full_evictable_size() < 4 * PAGE
    # the pages of the older prompt made room; the newer one has its windows
    assert prefill(sliding, tokens(2 * PAGE + 5, 2) + [7]).exact_start == 2 * PAGE
    sliding.check_accounts()


# tokens before a query: as SGLang has it for a window of a page, and for one that crosses the end of a page
@pytest.fixture(params=[PAGE - 1, 150])
def drafting_beside_windows(request, monkeypatch) -> World:
    """A world whose requests verify 16 drafts in a step, and of which other layers have sliding windows."""
    use_plain_allocation_kernels(monkeypatch)
    return World("kvarn", drafts=16, sliding=request.param)


def verify_until_a_window_leaves_its_pages(world: World, accepted: int) -> None:
    """Some pages are filled by drafts, of which some are rejected; then comes the next turn."""
    turn = prefill(world, tokens(2 * PAGE - 30, 1))
    interval = compat.sliding_eviction_interval(world.drafts)
    most = capacity.sliding_tokens_of_request(world.sliding, interval, world.drafts)
    while turn.cached < 5 * PAGE + 3:
        # at times all are accepted, to get there soon
        for count in (accepted, accepted, accepted, world.drafts):
            world.verify(world.drafts, [count])
        free = world.allocator.swa_available_size()
        # a page of the prompt is the tree's
        assert SLIDING_PAGES * PAGE - free - PAGE <= most, "more windows than a request is charged for"
    said = list(turn.history.tokens)
    world.finish(turn)
    world.check_accounts()
    following = prefill(world, said + tokens(20, 2))
    found = {(len(said) - 1) // PAGE * PAGE}
    if world.sliding > PAGE and not compat.is_since("0.5.23"):
        # the window of who comes next was freed in part, but for that of the prompt
        found.add(PAGE)
    assert following.exact_start in found
    world.verify(world.drafts, [accepted])
    world.check_accounts()


@pytest.mark.parametrize("accepted", [1, 3, 15])
def test_a_sliding_window_sees_no_rejected_draft_and_loses_no_token(drafting_beside_windows, accepted):
    verify_until_a_window_leaves_its_pages(drafting_beside_windows, accepted)


@pytest.mark.parametrize("drafting_beside_windows", [PAGE - 1], indirect=True)
def test_windows_that_are_freed_as_if_all_drafts_were_accepted_are_found(drafting_beside_windows, monkeypatch):
    evict = calls.evict_sliding
    monkeypatch.setattr(calls, "evict_sliding", lambda tree, req, end: evict(tree, req, end + 15))
    with pytest.raises(AssertionError, match="sliding window of layer"):
        verify_until_a_window_leaves_its_pages(drafting_beside_windows, 1)


def test_windows_of_rejected_drafts_in_the_prefix_cache_are_found(drafting_beside_windows):
    world = drafting_beside_windows
    turn = prefill(world, tokens(PAGE - 4, 1))
    world.verify(16, [1])
    said, rejected = list(turn.history.tokens), tokens(15, 2)
    # taken for accepted when the request is over
    turn.req.output_ids.extend(rejected)
    calls.note_accepted(turn.req, turn.cached + len(rejected))
    world.finish(turn)
    with pytest.raises(AssertionError, match="sliding window of layer"):
        prefill(world, said + rejected + tokens(20, 3))
