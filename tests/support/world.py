# SPDX-License-Identifier: Apache-2.0
"""SGLang's row pool, allocator and radix tree around our pool and kernels, driven without a scheduler.

The objects and their calls are those of SGLang's scheduler (schedule_batch, allocation, common); what is left
out is the policy, so that a test can take every decision. Every forward pass is checked: the output of every
token, and the memory that the next step would read, against `history`.
"""

from __future__ import annotations

import dataclasses
import random
from array import array
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace

import torch
from builders import poison
from history import HEAD_DIM, KV_HEADS, PAGE, QO_HEADS, SM_SCALE, History, Pages, extend_hash
from host_tier import HostOptions, HostTier, of_layer
from kept_states import LAYERS as STATE_LAYERS
from kept_states import KeptStates, Move
from kept_windows import KeptWindows, Slide, tags_of
from kvarn_kernels.attention import TORCH, TRITON, Attention, Kernels, Limits
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.shape import AttentionShape
from prefix_cache import calls
from sglang_kvarn import admission, compat
from sglang_kvarn.capacity import States
from sglang_kvarn.metadata import DecodeBuffers, extend_batch
from sglang_kvarn.rings import ATTRIBUTE

ROWS, CONTEXT, PADDING = 4, 1024, 2
SHAPE = AttentionShape(QO_HEADS, KV_HEADS, HEAD_DIM, torch.float32)
# pages of the pool besides those of rings
TOKEN_PAGES = 16
# pages for sliding windows, fewer than tokens have, so that the prefix cache loses windows before it loses pages
SLIDING_PAGES = 12
# float32 sums of the torch form against float64 ones; one wrong key among 1,000 is above 1e-3
BOUND = 2e-5
# fp16 operands of the kernels: a score of 10 is off by up to 10 * 2^-11; of each head by itself
KERNEL_BOUND = 1e-2


class PlainDecodeKernel:
    """SGLang's ``alloc_decode_kernel`` in torch: interpreted it takes 5 ms, more than the rest of a step.

    A test holds the two together. SGLang ships the same for the extend kernel, ``alloc_extend_naive``.
    """

    def __getitem__(self, grid):
        return self._run

    @staticmethod
    def _run(seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size):
        fresh = (seq_lens - 1) % page_size == 0
        needed = fresh.cumsum(0)
        # a batch that does not fit is detected after the launch, and its slots are dropped
        pages = torch.cat([free_pages, free_pages.new_zeros(len(seq_lens))])[(needed - 1).clamp(min=0)]
        out_indices.copy_(torch.where(fresh, pages * page_size, last_loc + 1))


class PlainExtendKernel:
    """SGLang's ``alloc_extend_kernel`` as its own torch form."""

    def __getitem__(self, grid):
        return self._run

    @staticmethod
    def _run(prefix_lens, seq_lens, last_loc, free_pages, out_indices, bs_upper, page_size):
        naive = compat.resolve("sglang.srt.mem_cache.allocator.paged.alloc_extend_naive")
        naive(prefix_lens, seq_lens, last_loc, free_pages, out_indices, page_size, out_indices.device)


def use_plain_allocation_kernels(monkeypatch) -> None:
    """Replace the two interpreted kernels of the allocator."""
    paged = compat.resolve("sglang.srt.mem_cache.allocator.paged")
    monkeypatch.setattr(paged, "alloc_decode_kernel", PlainDecodeKernel())
    monkeypatch.setattr(paged, "alloc_extend_kernel", PlainExtendKernel())


