# SPDX-License-Identifier: Apache-2.0
"""Failures of a cache with host memory: each must not happen, and is found by the world where the guard is taken away.

The device of a world works in an order that is given: at random, or copies or forward passes as early as they may. A
test that takes a guard away shows that one of ORDERS finds the failure, so that the test that keeps the guard, in the
same orders, is no empty promise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace

import host_pools_on_cpu
import pytest
import torch
from history import PAGE
from host_tier import HostOptions
from kept_states import KeptStates
from prefix_cache import calls
from sglang_kvarn import compat, fences, mixed_pool, pool
from sglang_kvarn.rings import ATTRIBUTE
from streams import COPIES_FIRST, FORWARD_FIRST, Device
from world import ROWS, World, prefill, tokens, use_plain_allocation_kernels

needs_states = pytest.mark.skipif(not compat.hosts_states(), reason="this SGLang has no prefix cache of hybrid models")
needs_windows = pytest.mark.skipif(not compat.hosts_windows(), reason="host memory is refused beside sliding windows")

ORDERS = [COPIES_FIRST, FORWARD_FIRST, 0, 1, 2]
POLICIES = ["write_through", "write_back"]
# states of the device; three for each row
STATES = 20
# tokens before a query in a sliding window, which crosses the end of a page: more than a page has
SLIDING = 150


@pytest.fixture(autouse=True)
def plain_allocation(monkeypatch) -> None:
    use_plain_allocation_kernels(monkeypatch)


def hosted(
    order: int | str,
    policy: str = "write_through",
    core: str = "python",
    *,
    pages: int = 60,
    rings: int = ROWS,
    **layers: int,
) -> World:
    return World("kvarn", host=HostOptions(pages, policy, order, core), rings=rings, **layers)


def without_fence(monkeypatch, name: str) -> None:
    """Let copies of one direction wait for no forward pass: "write" to the host, "load" from it."""
    wait = fences._wait_for_forward
    others = lambda controller, stream: None if stream == f"{name}_stream" else wait(controller, stream)  # noqa: E731
    monkeypatch.setattr(fences, "_wait_for_forward", others)
    monkeypatch.setattr(calls, "set_fences", lambda controller, stream: calls.set_fence(controller, stream, name))


def write_a_page_that_a_wasted_step_fills(order: int | str) -> None:
    """The page enters the prefix cache, and is copied, when the step that encodes it was launched and has not run."""
    world = hosted(order)
    leave = prefill(world, tokens(2 * PAGE - 2, 1))
    world.decode()
    assert leave.cached == 2 * PAGE - 1
    world.decode_with_wasted_step(leave, reuse=False)
    world.tier.device.synchronize()
    world.check_accounts()
    assert torch.equal(world.tier.pages("host"), world.tier.pages("device")), "both pages are in both memories"
    assert len(world.tier.pages("host")) == 2


def load_into_a_page_that_a_wasted_step_writes(order: int | str) -> None:
    """A page of the ring of a request that has ended is where the prefix of the next one is loaded."""
    world = hosted(order)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(20, 2))
    world.waiting.remove(again)
    stay, leave = prefill(world, tokens(40, 3)), prefill(world, tokens(50, 4))
    ring, tokens_of_page = world.rings.pages[leave.row].tolist(), world.cache.exact.shape[2] // (2 * 64)
    wasted = world.prepare_decode()
    world.launch(wasted)
    world.running.remove(leave)
    world.release(leave, insert=True)
    # what the step writes; behind the pages of the next ring, which are handed out first
    written = ring[(leave.cached - 1) // tokens_of_page % len(ring)]
    others = [page for page in world.allocator.free_pages.tolist() if page != written]
    world.allocator.free_pages = torch.tensor(others[: len(ring)] + [written] + others[len(ring) :])
    world.waiting.append(again)
    following = world.allocate_extend(1000)
    assert written in (world.rows.req_to_token[again.row, : 3 * PAGE : PAGE] // PAGE).tolist()
    world.run(wasted)
    world.run(world.describe_extend(*following))
    assert again.exact_start == 3 * PAGE and {again, stay} <= set(world.running)
    world.tier.device.synchronize()
    world.check_accounts()


def read_a_prefix_from_the_host(order: int | str, policy: str = "write_through", core: str = "python") -> None:
    """A prompt is found in host memory alone; a branch of it, and its next turn, are found on the device again."""
    world = hosted(order, policy, core)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(PAGE, 2))
    world.extend(1000)
    assert (again.exact_start, world.host_hits) == (3 * PAGE, 1)
    branch = prefill(world, tokens(3 * PAGE, 1)[: 2 * PAGE] + tokens(40, 3))
    assert branch.exact_start == 2 * PAGE
    for _ in range(3):
        world.decode()
    branch = world.come_back(again, tokens(9, 4))
    world.extend(1000)
    assert branch.exact_start >= 4 * PAGE
    world.tier.device.synchronize()
    world.check_accounts()


def test_a_page_is_copied_to_the_host_after_the_step_that_encodes_it():
    for order in ORDERS:
        write_a_page_that_a_wasted_step_fills(order)


def test_a_copy_that_does_not_wait_for_the_step_that_encodes_its_page_is_found(monkeypatch):
    without_fence(monkeypatch, "write")
    with pytest.raises(AssertionError, match="host memory: pages"):
        for order in ORDERS:
            write_a_page_that_a_wasted_step_fills(order)


def test_a_page_is_loaded_after_a_wasted_step_of_its_last_owner():
    for order in ORDERS:
        load_into_a_page_that_a_wasted_step_writes(order)


def test_a_load_that_does_not_wait_for_a_wasted_step_is_found(monkeypatch):
    without_fence(monkeypatch, "load")
    with pytest.raises(AssertionError, match="error"):
        for order in ORDERS:
            load_into_a_page_that_a_wasted_step_writes(order)


@pytest.mark.parametrize(("fence", "stream"), [(fences.before_writing, "write"), (fences.before_loading, "load")])
def test_a_controller_with_streams_of_its_own_copies_after_the_forward_pass(fence, stream):
    """As SGLang 0.5.16 has it, tested here in every version; a cache that is not ours is left alone."""
    device = Device(COPIES_FIRST)
    streams = {f"{name}_stream": device.Stream() for name in ("write", "load")}
    forward, done = device.Stream(computes=True), []
    for ring, expected in ((object(), ["forward", "copy"]), (None, ["copy", "forward"])):
        done.clear()
        cache = SimpleNamespace(forward_stream=forward, **{ATTRIBUTE: ring})
        controller = SimpleNamespace(mem_pool_device=cache, **streams)
        with device.stream(forward):
            device.launch(lambda: done.append("forward"), "forward")
        fence(controller)
        with device.stream(streams[f"{stream}_stream"]):
            device.launch(lambda: done.append("copy"), "host")
        device.synchronize()
        assert done == expected
    # on a CPU there is no stream, and from 0.5.23 on they are not the controller's
    fence(SimpleNamespace(mem_pool_device=SimpleNamespace(forward_stream=None, **{ATTRIBUTE: object()}), **streams))
    fence(SimpleNamespace(mem_pool_device=SimpleNamespace(forward_stream=forward, **{ATTRIBUTE: object()})))


@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_from_the_host_is_read_as_one_that_never_left(policy, core):
    for order in ORDERS:
        read_a_prefix_from_the_host(order, policy, core)


@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_that_finds_no_room_on_the_device_is_computed_again(policy, core):
    world = hosted(0, policy, core)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(PAGE, 2))
    world.tier.has_room = False
    world.extend(1000)
    # 0.5.16 evicts and tries once more
    assert (again.exact_start, world.host_hits) == (0, 0) and world.tier.failed in (1, 2)
    world.tier.has_room = True
    world.check_accounts()
    again = world.come_back(again, tokens(9, 3))
    world.extend(1000)
    assert (again.exact_start, world.host_hits) == (4 * PAGE, 1)
    world.tier.device.synchronize()
    world.check_accounts()


@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_flush_forgets_what_both_memories_hold_once_copies_are_done(policy, core):
    refused = 0
    for order in ORDERS:
        world = hosted(order, policy, core)
        again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(PAGE, 2))
        world.extend(1000)
        assert again.exact_start == 3 * PAGE
        if not world.flush(settled=False):
            refused += 1
            assert world.flush()
        assert world.allocator.available_size() == world.pool_pages * PAGE
        assert world.tier.host.available_size() == world.tier.host.size and world.rings.out == 0
        other, again = prefill(world, tokens(3 * PAGE + 5, 3)), prefill(world, tokens(3 * PAGE + 5, 1))
        assert other.exact_start == again.exact_start == 0
        world.decode()
        world.tier.device.synchronize()
        world.check_accounts()
    # of a device that copies last, the copies of what ends are under way
    assert refused or policy == "write_back"


def test_a_layer_that_does_not_wait_for_its_pages_is_found(monkeypatch):
    monkeypatch.setattr(pool.KVarNTokenToKVPool, "layer_cache", lambda self, layer: self._layer_caches[layer])
    with pytest.raises(AssertionError, match="error"):
        for order in ORDERS:
            read_a_prefix_from_the_host(order)


def test_a_layer_that_waits_for_the_pages_of_the_layer_before_it_is_found(monkeypatch):
    def layer_cache(self, layer: int):
        self.layer_transfer_counter and self.layer_transfer_counter.wait_until(0)
        return self._layer_caches[layer]

    monkeypatch.setattr(pool.KVarNTokenToKVPool, "layer_cache", layer_cache)
    with pytest.raises(AssertionError, match="error"):
        for order in ORDERS:
            read_a_prefix_from_the_host(order)


def test_an_exact_start_without_what_the_host_had_is_found(monkeypatch):
    prefix_len = compat.prefix_len
    monkeypatch.setattr(compat, "prefix_len", lambda req: prefix_len(req) - calls.host_hit(req))
    with pytest.raises(AssertionError, match="error"):
        read_a_prefix_from_the_host(0)


def make_a_ring_out_of_what_goes_to_the_host(policy: str, core: str) -> None:
    """The ring takes pages from the prefix cache, which go to host memory that is full of the prefix itself.

    The pages of the prefix there were given away between the moment when the request found them and the moment when
    SGLang loaded them, and the request read what another one had said.
    """
    world = hosted(0, policy, core, pages=3)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(20, 2))
    world.waiting.remove(again)
    running = [prefill(world, tokens(40, seed)) for seed in (3, 4)]
    for seed in range(5, 11):
        world.finish(prefill(world, tokens(3 * PAGE + 5, seed)))
    running.append(prefill(world, tokens(40, 11)))
    assert world.allocator.available_size() < world.rings.tokens_per_ring < world.free_tokens()
    world.waiting.append(again)
    world.extend(1000)
    assert {again, *running} <= set(world.running)
    # with write_through the pages of others went to the host earlier, and took the place there
    assert again.exact_start == world.host_hits * 3 * PAGE
    world.check_accounts()


@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_prefix_in_host_memory_stays_while_memory_is_made_for_the_ring_of_its_request(policy, core):
    make_a_ring_out_of_what_goes_to_the_host(policy, core)


@pytest.mark.parametrize("core", calls.cores)
def test_a_prefix_that_the_ring_of_its_request_drops_from_host_memory_is_found(core, monkeypatch):
    monkeypatch.setattr(compat, "lock_host_prefix", lambda adder, req: nullcontext())
    # 0.5.16 reads the records of another request, 0.5.23 stops the server
    with pytest.raises((AssertionError, KeyError)):
        make_a_ring_out_of_what_goes_to_the_host("write_back", core)


@contextmanager
def copies_on_cpu(name: str, copy: Callable[..., None]) -> Iterator[None]:
    """Let SGLang's own pools in host memory be copied by a function other than that of `host_pools_on_cpu`."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(host_pools_on_cpu, name, copy)
            yield
    finally:
        host_pools_on_cpu.install()


