# SPDX-License-Identifier: Apache-2.0
"""Run kernels of a step beside each other."""

from __future__ import annotations

from collections.abc import Callable

import torch

Launches = Callable[[], None]


class SideStreams:
    """Streams of a device on which short kernels run while a long one has the current stream."""

    def __init__(self, device: torch.device, count: int) -> None:
        self._streams = [torch.cuda.Stream(device) for _ in range(count)]
        self._begin = torch.cuda.Event()
        self._ends = [torch.cuda.Event() for _ in range(count)]

    def run(self, long: Launches, *short: Launches) -> None:
        """Launch each of `short` on a stream of its own, then `long` on the current stream, which then waits for them.

        The short ones are launched first, so that their blocks are the first to get multiprocessors.
        """
        current = torch.cuda.current_stream()
        self._begin.record(current)
        for launch, stream, end in zip(short, self._streams[: len(short)], self._ends, strict=False):
            stream.wait_event(self._begin)
            with torch.cuda.stream(stream):
                launch()
            end.record(stream)
        long()
        for end in self._ends[: len(short)]:
            current.wait_event(end)


def run_in_turn(long: Launches, *short: Launches) -> None:
    """Launch the same on the current stream."""
    for launch in (*short, long):
        launch()