@dataclass(eq=False)
class Request:
    """One request: SGLang's Req, and the history that its cache must be equal to.

    Attributes:
        req: SGLang's own request object; salt: what it generates.
        exact_start: tokens that came from the prefix cache when it last got a row; kept by this test alone.
        accepted: new tokens of its newest step; what is behind the first of them may be behind the end of its answer.
    """

    req: object
    history: History
    salt: int
    exact_start: int = 0
    accepted: int = 1

    @property
    def row(self) -> int:
        return calls.row(self.req)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are stored."""
        return calls.committed(self.req)


@dataclass
class Step:
    """A forward pass that was prepared: who, which positions, and the kernels' view of it.

    Attributes:
        spans: new tokens of each request; of a verify step those that will be accepted.
        drafts: tokens of each request in a verify step; what is behind the accepted ones is rejected.
        padding: padded requests.
        consumer: SGLang's number of the loads from host memory that the step waits for, -1 for none.
        new: the rows that it feeds, None until it is launched.
    """

    requests: list[Request]
    spans: list[tuple[int, int]]
    batch: DecodeBatch | ExtendBatch
    padding: int = 0
    drafts: int = 0
    consumer: int = -1
    new: QKV | None = None
    # slots and exact start of each request and pages of its ring as they were when the step was prepared
    slots: list[torch.Tensor] = field(default_factory=list)
    exact_starts: list[int] = field(default_factory=list)
    rings: torch.Tensor | None = None
    # what it does to states, and those from which requests begin
    moves: list[Move] = field(default_factory=list)
    begun: list = field(default_factory=list)
    # and to sliding windows
    slides: list[Slide] = field(default_factory=list)

    @property
    def is_extend(self) -> bool:
        """Whether it is no decode and no verify step, which SGLang runs as graphs."""
        return isinstance(self.batch, ExtendBatch)


class World:
    """Hold the pools of one rank and the requests in them.

    Attributes:
        pool_pages: as many as `rings` rings take, and 16; by default so few that not every row finds a ring.
        checkpoint: tokens between the states of a hybrid model, where a match of the prefix cache may end; 0: anywhere.
        drafts: the most tokens of a request in a verify step; 0: requests decode.
        sliding: tokens before a query in the sliding windows of other layers, which SGLang keeps; 0: none.
        window: tokens in the sliding window of the layers with records, 0 for all.
        host: host memory behind the prefix cache, with two layers instead of one and a device that runs late.
        kept: states of two layers more, None for none; with host memory only, which takes them too.
        windows: of `sliding`, of two layers more with host memory, which takes them too, and of one without.
        waiting, running: requests without and with a row; chunked: the one between two chunks.
        steps, forwards, kernel_forwards: actions and forward passes so far; of these repeated in the kernels.
        host_hits: requests that found some of their prompt in host memory only, and loaded it.
        storage_hits: requests for which some of their prompt was read from files.
        flushes: how often the caches were emptied.
    """

    def __init__(
        self,
        preset: str,
        *,
        poison: bool = True,
        kernels_every: int = 0,
        rings: int = ROWS - 1,
        checkpoint: int = 0,
        drafts: int = 0,
        sliding: int = 0,
        window: int = 0,
        host: HostOptions | None = None,
        states: int = 0,
    ) -> None:
        """Make the pools.

        Args:
            states: that the device has room for, 0 for a model without.
        """
        assert not states or (host and not checkpoint), "what states are tested beside"
        self.config = KVarNConfig.from_preset(preset)
        self.pages = pages_of(self.config)
        each = max(drafts, 1)
        self.pool_pages = TOKEN_PAGES + rings * self.config.ring_pages(HEAD_DIM, SHAPE.dtype.itemsize, each)
        self.poison, self.kernels_every, self.checkpoint, self.drafts = poison, kernels_every, checkpoint, drafts
        self.sliding, self.window = sliding, window
        calls.set_drafts(drafts)
        self.pool = compat.resolve("sglang_kvarn.pool.KVarNTokenToKVPool")(
            self.pool_pages * PAGE,
            SHAPE,
            [1, 3] if host else [0],
            config=self.config,
            rows=ROWS + 1,
            device="cpu",
            draft_tokens=each,
            states=States(states, 1, 3, 1) if states else None,
            sliding_tokens=SLIDING_PAGES * PAGE if sliding else 0,
        )
        self.windows = KeptWindows(self.pool, SLIDING_PAGES, [0, 2] if host else [1], sliding) if sliding else None
        self.kept = KeptStates(states, ROWS, CONTEXT) if states else None
        if self.kept:
            self.rows = self.kept.rows
        else:
            self.rows = compat.resolve("sglang.srt.mem_cache.memory_pool.ReqToTokenPool")(
                size=ROWS, max_context_len=CONTEXT, device="cpu", enable_memory_saver=False
            )
        self.allocator = self._make_allocator()
        # of the records; beside sliding windows one of two
        self.paged = self.allocator.full_attn_allocator if sliding else self.allocator
        make_tree = partial(calls.make_tree, self.rows, self.allocator, sliding=sliding)
        self.tier = HostTier(host, self.pool, make_tree, self.pages) if host else None
        self.tree = self.tier.tree if self.tier else make_tree()
        for kept in (self.kept, self.windows) if host else ():
            if kept:
                kept.attach(self.tree, self.tier.device)
        self.rings = self.pool.rings
        setattr(self.rows, ATTRIBUTE, self.rings)
        self.most_rows = (ROWS + PADDING) * each
        self.buffers = DecodeBuffers(self.most_rows, self.rows.req_to_token, self.rings)
        self.caches: list[LayerCache] = [self.pool.layer_cache(layer) for layer in self.pool.layer_ids]
        self.cache = self.caches[0]
        self.attention = attention_with(TORCH, self.config, self.most_rows, window=window)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.chunked: Request | None = None
        self.steps = self.forwards = self.kernel_forwards = self.admitted = self.host_hits = self.flushes = 0
        self.storage_hits = 0
        self._poisoned: list[int] = []
        self._poison_free_memory()

    def _make_allocator(self):
        if not self.sliding:
            size = self.pool_pages * PAGE
            return compat.PagedTokenToKVPoolAllocator(size, PAGE, torch.uint8, "cpu", self.pool, need_sort=False)
        pool = self.windows.pool
        sizes = (pool.size, pool.size_swa, PAGE, torch.uint8, "cpu", pool)
        return compat.SWATokenToKVPoolAllocator(*sizes, need_sort=False)

    def _poison_free_memory(self) -> None:
        """Fill every free page with NaN, as soon as no prepared step may still write it."""
        if not self.poison:
            return
        if self.tier:
            self.tier.poison()
        free = self.paged.free_pages.tolist()
        if free == self._poisoned:
            return
        self._poisoned = free
        for cache in self.caches:
            cache.records[torch.tensor(free, dtype=torch.int64)] = 0xFF

    def free_tokens(self) -> int:
        """Tokens that can be allocated, evicting the whole tree if need be."""
        if not self.sliding:
            return self.allocator.available_size() + self.tree.evictable_size()
        full = self.allocator.full_available_size() + self.tree.full_evictable_size()
        return min(full, self.allocator.swa_available_size() + self.tree.swa_evictable_size())

    def evict(self, tokens: int) -> None:
        """Drop cached pages that no request uses."""
        self.steps += 1
        self.tree.evict(
            compat.resolve("sglang.srt.mem_cache.base_prefix_cache.EvictParams")(num_tokens=tokens)
        )
        self._poison_free_memory()

    def evict_sliding(self, tokens: int) -> None:
        """Drop sliding windows of cached pages, which stay without them."""
        self.steps += 1
        params = compat.resolve("sglang.srt.mem_cache.base_prefix_cache.EvictParams")
        self.tree.evict(params(swa_num_tokens=tokens))
        self._poison_free_memory()

    def _check_sliding(self) -> None:
        """No page of sliding windows is of two pages of tokens, and rings have none."""
        table = self.allocator.full_to_swa_index_mapping[:-1].view(-1, PAGE)
        pages = table[:, 0] // PAGE
        used = pages[pages > 0].tolist()
        free = self.allocator.swa_attn_allocator.free_pages.tolist()
        assert sorted(used + free) == list(range(1, SLIDING_PAGES + 1)), (used, free)
        rings = [page for request in self.holders() for page in self.rings.pages[request.row].tolist()]
        assert not table[rings].any(), "a ring has a sliding window"
        assert not table[self.paged.free_pages].any(), "a free page has a sliding window"

    def _slides(self, step: Step) -> list[Slide]:
        """Return what a step stores in sliding windows: SGLang has a slot for everything new, rejected drafts too."""
        slides = []
        for request, (start, end) in zip(step.requests, step.spans, strict=True):
            tags = tags_of(request.history.hashes[:end])
            slots = self.rows.req_to_token[request.row, : start + step.drafts if step.drafts else end]
            places = self.allocator.full_to_swa_index_mapping[slots.long()]
            assert places[start:].all(), f"request {request.req.rid}: a new token has no sliding window"
            slides.append(Slide(places, tags, start, request.req.rid))
        return slides

    def _evict_windows(self, requests: list[Request]) -> None:
        """Free what left the sliding windows of requests by the tokens that they have, as SGLang does before a step."""
        for request in requests if self.sliding else ():
            calls.evict_sliding(self.tree, request.req, request.cached)

    def check_accounts(self) -> None:
        """Every page is free, or in the tree, or one request's own, or in its ring; no page is two of these.

        Pages of host memory are free or in the tree, and what the tree has here and there is what it should be.
        """
        free = self.paged.free_pages.tolist()
        if self.sliding:
            self._check_sliding()
        cached = (calls.cached_slots(self.tree)[::PAGE] // PAGE).long().tolist()
        own, in_rings = [], []
        for request in self.holders():
            table = self.rows.req_to_token[request.row, : calls.allocated(request.req) : PAGE] // PAGE
            own += table[calls.protected(request.req) // PAGE :].tolist()
            in_rings += self.rings.pages[request.row].tolist()
        pages = free + cached + own + in_rings
        assert sorted(pages) == list(range(1, self.pool_pages + 1)), (free, cached, own, in_rings)
        assert self.rings.out == len(self.holders()), "a ring is out for every row, and no other"
        if self.tier:
            self.tier.check()
        if self.kept:
            self.kept.check(self.holders() + self.waiting)
        if self.windows:
            self.windows.check(self.tree)

    def holders(self) -> list[Request]:
        """Requests that have a row."""
        return self.running + ([self.chunked] if self.chunked else [])

    def admit(self, tokens: list[int], salt: int = 0) -> Request:
        """Queue a request."""
        self.steps += 1
        self.admitted += 1
        req = compat.resolve("sglang.srt.managers.schedule_batch.Req")(
            rid=str(self.admitted),
            origin_input_text="",
            origin_input_ids=array("q", tokens),
            sampling_params=compat.resolve("sglang.srt.sampling.sampling_params.SamplingParams")(),
        )
        self.waiting.append(Request(req, History(list(tokens), self.pages), salt))
        if self.stores:
            self.tier.storage.folder.sequences.append(self.waiting[-1].history)
        self._seek(self.waiting[-1])
        return self.waiting[-1]

    @property
    def stores(self) -> bool:
        """Whether there are files behind host memory."""
        return self.tier is not None and self.tier.storage is not None

    def _seek(self, request: Request) -> None:
        """Let SGLang look into files for a request that it queues."""
        if self.stores:
            self._limit_to_checkpoints(request.req)
            calls.prefetch(self.tree, request.req)

    def abort_waiting(self, request: Request) -> None:
        """End a request that has no row yet."""
        self.steps += 1
        self.waiting.remove(request)
        if self.stores:
            calls.abort_prefetch(self.tree, request.req)

    def settle(self) -> None:
        """Let the device, and those who read and write files, do all that is queued, and SGLang take notice of it."""
        self.steps += 1
        for _ in range(8):
            self.tier.device.synchronize()
            self._note_copies()

    def release(self, request: Request, *, insert: bool) -> None:
        """Give back row and pages, as a request that finished, was aborted (insert) or is retracted does."""
        calls.release(self.tree, request.req, insert=insert)
        if self.tier:
            calls.flush_copies(self.tree)

    def finish(self, request: Request, behind: int = 0) -> None:
        """End a running request; its pages stay cached.

        Args:
            behind: tokens behind the end of its answer, of those that its newest step accepted; at most all but one.
        """
        self.steps += 1
        self.running.remove(request)
        if behind := min(behind, request.accepted - 1):
            request.req.finished_len = len(request.req.output_ids) - behind
        self.release(request, insert=True)
        self._poison_free_memory()

    def come_back(self, request: Request, more: list[int], *, settled: bool = True) -> Request:
        """End a running request, evict what can be evicted, and let the next turn be the first to wait.

        Args:
            more: tokens of that turn after what the request has said; settled: whether the copies to the host are done
                by then, and known to be.
        """
        self.finish(request)
        if settled:
            self.tier.device.synchronize()
            self._note_copies()
        self.evict(self.pool_pages * PAGE)
        following = self.admit([*request.history.tokens, *more][: CONTEXT - 2 * PAGE], request.salt)
        self.waiting.insert(0, self.waiting.pop())
        return following

    def abort_chunked(self) -> None:
        """End the request that is between two chunks."""
        self.steps += 1
        request, self.chunked = self.chunked, None
        self.release(request, insert=True)
        self._poison_free_memory()

    def flush(self, *, settled: bool = True) -> bool:
        """End every request, then empty the caches as SGLang does on demand; return whether it does.

        It does not while copies are under way; settled: whether they are done by then.
        """
        self.steps += 1
        while self.waiting:
            self.abort_waiting(self.waiting[-1])
        while self.running:
            self.finish(self.running[-1])
        if self.chunked:
            self.abort_chunked()
        if self.tier and settled:
            self.settle()
        self._note_copies()
        if self.tier and calls.copies_run(self.tree):
            return False
        self.tree.reset()
        self.rows.clear()
        self.allocator.clear()
        self.flushes += 1
        self._poison_free_memory()
        return True

    def retract(self, request: Request) -> None:
        """Take a running request back to the queue; it computes its tokens again."""
        self.steps += 1
        self.running.remove(request)
        self.release(request, insert=False)
        request.req.reset_for_retract()
        request.accepted = 1
        self.waiting.insert(0, request)
        self._seek(request)
        self._poison_free_memory()

    def make_room(self, pages: int) -> bool:
        """Retract until pages are free or can be evicted; return whether they are."""
        while self.free_tokens() < pages * PAGE and len(self.running) > 1:
            self.retract(self.running[-1])
        return self.free_tokens() >= pages * PAGE

    def _note_copies(self) -> None:
        """Let SGLang see which copies are done, as its scheduler does before every batch."""
        if self.tier:
            self.tree.check_hicache_events()

    def _evict_for(self, tokens: int) -> None:
        compat.resolve("sglang.srt.mem_cache.common.evict_from_tree_cache")(self.tree, tokens)

    def _allocate_decode(self, requests: list[Request]) -> torch.Tensor:
        rows = torch.tensor([r.row for r in requests])
        lens = torch.tensor([r.cached for r in requests])
        self._evict_windows(requests)
        self._evict_for(len(requests) * PAGE)
        last = self.rows.req_to_token[rows, lens - 1]
        slots = self.allocator.alloc_decode(lens + 1, lens + 1, last)
        assert slots is not None, "make_room comes first"
        self.rows.write((rows, lens), slots.int())
        for request in requests:
            calls.note_decode(request.req)
        return slots

    def prepare_decode(self, padding: int = 0) -> Step:
        """Allocate and describe one decode step of all running requests, padded as a CUDA graph would be."""
        self._note_copies()
        requests = list(self.running)
        slots = self._allocate_decode(requests)
        zeros = torch.zeros(padding, dtype=torch.int64)
        forward_batch = SimpleNamespace(
            batch_size=len(requests) + padding,
            req_pool_indices=torch.cat([torch.tensor([r.row for r in requests]), zeros]),
            seq_lens=torch.cat([torch.tensor([r.cached for r in requests]), zeros + 1]),
            # a graph replay pads every tensor but this one
            out_cache_loc=slots,
        )
        batch = self.buffers.fill(forward_batch)
        spans = [(r.cached - 1, r.cached) for r in requests]
        return self._note(Step(requests, spans, batch, padding=padding))

    def decode(self, padding: int = 0) -> None:
        """Run one decode step of all running requests; retract some first if memory is short."""
        if self.make_room(len(self.running)):
            self.run(self.prepare_decode(padding))

    def _more_for_drafts(self, request: Request) -> int:
        """Return the tokens of the pages that SGLang allocates before a verify step: of twice its drafts."""
        allocated, wanted = (-(-n // PAGE) for n in (calls.allocated(request.req), request.cached + 2 * self.drafts))
        return max(wanted - allocated, 0) * PAGE

    def make_room_for_drafts(self) -> bool:
        """Retract until the drafts of all running requests have room; return whether they have."""
        while self.running:
            needed = sum(map(self._more_for_drafts, self.running))
            if self.free_tokens() >= needed:
                return True
            if len(self.running) == 1:
                return False
            self.retract(self.running[-1])
        return False

    def _allocate_drafts(self, requests: list[Request]) -> None:
        self._evict_windows(requests)
        starts = [calls.allocated(r.req) for r in requests]
        ends = [-(-n // PAGE) * PAGE + self._more_for_drafts(r) for r, n in zip(requests, starts, strict=True)]
        total = sum(ends) - sum(starts)
        self._evict_for(total + len(requests) * PAGE)
        last = self.rows.req_to_token[[r.row for r in requests], [n - 1 for n in starts]]
        before, after = torch.tensor(starts), torch.tensor(ends)
        slots = self.allocator.alloc_extend(before, before, after, after, last.long(), total)
        assert slots is not None, "make_room_for_drafts comes first"
        for request, start, end in zip(requests, starts, ends, strict=True):
            own, slots = slots[: end - start], slots[end - start :]
            self.rows.write((request.row, slice(start, end)), own.int())
            calls.set_allocated(request.req, end)

    def prepare_verify(self, drafts: int, accepted: list[int], padding: int = 0) -> Step:
        """Allocate and describe one verify step of all running requests.

        Args:
            drafts: tokens of each request; accepted: how many of them the target will agree with, at least 1.
        """
        self._note_copies()
        requests = list(self.running)
        self._allocate_drafts(requests)
        zeros = torch.zeros(padding, dtype=torch.int64)
        lens = [r.cached for r in requests]
        windows = [self.rows.req_to_token[r.row, n : n + drafts] for r, n in zip(requests, lens, strict=True)]
        forward_batch = SimpleNamespace(
            batch_size=len(requests) + padding,
            req_pool_indices=torch.cat([torch.tensor([r.row for r in requests]), zeros]),
            seq_lens=torch.cat([torch.tensor(lens), zeros + 1]),
            out_cache_loc=torch.cat(windows).long(),
        )
        batch = self.buffers.fill(forward_batch, drafts)
        spans = []
        for request, start, count in zip(requests, lens, accepted, strict=True):
            for _ in range(start + count - len(request.history.tokens)):
                self._sample(request)
            spans.append((start, start + count))
            request.accepted = count
        return self._note(Step(requests, spans, batch, padding=padding, drafts=drafts))

    def verify(self, drafts: int, accepted: list[int], padding: int = 0) -> None:
        """Run one verify step of all running requests; retract some first if memory is short.

        Args:
            accepted: cycled through the requests, each at most `drafts`.
        """
        if self.make_room_for_drafts():
            each = [accepted[n % len(accepted)] for n in range(len(self.running))]
            self.run(self.prepare_verify(drafts, each, padding))

    def decode_with_wasted_step(self, request: Request, *, reuse: bool, chunk: int = 100) -> None:
        """Decode while the CPU is one step ahead: a request is found finished after the step was launched.

        Row and pages go back to the pools, and with `reuse` a waiting request gets them and rewrites
        req_to_token, all before the launched step runs on the device.
        """
        has_room = self.make_room_for_drafts() if self.drafts else self.make_room(len(self.running))
        if not has_room or request not in self.running:
            return
        if self.drafts:
            wasted = self.prepare_verify(self.drafts, [1] * len(self.running))
        else:
            wasted = self.prepare_decode()
        if self.tier:
            self.launch(wasted)
        self.running.remove(request)
        self.release(request, insert=True)
        if self.tier:
            # so that pages which the step writes are not only those of the next ring
            self.paged.free_pages = self.tier.device.shuffled(self.paged.free_pages)
        following = self.allocate_extend(chunk) if reuse and self.waiting else None
        self.run(wasted)
        if following:
            self.run(self.describe_extend(*following))

    def allocate_extend(self, chunk: int, *, limit: int = 4, mixed: bool = False):
        """Choose up to chunk tokens of new requests (the chunked one first), and allocate rows and pages.

        Returns None if nothing fits, else the arguments of `describe_extend`.
        """
        self._note_copies()
        fresh, budget = [], chunk
        decoding = list(self.running) if mixed else []
        if decoding and not self.make_room(len(decoding)):
            return None
        decoding = list(self.running) if mixed else []
        reserved = len(decoding) * PAGE
        candidates = [self.chunked] if self.chunked else []
        candidates += self.waiting[: self.rows.available_size()][:limit]
        for request in candidates:
            if budget <= 0:
                break
            if self.stores and request is not self.chunked:
                if not calls.prefetched(self.tree, request.req):
                    continue
                self.storage_hits += bool(calls.pop_stored(self.tree, request.req))
            self._limit_to_checkpoints(request.req)
            request.req.init_next_round_input(None if request is self.chunked else self.tree)
            new = self._add(request, fresh, budget, reserved)
            if not new:
                if self.kept and request is not self.chunked:
                    self.kept.release_unadmitted(request.req)
                break
            reserved += new + PAGE
            budget -= new
        if not fresh:
            return None
        consumer = self.tree.ready_to_load_host_cache() if self.tier else -1
        if decoding:
            self._allocate_decode(decoding)
        self._allocate_fresh(fresh)
        return fresh, decoding, consumer

    def _limit_to_checkpoints(self, req) -> None:
        """Let a request find no more of its prompt than a state is kept for, which can be less than its cached pages.

        As in a hybrid model: what follows is computed again on fresh pages, which duplicate those in the tree.
        """
        if not self.checkpoint:
            return
        most, every = type(req)._compute_max_prefix_len, self.checkpoint
        req._compute_max_prefix_len = lambda length: most(req, length) // every * every

    def _add(self, request: Request, fresh: list[Request], budget: int, reserved: int) -> int:
        """Choose a request and its next tokens if they and a ring fit, by the hook on SGLang's PrefillAdder.

        Returns:
            How many tokens, 0 if the request was not chosen.
        """
        continued = request is self.chunked
        adder = SimpleNamespace(tree_cache=self.tree, can_run_list=[])
        lock_node = compat.resolve("sglang.srt.managers.schedule_policy.PrefillAdder")._lock_node
        adder._lock_node = partial(lock_node, adder)
        taken = 0

        def add_one_req(adder, req) -> None:
            nonlocal taken
            with nullcontext() if continued else adder._lock_node(req.last_node):
                hit = calls.host_hit(req) if self.tier and not continued else 0
                new = min(budget, len(request.history.tokens) - calls.prefix_len(req) - hit)
                # SGLang counts every request as if it began a page
                if self.free_tokens() < reserved + hit + new + PAGE:
                    return
                if self.tier and not continued and calls.needs_load(req):
                    self.host_hits += bool(calls.load_back(adder, req))
                    if calls.rejects_after_load and budget < PAGE:
                        return
                start = calls.prefix_len(req)
                taken = min(budget, len(request.history.tokens) - start)
                calls.set_extend_range(req, start, start + taken)
                fresh.append(request)
                adder.can_run_list.append(req)
                if not continued:
                    calls.lock(self.tree, req)

        admission.add_with_ring(add_one_req, adder, request.req)
        return taken

    def _allocate_fresh(self, fresh: list[Request]) -> None:
        for request in fresh:
            if request.row is None:
                request.exact_start = calls.prefix_len(request.req)
                self.waiting.remove(request)
        prefixes = [calls.prefix_slots(self.tree, self.rows, r.req) for r in fresh]
        if self.kept:
            self.kept.make_room([r.req for r in fresh])
        rows = self.rows.alloc([r.req for r in fresh])
        assert rows is not None, "only as many as there are rows are chosen"
        starts, ends = zip(*(calls.extend_range(r.req) for r in fresh), strict=True)
        prefix_lens, seq_lens = torch.tensor(starts), torch.tensor(ends)
        total = sum(ends) - sum(starts)
        self._evict_for(total + len(fresh) * PAGE)
        last = [prefix[-1] if len(prefix) else torch.tensor(-1) for prefix in prefixes]
        slots = self.allocator.alloc_extend(
            prefix_lens, prefix_lens, seq_lens, seq_lens, torch.stack(last).long(), total
        )
        assert slots is not None, "only what fits is chosen"
        done = 0
        for request, prefix, start, end in zip(fresh, prefixes, starts, ends, strict=True):
            self.rows.write((request.row, slice(0, start)), prefix.int())
            own = slots[done : done + end - start].int()
            self.rows.write((request.row, slice(start, end)), own)
            done += end - start
            calls.note_extend(request.req, end)
            request.req.inflight_middle_chunks = int(end < len(request.history.tokens))

    def describe_extend(self, fresh, decoding, consumer) -> Step:
        """Describe an extend step, or a mixed one, when the device comes to it."""
        requests = fresh + decoding
        spans = [calls.extend_range(r.req) for r in fresh] + [(r.cached - 1, r.cached) for r in decoding]
        forward_batch = SimpleNamespace(
            batch_size=len(requests),
            req_pool_indices=torch.tensor([r.row for r in requests]),
            extend_prefix_lens=torch.tensor([start for start, _ in spans]),
            extend_seq_lens=torch.tensor([end - start for start, end in spans]),
            extend_prefix_lens_cpu=[start for start, _ in spans],
            extend_seq_lens_cpu=[end - start for start, end in spans],
        )
        batch = extend_batch(forward_batch, self.rows.req_to_token, self.rings)
        return self._note(Step(requests, spans, batch, consumer=consumer))

    def extend(self, chunk: int, *, limit: int = 4, mixed: bool = False) -> None:
        """Run one extend step if anything fits."""
        allocated = self.allocate_extend(chunk, limit=limit, mixed=mixed)
        for _ in range(2):
            if self.stores and not allocated and self.waiting:
                # time passes while all that wait wait for files: until they are found, and until they are read
                self.tier.device.synchronize()
                allocated = self.allocate_extend(chunk, limit=limit, mixed=mixed)
        if allocated:
            self.run(self.describe_extend(*allocated))

    def _note(self, step: Step) -> Step:
        step.rings = self.rings.pages[[r.row for r in step.requests]].clone()
        step.exact_starts = [r.exact_start for r in step.requests]
        table, rows = self.rows.req_to_token, [r.row for r in step.requests]
        step.slots = [table[row, :end].clone() for row, (_, end) in zip(rows, step.spans, strict=True)]
        if self.kept:
            decoding = [r in self.running for r in step.requests]
            step.moves, step.begun = self.kept.plan(step.requests, step.spans, decoding)
        if self.windows:
            step.slides = self._slides(step)
        return step

    def launch(self, step: Step) -> None:
        """Hand a step to the device, which runs and checks it now, or late if there is host memory."""
        q, k, v = (
            torch.cat(
                [self._rows_of(step, r.history, n, *span) for r, span in zip(step.requests, step.spans, strict=True)]
            )
            for n in "qkv"
        )
        if step.padding:
            # SGLang leaves whatever is in the buffers of padded rows
            padded = step.padding * max(step.drafts, 1)
            q, k, v = (torch.cat([x, x.new_full((padded, *x.shape[1:]), 1e4)]) for x in (q, k, v))
        step.new = QKV(q, k, v)
        if not self.tier:
            for layer in self.windows.layers if self.windows else ():
                self.windows.run(step.slides, layer, self.windows.memory(layer))
            for n, cache in enumerate(self.caches):
                self._forward(step, n, cache)
            return
        layers = {
            layer: (partial(self.pool.layer_cache, layer), partial(self._forward, step, n))
            for n, layer in enumerate(self.pool.layer_ids)
        }
        begin = partial(self.kept.begin, step.begun) if self.kept else lambda: None
        for layer in STATE_LAYERS if self.kept else ():
            layers[layer] = partial(self.rows.mamba2_layer_cache, layer), partial(self.kept.run, step.moves, layer)
        for layer in self.windows.layers if self.windows else ():
            run = partial(self.windows.run, step.slides, layer)
            layers[layer] = partial(self.windows.memory, layer), run
        ordered = [layers[layer] for layer in sorted(layers)]
        self.tier.launch_forward(ordered, step.consumer, graph=not step.is_extend, begin=begin)

    def _forward(self, step: Step, n: int, cache: LayerCache) -> None:
        """Run a layer of a step; check its output and the memory that the next step will read."""
        new = QKV(*(self._of_layer(n, x, 1) for x in (step.new.q, step.new.k, step.new.v)))
        out = attend(self.attention, new, cache, step.batch, self.window)
        self._check(step, self._of_layer(n, out, 1), BOUND)
        for index in range(len(step.requests)):
            self._check_memory(step, index, n)

    def _of_layer(self, n: int, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return what layer n has of this, with the factors of this world."""
        return of_layer(n + (self.tier.factors if self.tier else 0), x, dim)

    def run(self, step: Step) -> None:
        """Run a step on the device, check it, and let SGLang process its result."""
        self.steps += 1
        self.forwards += 1
        before = None
        if self._repeats_in_kernels(step):
            before = dataclasses.replace(self.cache, records=self.cache.records.clone())
        if step.new is None:
            self.launch(step)
        if self.tier:
            self.tier.finish_forward()
        if before:
            self._run_kernels(step, step.new, before)
        self._process(step)
        self._poison_free_memory()

    @staticmethod
    def _rows_of(step: Step, history: History, name: str, start: int, end: int) -> torch.Tensor:
        """Return what a request feeds: its tokens, then drafts that are rejected, which are of nobody's prompt."""
        own = getattr(history, name)[start:end]
        if not step.drafts:
            return own
        # multiples of 25/16: every order of summation rotates them alike, as it does the rows of a history
        rejected = torch.randn(step.drafts - len(own), *own.shape[1:]).mul(64).round().div(64)
        return torch.cat([own, 100 * rejected])

    def _check(self, step: Step, out: torch.Tensor, bound: float) -> None:
        done = 0
        for request, (start, end), exact in zip(step.requests, step.spans, step.exact_starts, strict=True):
            expected = request.history.output(start, end, exact, self.window)
            got = out[done : done + end - start].double()
            done += step.drafts or end - start
            error = (got - expected).square().mean(-1).sqrt() / expected.square().mean(-1).sqrt()
            worst = error.max().item()
            assert worst < bound, f"request {request.req.rid}, positions {start} to {end}: error {worst:.2e}"

    def _check_memory(self, step: Step, index: int, layer: int) -> None:
        """The memory that the request's next step reads is, byte for byte, what its history says."""
        request, (start, end), cache = step.requests[index], step.spans[index], self.caches[layer]
        full = end // PAGE
        if full and (end - start > 1 or end % PAGE < 2 or (start + step.drafts) // PAGE > start // PAGE):
            pages = (step.slots[index][::PAGE] // PAGE)[:full].long()
            wrong = (cache.records[pages] != self._of_layer(layer, request.history.records(full), 1)).flatten(1).any(1)
            assert not wrong.any(), f"request {request.req.rid}: records of pages {wrong.nonzero().tolist()}"
        ring = step.rings[index]
        first = max(step.exact_starts[index], (end // PAGE - self.config.window_pages) * PAGE, 0)
        expected = (request.history.rotated_k, request.history.rotated_v)
        for stored, rows in zip(ring_tokens(cache, ring, first, end), expected, strict=True):
            own = torch.equal(stored, self._of_layer(layer, rows[first:end], 1))
            assert own, f"request {request.req.rid}: ring in pages {ring.tolist()}, positions {first} to {end}"

    def _process(self, step: Step) -> None:
        """Sample a token, put pages into the tree and re-point rows, as SGLang's result processor does."""
        for request, (start, end) in zip(step.requests, step.spans, strict=True):
            if request.row is None:
                continue
            decoded = request in self.running
            if decoded and self.kept:
                self.kept.process(request.req, start, end)
            if step.drafts:
                calls.note_accepted(request.req, end)
            if end == len(request.history.tokens):
                self._sample(request)
            if decoded:
                continue
            self.chunked = None if self.chunked is request else self.chunked
            if request.req.inflight_middle_chunks:
                self.chunked = request
            else:
                self.running.append(request)
            calls.cache_unfinished(self.tree, request.req, chunked=request is self.chunked)
        if self.tier:
            calls.flush_copies(self.tree)

    def _sample(self, request: Request) -> None:
        token = request.history.next_token(request.salt)
        request.req.output_ids.append(token)
        request.history.append([token])

    def _repeats_in_kernels(self, step: Step) -> bool:
        # some of the steps, by what they are, so that a repeated or shortened run takes the same
        what = self._kind_of(step)
        return bool(self.kernels_every) and not self.tier and what % self.kernels_every == 0 and what not in _AGREED

    def _kind_of(self, step: Step) -> int:
        return extend_hash(self.forwards, sum(end for _, end in step.spans) + CONTEXT * ROWS * self.window)

    def _run_kernels(self, step: Step, new: QKV, cache: LayerCache) -> None:
        """Run the step once more, in the interpreted kernels, on the memory as it was before."""
        self.kernel_forwards += 1
        kernels = attention_with(TRITON, self.config, self.most_rows, window=self.window)
        self._check(step, attend(kernels, new, cache, step.batch, self.window), KERNEL_BOUND)
        assert torch.equal(cache.records[1:], self.cache.records[1:]), "pages of kernels and torch form"
        _AGREED.add(self._kind_of(step))


def tokens(count: int, seed: int = 0) -> list[int]:
    """Return random tokens."""
    generator = random.Random(seed)
    return [generator.randrange(1000) for _ in range(count)]


def prefill(world: World, prompt: list[int], salt: int = 0) -> Request:
    """Admit a request and run its prompt; return it."""
    request = world.admit(prompt, salt)
    for _ in range(10):
        if request not in world.running:
            world.extend(1000)
    return request


def attention_with(
    kernels: Kernels, config: KVarNConfig, max_batch: int, max_pages: int = 24, window: int = 0
) -> Attention:
    """Return what runs steps of the model that `history` feeds, with a decode workspace of poison."""
    limits = Limits(max_batch, max_pages, extend_requests=max_batch, chunk_pages=max_pages)
    attention = Attention(SHAPE, config, torch.device("cpu"), limits, kernels, sliding_windows=[window])
    if attention._decode_workspace is not None:
        for workspace in (attention._decode_workspace, *attention._sliding_workspaces.values()):
            poison(workspace)
    return attention


def attend(
    attention: Attention, new: QKV, cache: LayerCache, batch: DecodeBatch | ExtendBatch, window: int = 0
) -> torch.Tensor:
    """Run one step; return its output, NaN where nothing was written."""
    out = torch.full_like(new.q, float("nan"))
    attention.attend(new, out, cache, attention.plan(batch), SM_SCALE, sliding_window=window)
    return out


# steps that the kernels have repeated: many lives begin alike, and a step takes the interpreter seconds
_AGREED: set[int] = set()
_PAGES: dict[str, Pages] = {}


def ring_token(cache: LayerCache, ring: torch.Tensor, position: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of the key and the value at a position in the ring of these pages, each [Hk, D]."""
    size = 2 * cache.head_dim
    tokens = cache.exact.shape[2] // size
    page, place = int(ring[position // tokens % len(ring)]), position % tokens
    token = cache.exact[page, :, place * size : (place + 1) * size]
    return token[:, : cache.head_dim], token[:, cache.head_dim :]


def ring_tokens(cache: LayerCache, ring: torch.Tensor, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values at positions start .. end - 1 of a ring, each [n, Hk, D]."""
    tokens = cache.exact.shape[2] // (2 * cache.head_dim)
    positions = torch.arange(start, end)
    pages = ring[positions // tokens % len(ring)].long()
    # [P, Hk, tokens of a page, 2, D]
    view = cache.exact[..., : tokens * 2 * cache.head_dim].unflatten(2, (tokens, 2, cache.head_dim))
    # [n, Hk, 2, D]
    return tuple(view[pages, :, positions % tokens].unbind(2))


def pages_of(config: KVarNConfig) -> Pages:
    """Return the records that the worlds of a preset have computed so far; they are a function of tokens."""
    return _PAGES.setdefault(config.name, Pages(config))