def read_a_prefix_from_the_host_beside(
    order: int | str, policy: str = "write_through", core: str = "python", **layers: int
) -> None:
    """A prompt is found in host memory alone, and so is what other layers keep at its end; so is a branch, later."""
    world = hosted(order, policy, core, **layers)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(PAGE, 2))
    world.extend(1000)
    assert (again.exact_start, world.host_hits) == (3 * PAGE, 1)
    for seed in (3, 4):
        # where there are states, the first one leaves one where both part
        branch = prefill(world, tokens(3 * PAGE, 1)[: 2 * PAGE] + tokens(40, seed))
    assert branch.exact_start == 2 * PAGE
    for _ in range(3):
        world.verify(8, [3]) if world.drafts else world.decode()
    branch = world.come_back(branch, tokens(9, 5))
    world.extend(1000)
    assert branch.exact_start == 2 * PAGE
    world.settle()
    world.check_accounts()


@needs_states
@pytest.mark.parametrize("drafts", [0, 8])
@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_state_from_the_host_is_read_as_one_that_never_left(policy, core, drafts):
    for order in ORDERS:
        read_a_prefix_from_the_host_beside(order, policy, core, states=STATES, drafts=drafts)


def verify_over_a_page(accepted: int, behind: int) -> None:
    """Of 8 drafts over the end of a page some are accepted, and some of these are behind the end of the answer."""
    world = hosted(0, states=STATES, drafts=8)
    request = prefill(world, tokens(2 * PAGE - 4, 1))
    world.verify(8, [accepted])
    world.finish(request, behind)
    world.settle()
    world.check_accounts()
    kept = request.history.tokens[: 2 * PAGE - 4 + accepted - behind]
    following = world.admit([*kept, *tokens(9, 2)], request.salt)
    world.extend(1000)
    # the state at the end of the second page, if the answer reaches it
    assert following.exact_start == (2 * PAGE if accepted - behind >= 4 else PAGE)
    world.settle()
    world.check_accounts()


