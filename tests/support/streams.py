# SPDX-License-Identifier: Apache-2.0
"""Streams and events of a device that is late: what is queued runs in any order that they allow.

On a CPU torch's streams and events do nothing, and every copy is done when its call returns. `Device` takes the place
of the module (`torch.cuda`) from which SGLang takes them. A stream is a queue of operations; an event that is recorded
is a mark in a queue; a stream that waits for an event stands still until the mark is reached. Which of the streams that
could go on does go on is random, so a copy that waits for too little overtakes what it should have waited for.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

COPIES_FIRST, FORWARD_FIRST = "copies first", "forward first"
# operations that run on their own after one was queued
_HEADWAY = (0, 0, 0, 0, 1, 3, 100)


@dataclass(eq=False)
class Mark:
    """A place in a queue; reached when all before it has run."""

    reached: bool = False


@dataclass(eq=False)
class Operation:
    """Work of the device.

    Attributes:
        kind: what it is; pages: the ids that it will write, of host memory or of the device by its kind.
    """

    run: Callable[[], None]
    kind: str
    pages: frozenset[int] = frozenset()


@dataclass(eq=False)
class Wait:
    """Stand still until a mark of another queue is reached."""

    mark: Mark


class Event:
    """As torch.cuda.Event: waits concern the last recording before the wait."""

    def __init__(self, device: Device, enable_timing: bool = False) -> None:
        self._device = device
        self._mark: Mark | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Mark what is queued on a stream, the current one by default."""
        self._mark = (stream or self._device.current_stream()).mark()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream, the current one by default, stand still until the event."""
        (stream or self._device.current_stream()).wait_event(self)

    def query(self) -> bool:
        """Return whether the event was reached; one that was never recorded was."""
        return self._mark is None or self._mark.reached

    def synchronize(self) -> None:
        """Let the device run until the event."""
        if self._mark is not None:
            self._device.run_until(self._mark)

    def elapsed_time(self, other: Event) -> float:
        """Return some milliseconds."""
        return 1.0


@dataclass(eq=False)
class Stream:
    """As torch.cuda.Stream.

    Attributes:
        computes: whether forward passes run here.
    """

    device: Device
    computes: bool = False
    queue: deque = field(default_factory=deque)

    def mark(self) -> Mark:
        """Return a mark behind all that is queued."""
        self.queue.append(Mark())
        mark = self.queue[-1]
        self.device.settle()
        return mark

    def wait_event(self, event: Event) -> None:
        """Stand still until the event's last recording."""
        if event._mark is not None:
            self.queue.append(Wait(event._mark))
            self.device.settle()

    def wait_stream(self, other: Stream) -> None:
        """Stand still until all that is queued on another stream has run."""
        self.queue.append(Wait(other.mark()))
        self.device.settle()

    def record_event(self, event: Event | None = None) -> Event:
        """Mark what is queued."""
        event = event or self.device.Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the device run until all that is queued here has run."""
        self.device.run_until(self.mark())


class Device:
    """A device of several streams, and what SGLang takes from `torch.cuda` for it.

    Attributes:
        schedule: the stream that is current outside of any other.
        seed: of the order in which streams go on, or COPIES_FIRST or FORWARD_FIRST: these go on as early as they may,
            and the others only when they must.
    """

    # SGLang names it in warnings
    __name__ = "streams"

    def __init__(self, seed: int | str) -> None:
        self._first = seed if isinstance(seed, str) else None
        self._random = random.Random(seed)
        self._streams: list[Stream] = []
        self.schedule = self.Stream()
        self._current = [self.schedule]
        # the order in which streams that could go on do so
        self._order: list[Stream] = []
        self._runs = False

    def Stream(self, *args, computes: bool = False, **kwargs) -> Stream:
        """Return a further stream."""
        self._streams.append(Stream(self, computes))
        return self._streams[-1]

    def Event(self, *args, **kwargs) -> Event:
        """Return an event that was not recorded yet."""
        return Event(self)

    def current_stream(self) -> Stream:
        """Return the stream on which is queued."""
        return self._current[-1]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        """Make a stream the current one."""
        self._current.append(stream)
        try:
            yield
        finally:
            self._current.pop()

    def launch(self, run: Callable[[], None], kind: str, pages: frozenset[int] = frozenset()) -> None:
        """Queue an operation on the current stream; by chance, some of what is queued runs now."""
        self.current_stream().queue.append(Operation(run, kind, pages))
        if self._runs:
            # an operation that launches others ends first
            return
        if self._first:
            while self._advance([stream for stream in self._streams if self._is_first(stream)]):
                pass
            return
        self._shuffle()
        for _ in range(self._random.choice(_HEADWAY)):
            if not self._advance(self._order):
                break

    def delay(self, owner: Any, name: str, kind: str) -> None:
        """Let every call of a method be an operation of the stream that is current then."""
        method = getattr(owner, name)
        setattr(owner, name, lambda *args, **kwargs: self.launch(partial(method, *args, **kwargs), kind))

    def shuffled(self, pages: torch.Tensor) -> torch.Tensor:
        """Return pages in an order that the seed decides."""
        return pages[self._random.sample(range(len(pages)), len(pages))]

    def pending(self, kind: str) -> set[int]:
        """Return the pages that operations of a kind are still to write."""
        items = (item for stream in self._streams for item in stream.queue if isinstance(item, Operation))
        return {page for item in items if item.kind == kind for page in item.pages}

    def is_idle(self) -> bool:
        """Return whether nothing is queued."""
        return not any(stream.queue for stream in self._streams)

    def run_until(self, mark: Mark) -> None:
        """Run operations, not only those that the mark waits for, until it is reached."""
        self._shuffle()
        while not mark.reached:
            assert self._advance(self._order), "a stream waits for what never comes"

    def synchronize(self) -> None:
        """Run all that is queued."""
        self._shuffle()
        while self._advance(self._order):
            pass

    def settle(self) -> None:
        """Pass all marks and waits that can be passed."""
        passed = True
        while passed:
            passed = False
            for stream in self._streams:
                while stream.queue and self._passes(stream.queue[0]):
                    stream.queue.popleft()
                    passed = True

    @staticmethod
    def _passes(item: object) -> bool:
        if isinstance(item, Mark):
            item.reached = True
            return True
        return isinstance(item, Wait) and item.mark.reached

    def _shuffle(self) -> None:
        self._order = self._random.sample(self._streams, len(self._streams))
        if self._first:
            self._order.sort(key=self._is_first, reverse=True)

    def _is_first(self, stream: Stream) -> bool:
        return stream.computes == (self._first == FORWARD_FIRST)

    def _advance(self, streams: list[Stream]) -> bool:
        """Run the first operation of the first of these streams that can go on; return whether there was one."""
        for stream in streams:
            if stream.queue and isinstance(stream.queue[0], Operation):
                self._runs = True
                try:
                    stream.queue.popleft().run()
                finally:
                    self._runs = False
                self.settle()
                return True
        return False
