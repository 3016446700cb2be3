# SPDX-License-Identifier: Apache-2.0
"""Random lives of requests in SGLang's pools: every read is what the request's own history says.

A failure prints the seed and a short script of the actions that lead to it. KVARN_FUZZ_SEED repeats a run,
KVARN_FUZZ_STEPS makes it longer, KVARN_FUZZ_SHRINK=0 reports the first failure as it is, and KVARN_FUZZ_HOST=1 gives
every world host memory.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any, ClassVar

import hypothesis
import pytest
import torch
from host_tier import HostOptions
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from prefix_cache import calls
from sglang_kvarn import compat
from storage_tier import DAMAGES, Folder, page_keys
from streams import COPIES_FIRST, FORWARD_FIRST
from world import (
    CONTEXT,
    PAGE,
    ROWS,
    PlainDecodeKernel,
    PlainExtendKernel,
    Request,
    World,
    use_plain_allocation_kernels,
)

# what requests share: segments of a binary tree, by level and branch; ends on, before and behind pages
SEGMENTS = ((256, 130), (127, 128), (129, 40))
TAILS = st.sampled_from((0, 1, 2, 5, 60, 126, 127, 128, 129, 200))
CHUNKS = st.sampled_from((1, 33, 100, 127, 128, 129, 256, 300, 1000))
LONGEST = CONTEXT - PAGE
# pages of host memory; fewer than the tree has at times, and enough
SOME_PAGES = (6, 20, 60)
# or none; KVARN_FUZZ_HOST=1: always some
HOST_PAGES = SOME_PAGES if os.environ.get("KVARN_FUZZ_HOST") == "1" else (0, 0, 6, 40)
# a server that starts again may have another preset, whose files are not its own
OTHER_PRESET = "kvarn_k4v4_g128"


def prompt(branches: list[int], tail: int, author: int) -> list[int]:
    """Return the tokens of a path through the tree and of a tail of its author's own."""
    tokens: list[int] = []
    for level, branch in enumerate(branches):
        generator = random.Random(str(branches[: level + 1]))
        tokens += [generator.randrange(1000) for _ in range(SEGMENTS[level][branch])]
    generator = random.Random(author)
    return tokens + [generator.randrange(1000) for _ in range(tail)] or [7]