@needs_states
@pytest.mark.parametrize(("accepted", "behind"), [(1, 0), (3, 0), (4, 0), (8, 0), (8, 2), (8, 4), (8, 6), (8, 7)])
def test_a_state_that_a_verify_step_keeps_is_that_of_the_answer(accepted, behind):
    verify_over_a_page(accepted, behind)


@needs_states
def test_a_state_behind_rejected_drafts_is_found(monkeypatch):
    plan = KeptStates.plan

    def keep_all(self, requests, spans, decoding):
        moves, begun = plan(self, requests, spans, decoding)
        return [replace(move, at=move.after) for move in moves], begun

    monkeypatch.setattr(KeptStates, "plan", keep_all)
    with pytest.raises(AssertionError, match="state"):
        verify_over_a_page(8, 0)


@needs_states
def test_a_layer_beside_states_that_waits_for_its_number_among_those_with_records_is_found(monkeypatch):
    def layer_cache(self, layer: int):
        self.layer_transfer_counter and self.layer_transfer_counter.wait_until(self.layer_ids.index(layer))
        return self._layer_caches[layer]

    monkeypatch.setattr(pool.KVarNTokenToKVPool, "layer_cache", layer_cache)
    with pytest.raises(AssertionError, match="error"):
        for order in ORDERS:
            read_a_prefix_from_the_host_beside(order, states=STATES)


@needs_states
def test_a_state_of_other_tokens_is_found():
    def load(src, dst, src_indices, dst_indices, layer_id, **kwargs):
        dst[dst_indices.long()] = src[src_indices.long() - 1, layer_id, 0]

    with copies_on_cpu("load_layer", load), pytest.raises(AssertionError, match="state of layer"):
        read_a_prefix_from_the_host_beside(0, states=STATES)


def fail_to_load_behind_a_prefix_of_the_device(policy: str, core: str) -> None:
    """Two pages of a prompt are on the device, and a third in host memory, where it stays."""
    world = hosted(0, policy, core, states=STATES)
    prefill(world, tokens(2 * PAGE, 1) + tokens(5, 2))
    leave = prefill(world, tokens(2 * PAGE, 1) + tokens(PAGE + 5, 3))
    again = world.come_back(leave, tokens(9, 4))
    world.tier.has_room = False
    world.extend(1000)
    assert (again.exact_start, world.host_hits, world.tier.failed) == (2 * PAGE, 0, 1)
    world.settle()
    world.check_accounts()


@needs_states
@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_request_whose_load_fails_goes_on_from_the_state_of_the_device(policy, core):
    fail_to_load_behind_a_prefix_of_the_device(policy, core)


@needs_states
@pytest.mark.parametrize("core", calls.cores)
def test_a_request_whose_load_fails_without_a_state_is_found(core, monkeypatch):
    monkeypatch.setattr(compat, "copy_state", lambda *args: None)
    with pytest.raises(AssertionError, match="state of layer"):
        fail_to_load_behind_a_prefix_of_the_device("write_through", core)