class Lives(RuleBasedStateMachine):
    """Take the decisions of a scheduler at random."""

    preset = "kvarn"
    kernels_every = 0
    has_files = has_both = has_states = False
    total: ClassVar[dict[str, int]]

    @initialize(
        poison=st.booleans(),
        checkpoint=st.sampled_from((0, 0, 2 * PAGE)),
        drafts=st.sampled_from((0, 0, 0, 2, 5, 16, 16)),
        # not with files, which are refused beside them; 127 is what SGLang has for a window of a page, as of gpt-oss
        sliding=st.sampled_from((0, 0, 0, 0, 60, 127, 150)),
        # of the layers with records: within a page, over one, and beyond what is exact
        window=st.sampled_from((0, 0, 60, 150, 300)),
        host_pages=st.sampled_from(HOST_PAGES),
        policy=st.sampled_from(("write_through", "write_back", "write_through_selective")),
        core=st.sampled_from(calls.cores),
        order=st.sampled_from((COPIES_FIRST, FORWARD_FIRST)) | st.integers(0, 1 << 16),
        prefetch=st.sampled_from(("wait_complete", "wait_complete", "best_effort")),
        # beside host memory, and not beside files or checkpoints that are none of the prefix tree; three for each row,
        # and few or many for the tree
        states=st.sampled_from((0, 16, 30) if compat.hosts_states() else (0,)),
    )
    def start(
        self,
        poison: bool,
        checkpoint: int,
        drafts: int,
        sliding: int,
        window: int,
        host_pages: int,
        policy: str,
        core: str,
        order: int | str,
        prefetch: str,
        states: int,
    ) -> None:
        if self.has_both:
            sliding, drafts = sliding or PAGE - 1, drafts or 16
        if self.has_states:
            drafts, host_pages, states = drafts or 16, host_pages or SOME_PAGES[-1], states or 30
            sliding = checkpoint = 0
        if self.has_files:
            sliding = 0
        if sliding:
            checkpoint = states = 0
            host_pages = host_pages if compat.hosts_windows() else 0
        if self.has_files and not host_pages:
            host_pages = SOME_PAGES[-1]
        self.files = tempfile.TemporaryDirectory() if self.has_files else None
        folder = Folder(Path(self.files.name)) if self.files else None
        self.host = {"pages": host_pages, "policy": policy, "seed": order, "core": core}
        self.host |= {"folder": folder, "prefetch": prefetch}
        self.options = {"poison": poison, "checkpoint": checkpoint, "drafts": drafts, "sliding": sliding}
        if not host_pages or self.has_files or checkpoint:
            states = 0
        self.options |= {"window": window, "states": states}
        self.begin(self.preset, factors=0)
        if self.files:
            # lives are short, and need something that can be written
            self.world.admit(prompt([0, 0], 60, author=1))
            self.world.extend(1000)
        self.total["worlds with files"] += bool(folder)
        self.total["worlds with host memory"] += bool(host_pages)
        self.total["worlds with checkpoints"] += bool(checkpoint)
        self.total["worlds with drafts"] += bool(drafts)
        self.total["worlds with sliding windows"] += bool(sliding)
        self.total["worlds with drafts beside sliding windows"] += bool(sliding and drafts)
        self.total["worlds with windows in records"] += bool(window)
        self.total["worlds with states"] += bool(states)
        self.total["worlds with drafts beside states"] += bool(states and drafts)
        self.total["worlds"] += 1

    def begin(self, preset: str, factors: int) -> None:
        """Start a server with nothing in its memory."""
        host: dict[str, Any] = self.host | {"factors": factors}
        self.world = World(
            preset,
            kernels_every=self.kernels_every,
            host=HostOptions(**host) if host["pages"] else None,
            **self.options,
        )
        self.flushed = 0

    def count(self) -> None:
        """Add up what a world has done."""
        self.total["steps"] += self.world.steps
        self.total["forwards"] += self.world.forwards
        self.total["host hits"] += self.world.host_hits
        self.total["storage hits"] += self.world.storage_hits
        self.total["failed loads"] += self.world.tier.failed if self.world.tier else 0
        self.total["flushes"] += self.world.flushes
        self.total["kernel forwards"] += self.world.kernel_forwards

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.count()
            if self.files:
                self.files.cleanup()

    def pick(self, index: int):
        return self.world.running[index % len(self.world.running)]

    @precondition(lambda self: len(self.world.waiting) < 6)
    @rule(
        branches=st.lists(st.integers(0, 1), max_size=3),
        tail=TAILS,
        author=st.integers(0, 3),
        salt=st.integers(0, 1),
        copies=st.integers(1, 2),
    )
    def admit(self, branches: list[int], tail: int, author: int, salt: int, copies: int) -> None:
        for _ in range(copies):
            self.world.admit(prompt(branches, tail, author), salt)

    @precondition(lambda self: self.world.waiting or self.world.chunked)
    @rule(chunk=CHUNKS, limit=st.integers(1, ROWS), mixed=st.booleans())
    def extend(self, chunk: int, limit: int, mixed: bool) -> None:
        # SGLang mixes no chunk with requests that verify drafts
        self.world.extend(chunk, limit=limit, mixed=mixed and not self.world.drafts)

    @precondition(lambda self: self.world.running and not self.world.drafts)
    @rule(steps=st.sampled_from((1, 2, 3, 10, 30, 130)), padding=st.integers(0, 2))
    def decode(self, steps: int, padding: int) -> None:
        for _ in range(steps):
            if any(len(r.history.tokens) >= LONGEST for r in self.world.running):
                break
            self.world.decode(padding)

    @precondition(lambda self: self.world.running and self.world.drafts)
    @rule(
        steps=st.sampled_from((1, 2, 10, 40)),
        # first what is drawn most: all that the world has
        drafts=st.sampled_from((16, 5, 4, 2, 1)),
        accepted=st.lists(st.integers(1, 16), min_size=1, max_size=7),
        padding=st.integers(0, 2),
    )
    def verify(self, steps: int, drafts: int, accepted: list[int], padding: int) -> None:
        """Verify chains whose length may change from step to step, and of which any number is accepted."""
        drafts = min(drafts, self.world.drafts)
        counts = [min(count, drafts) for count in accepted]
        for step in range(steps):
            if any(len(r.history.tokens) + drafts >= LONGEST for r in self.world.running):
                break
            self.world.verify(drafts, counts[step % len(counts) :] + counts[: step % len(counts)], padding)

    @precondition(lambda self: self.world.running and self.world.drafts)
    @rule(
        pages=st.integers(1, 3),
        accepted=st.lists(st.integers(1, 16), min_size=1, max_size=4),
        padding=st.integers(0, 2),
    )
    def verify_over_pages(self, pages: int, accepted: list[int], padding: int) -> None:
        """Accept all drafts, but where those of some request reach into its next page: there, so many of them."""
        drafts, counts = self.world.drafts, [min(count, self.world.drafts) for count in accepted]
        # few drafts would take most of all steps
        for _ in range(min(pages * PAGE // drafts, 40)):
            if any(len(r.history.tokens) + drafts >= LONGEST for r in self.world.running):
                break
            is_over = any(r.cached % PAGE + drafts > PAGE for r in self.world.running)
            self.world.verify(drafts, counts if is_over else [drafts], padding)

    @precondition(lambda self: self.world.running and not self.world.drafts)
    @rule(to=st.sampled_from((-1, 0, 1)), padding=st.integers(0, 2))
    def decode_to_a_page(self, to: int, padding: int) -> None:
        """Decode until some request is at a page boundary, one before or one behind it."""
        for _ in range(PAGE):
            if any(len(r.history.tokens) >= LONGEST for r in self.world.running):
                break
            self.world.decode(padding)
            if any((r.cached - to) % PAGE == 0 for r in self.world.running):
                break

    @precondition(lambda self: self.world.running)
    @rule(index=st.integers(0, ROWS - 1), behind=st.sampled_from((0, 0, 1, 4, 15)))
    def finish(self, index: int, behind: int) -> None:
        # of drafts that were accepted some may be behind the end of the answer
        self.world.finish(self.pick(index), behind)

    @precondition(lambda self: self.world.running)
    @rule(index=st.integers(0, ROWS - 1), reuse=st.booleans(), chunk=CHUNKS)
    def finish_with_a_wasted_step(self, index: int, reuse: bool, chunk: int) -> None:
        self.world.decode_with_wasted_step(self.pick(index), reuse=reuse, chunk=chunk)

    @precondition(lambda self: self.world.running)
    @rule(index=st.integers(0, ROWS - 1))
    def retract(self, index: int) -> None:
        self.world.retract(self.pick(index))

    @precondition(lambda self: self.world.chunked)
    @rule()
    def abort_between_two_chunks(self) -> None:
        self.world.abort_chunked()

    # seldom: what runs ends by it
    @precondition(lambda self: self.world.steps - self.flushed > 60)
    @rule(settled=st.booleans())
    def flush(self, settled: bool) -> None:
        """Empty the caches, or try to while copies are under way."""
        self.world.flush(settled=settled)
        self.flushed = self.world.steps

    @rule(pages=st.integers(1, 14))
    def evict(self, pages: int) -> None:
        self.world.evict(pages * PAGE)

    @precondition(lambda self: self.world.sliding)
    @rule(pages=st.integers(1, 12))
    def evict_sliding(self, pages: int) -> None:
        self.world.evict_sliding(pages * PAGE)

    @precondition(lambda self: self.world.tier and self.world.running)
    @rule(
        index=st.integers(0, ROWS - 1),
        settled=st.booleans(),
        tail=TAILS,
        chunk=st.sampled_from((0, 100, 1000)),
        has_room=st.booleans(),
    )
    def come_back_from_the_host(self, index: int, settled: bool, tail: int, chunk: int, has_room: bool) -> None:
        """End a request, evict all that can be evicted, and let its next turn come."""
        # of those that leave something in the prefix cache, if there are any
        long = [request for request in self.world.running if request.cached >= PAGE] or self.world.running
        self.world.come_back(long[index % len(long)], [7] * tail, settled=settled)
        if chunk:
            self.world.tier.has_room = has_room
            self.world.extend(chunk)
            self.world.tier.has_room = True

    @precondition(lambda self: self.world.tier and self.world.running and not self.world.drafts)
    @rule(index=st.integers(0, ROWS - 1), reuse=st.booleans())
    def finish_as_a_page_fills(self, index: int, reuse: bool) -> None:
        """End a request whose last page is filled, and goes to the host, by the step that was launched already."""
        request = self.pick(index)
        for _ in range(PAGE):
            if request not in self.world.running or request.cached % PAGE == PAGE - 1:
                break
            self.world.decode()
        if request in self.world.running:
            self.world.decode_with_wasted_step(request, reuse=reuse, chunk=1000)

    @precondition(lambda self: self.world.tier and len(self.world.running) > 1)
    @rule(index=st.integers(0, ROWS - 1), other=st.integers(0, ROWS - 1), tail=TAILS)
    def come_back_while_a_step_is_wasted(self, index: int, other: int, tail: int) -> None:
        """Load a prompt while the step of a request that has ended still runs."""
        self.world.come_back(self.pick(index), [7] * tail)
        self.world.decode_with_wasted_step(self.pick(other), reuse=True, chunk=1000)

    @precondition(lambda self: self.world.waiting)
    @rule(index=st.integers(0, 7))
    def abort_while_waiting(self, index: int) -> None:
        """End a request that has no row, and may wait for files."""
        self.world.abort_waiting(self.world.waiting[index % len(self.world.waiting)])

    @precondition(lambda self: self.world.stores)
    @rule(index=st.integers(0, 40), way=st.sampled_from((*DAMAGES, "wiped")), settled=st.booleans())
    def damage_files(self, index: int, way: str, settled: bool) -> None:
        """Damage a file, or delete all of them; settled: after what is queued was written."""
        if settled:
            self.world.settle()
        folder = self.world.tier.storage.folder
        if way == "wiped":
            folder.wipe()
        elif names := folder.names():
            folder.damage(names[index % len(names)], way)

    @precondition(lambda self: self.world.stores and self.world.running)
    @rule(index=st.integers(0, ROWS - 1), tail=TAILS, settled=st.booleans(), chunk=CHUNKS)
    def come_back_to_a_server_with_its_files(self, index: int, tail: int, settled: bool, chunk: int) -> None:
        """Let the next turn come to a server that starts when the files of the last one are written."""
        left = self.end(index, written=True)
        self.start_again(self.preset, 0)
        self.go_on(left, tail, settled=settled, chunk=chunk)

    @precondition(lambda self: self.world.stores and self.world.running)
    @rule(
        index=st.integers(0, ROWS - 1),
        change=st.sampled_from(("preset", "factors", "unwritten", "damaged")),
        way=st.sampled_from(DAMAGES),
        page=st.integers(0, 2),
        tail=TAILS,
        settled=st.booleans(),
        chunk=CHUNKS,
    )
    def come_back_to_a_server_without_some(
        self, index: int, change: str, way: str, page: int, tail: int, settled: bool, chunk: int
    ) -> None:
        """As before, but the server has another preset or other factors, or a page is damaged, or not written yet."""
        left = self.end(index, written=change != "unwritten")
        storage = self.world.tier.storage
        files = {key + storage.suffix for key in page_keys(left.history.tokens)}
        if change == "damaged" and (found := sorted(files & set(storage.folder.names()))):
            storage.folder.damage(found[page % len(found)], way)
        self.start_again(OTHER_PRESET if change == "preset" else self.preset, int(change == "factors"))
        self.go_on(left, tail, settled=settled, chunk=chunk)

    def end(self, index: int, *, written: bool) -> Request:
        """End a request, one with full pages if there is one; written: wait until they are in files."""
        long = [request for request in self.world.running if request.cached >= PAGE] or self.world.running
        left = long[index % len(long)]
        self.world.finish(left)
        if written:
            # with write_back a page is written when it is evicted
            self.world.settle()
            self.world.evict(self.world.pool_pages * PAGE)
            self.world.settle()
        return left

    def start_again(self, preset: str, factors: int) -> None:
        """Start another server on the same files; what runs and waits is lost."""
        self.count()
        self.begin(preset, factors)

    def go_on(self, left: Request, tail: int, *, settled: bool, chunk: int) -> None:
        """Let the next turn of a request come; settled: what is in files is read before it is asked for again."""
        self.world.admit([*left.history.tokens, *[7] * tail][: CONTEXT - 2 * PAGE], left.salt)
        if settled:
            self.world.settle()
        self.world.extend(chunk)

    def check_invariants(self, *args, **kwargs) -> None:
        """Every page has one owner; requests that get too long end. Not an invariant, which a script would list."""
        super().check_invariants(*args, **kwargs)
        if hasattr(self, "world"):
            for request in list(self.world.running):
                if len(request.history.tokens) >= LONGEST:
                    self.world.finish(request)
            self.world.check_accounts()


OPTIONS = settings(
    max_examples=30,
    # short lives are short scripts
    stateful_step_count=30,
    deadline=None,
    database=None,
    print_blob=False,
    phases=(Phase.generate, Phase.shrink)
    if os.environ.get("KVARN_FUZZ_SHRINK") != "0"
    else (Phase.generate,),
    suppress_health_check=list(HealthCheck),
)


def fuzz(preset: str, steps: int, seed: int, kernels_every: int = 0, **always: bool) -> dict[str, int]:
    """Run lives until so many steps are done; return the counts.

    Args:
        always: `has_files`: every world has host memory, and files behind it; `has_both`: drafts and sliding windows;
            `has_states`: drafts and states.
    """
    kinds = ("worlds", "worlds with checkpoints", "worlds with drafts", "worlds with host memory", "worlds with files")
    kinds += ("worlds with sliding windows", "worlds with windows in records", "worlds with states")
    kinds += ("worlds with drafts beside sliding windows", "worlds with drafts beside states")
    events = ("host hits", "storage hits", "failed loads", "flushes")
    total = dict.fromkeys(("steps", "forwards", "kernel forwards", *events, *kinds), 0)
    chosen = {"preset": preset, "total": total, "kernels_every": kernels_every, **always}
    machine = type("Lives", (Lives,), chosen)
    while total["steps"] < steps:
        print(f"KVARN_FUZZ_SEED={seed} {preset}", flush=True)
        run_state_machine_as_test(hypothesis.seed(seed)(machine), settings=OPTIONS)
        seed += 1
    return total


def fuzz_until(event: str, preset: str, steps: int, seed: int, **options) -> dict[str, int]:
    """Run `fuzz`, and three times as many steps of another seed where the event did not happen, as with some seeds."""
    total = fuzz(preset, steps, seed, **options)
    if not total[event]:
        more = fuzz(preset, 3 * steps, seed + 1_000_003, **options)
        total = {name: count + more[name] for name, count in total.items()}
    return total


def test_kernels_agree_on_a_page_that_rejected_drafts_fill(monkeypatch):
    use_plain_allocation_kernels(monkeypatch)
    world = World("kvarn", drafts=2)
    world.admit(prompt([], PAGE - 2, author=1))
    world.extend(PAGE)
    # the next step is repeated in the kernels
    world.kernels_every = 1
    world.verify(2, [1])
    assert world.kernel_forwards == 1


# 10,000 steps take minutes on a busy machine
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_every_read_is_of_the_requests_own_history(preset, monkeypatch, record_property):
    use_plain_allocation_kernels(monkeypatch)
    seed = int(os.environ.get("KVARN_FUZZ_SEED", random.randrange(1 << 30)))
    steps = int(os.environ.get("KVARN_FUZZ_STEPS", 10_000))
    started = time.monotonic()
    total = fuzz_until("host hits", preset, steps, seed, kernels_every=1500)
    total["per second"] = round(total["steps"] / (time.monotonic() - started))
    print(f"{preset}: {total}")
    for name, count in total.items():
        record_property(name, count)
    assert total["steps"] >= steps
    if steps >= 3000:
        assert total["host hits"], "no request found its prompt in host memory"


@pytest.mark.skipif(not calls.stores, reason="storage is refused in this SGLang")
@pytest.mark.timeout(1800)
def test_every_read_is_of_the_requests_own_history_with_files_behind_host_memory(monkeypatch, record_property):
    use_plain_allocation_kernels(monkeypatch)
    seed = int(os.environ.get("KVARN_FUZZ_SEED", random.randrange(1 << 30)))
    steps = int(os.environ.get("KVARN_FUZZ_STEPS", 1000))
    total = fuzz_until("storage hits", "kvarn", steps, seed, has_files=True)
    print(f"with files: {total}")
    for name, count in total.items():
        record_property(name, count)
    assert total["steps"] >= steps
    if steps >= 1000:
        assert total["storage hits"], "no request found its prompt in files"


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("always", "beside"),
    [
        ("has_both", "sliding windows"),
        pytest.param(
            *("has_states", "states"),
            marks=pytest.mark.skipif(not compat.hosts_states(), reason="refused in this SGLang"),
        ),
    ],
)
def test_every_read_is_of_the_requests_own_history_with_drafts_beside(always, beside, monkeypatch, record_property):
    use_plain_allocation_kernels(monkeypatch)
    seed = int(os.environ.get("KVARN_FUZZ_SEED", random.randrange(1 << 30)))
    steps = int(os.environ.get("KVARN_FUZZ_STEPS", 1000))
    total = fuzz("kvarn", steps, seed, **{always: True})
    print(f"drafts beside {beside}: {total}")
    for name, count in total.items():
        record_property(name, count)
    assert total["steps"] >= steps and total[f"worlds with drafts beside {beside}"] == total["worlds"]


def test_plain_allocation_kernels_are_sglangs():
    """The two stand-ins give the slots of SGLang's kernels."""
    paged = compat.resolve("sglang.srt.mem_cache.allocator.paged")
    free = torch.randperm(20) + 1
    generator = random.Random(0)
    for _ in range(20):
        seq_lens = torch.tensor([generator.choice((1, 2, 128, 129, 130, 256, 257)) for _ in range(4)])
        last = torch.tensor([(21 + n) * PAGE + (int(s) - 2) % PAGE for n, s in enumerate(seq_lens)])
        expected, got = (torch.full((4,), -7) for _ in range(2))
        paged.alloc_decode_kernel[(4,)](seq_lens, last, free, expected, 4, PAGE)
        PlainDecodeKernel()[(4,)](seq_lens, last, free, got, 4, PAGE)
        assert torch.equal(got, expected)
        new = torch.tensor([generator.choice((1, 60, 127, 128, 129, 300)) for _ in range(4)])
        prefix_lens = seq_lens - 1
        sizes = (prefix_lens, prefix_lens + new, last)
        expected, got = (torch.full((int(new.sum()),), -7) for _ in range(2))
        paged.alloc_extend_kernel[(4,)](*sizes, free, expected, 4, PAGE)
        PlainExtendKernel()[(4,)](*sizes, free, got, 4, PAGE)
        assert torch.equal(got, expected)