@needs_windows
@pytest.mark.parametrize("drafts", [0, 8])
@pytest.mark.parametrize("core", calls.cores)
@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_from_the_host_is_read_as_one_that_never_left(policy, core, drafts):
    for order in ORDERS:
        read_a_prefix_from_the_host_beside(order, policy, core, sliding=SLIDING, drafts=drafts)


@needs_windows
def test_records_beside_windows_that_wait_for_no_load_are_found(monkeypatch):
    name = "register_layer_transfer_counter"
    monkeypatch.setattr(mixed_pool.MixedPool, name, getattr(compat.SWAKVPool, name))
    with pytest.raises(AssertionError, match="error"):
        for order in ORDERS:
            read_a_prefix_from_the_host_beside(order, sliding=SLIDING)


@needs_windows
def test_a_window_of_other_tokens_is_found():
    def load(host, device_pool, host_indices, device_indices, layer_id, io_backend, **kwargs):
        device_pool.k_buffer[layer_id][device_indices.long()] = host.k_data_refs[layer_id][host_indices.long() - 1]

    with copies_on_cpu("load_tokens", load), pytest.raises(AssertionError, match="window of layer"):
        read_a_prefix_from_the_host_beside(0, sliding=SLIDING)


def load_into_a_window_that_drafts_of_a_wasted_step_are_stored_in(order: int | str) -> None:
    """The slots of drafts are free when their request has ended, and a window from the host is loaded into them."""
    world = hosted(order, sliding=SLIDING, drafts=8)
    again = world.come_back(prefill(world, tokens(3 * PAGE + 5, 1)), tokens(20, 2))
    world.waiting.remove(again)
    stay, leave = prefill(world, tokens(40, 3)), prefill(world, tokens(50, 4))
    wasted = world.prepare_verify(8, [1, 1])
    world.launch(wasted)
    ring, written = world.rings.pages[leave.row].tolist(), int(wasted.slides[1].places[-1]) // PAGE
    world.running.remove(leave)
    world.release(leave, insert=True)
    # the page of drafts is the next for a window; those of the ring, which the step writes too, are for no record
    for allocator, first, last in ((world.allocator.swa_attn_allocator, [written], []), (world.paged, [], ring)):
        others = [page for page in allocator.free_pages.tolist() if page not in first + last]
        assert len(first + others + last) == len(allocator.free_pages)
        allocator.free_pages = torch.tensor(first + others + last)
    world.waiting.append(again)
    following = world.allocate_extend(1000)
    places = world.allocator.full_to_swa_index_mapping[world.rows.req_to_token[again.row, : 3 * PAGE].long()]
    assert written in (places // PAGE).tolist(), "a window was loaded into the page"
    world.run(wasted)
    world.run(world.describe_extend(*following))
    assert again.exact_start == 3 * PAGE and {again, stay} <= set(world.running)
    world.settle()
    world.check_accounts()


@needs_windows
def test_a_window_is_loaded_after_drafts_of_a_wasted_step():
    for order in ORDERS:
        load_into_a_window_that_drafts_of_a_wasted_step_are_stored_in(order)


@needs_windows
def test_a_window_that_is_loaded_before_drafts_of_a_wasted_step_is_found(monkeypatch):
    without_fence(monkeypatch, "load")
    with pytest.raises(AssertionError, match="sliding window of layer"):
        for order in ORDERS:
            load_into_a_window_that_drafts_of_a_wasted_step_are_stored_in(order)
