# SPDX-License-Identifier: Apache-2.0
"""Times of candidates on a GPU, and the loop that checks, measures, prints and writes them."""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.common.rows import Figure, Rows
from benchmarks.kernels.attention_problem import DEVICE, Candidate, check

# what stock SGLang runs on Hopper
BASELINE = "fa3_bf16"
SPEEDUP_OVER = "speedup_over_"
SPEEDUP = SPEEDUP_OVER + BASELINE
# cycles, some milliseconds, in which the host gets ahead of the device
SLEEP = 5 * 10**6


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def graph_times(candidate: Candidate, repeats: int, before: Callable[[], object] | None = None) -> list[float]:
    """Return microseconds of one layer, one number per replay of a CUDA graph over all layers.

    Args:
        before: starts what is to run beside a replay.
    """
    for layer in range(candidate.layers):
        candidate.run(layer)
    torch.cuda.synchronize()
    rounds = max(1, 8 // candidate.layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for layer in range(candidate.layers):
                candidate.run(layer)
    times = []
    for n in range(repeats + 3):
        start, end = _events()
        if before is not None:
            before()
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if n >= 3:
            times.append(start.elapsed_time(end) * 1e3 / (rounds * candidate.layers))
    return times


def cold_times(candidate: Candidate, repeats: int, flush: torch.Tensor) -> list[Figure]:
    """Return the time of layer 0 with a cold L2 and the host ahead, of the host, of a plan, and of each part.

    Args:
        flush: a tensor larger than the L2, overwritten.
    """
    times, host, plans = [], [], []
    parts: dict[str, list[float]] = {}
    for n in range((2 if candidate.timed else 1) * repeats + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        candidate.plan()
        plans.append((time.perf_counter() - begin) * 1e6)
        flush.zero_()
        torch.cuda._sleep(SLEEP)
        if n >= repeats + 2:
            assert candidate.timed is not None, "parts are measured after the layers"
            with candidate.timed() as events:
                candidate.run(0)
            torch.cuda.synchronize()
            for part, pairs in events.items():
                parts.setdefault(part, []).append(sum(a.elapsed_time(b) for a, b in pairs) * 1e3)
            continue
        start, end = _events()
        start.record()
        begin = time.perf_counter()
        candidate.run(0)
        spent = (time.perf_counter() - begin) * 1e6
        end.record()
        torch.cuda.synchronize()
        if n >= 2:
            times.append(start.elapsed_time(end) * 1e3)
            host.append(spent)
    found = [Figure.of("time", times, "us"), Figure.of("host_time", host, "us"), Figure.of("plan_time", plans, "us")]
    return found + [Figure.of(f"{part}_time", values, "us") for part, values in parts.items()]


def copy_bandwidth() -> float:
    """Return bytes per second of a device copy, read and written bytes counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.numel() / (statistics.median(milliseconds(lambda: target.copy_(source), 8)) * 1e-3)


def milliseconds(run: Callable[[], object], repeats: int, skipped: int = 0) -> list[float]:
    """Return the time of each of so many calls by CUDA events, after calls that are skipped."""
    times = []
    for _ in range(skipped + repeats):
        start, end = _events()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return times[skipped:]


# from a candidate to its figures, the time first
Measure = Callable[[Candidate], list[Figure]]


def fastest(name: str, candidates: Iterable[Candidate], measure: Measure, checked: bool) -> list[Figure] | None:
    """Return the figures of the fastest candidate of a provider; None, and a line on stderr, if a check is red."""
    best: list[Figure] | None = None
    for candidate in candidates:
        error = None
        if checked and candidate.expected is not None:
            error = check(candidate)
            if not error < candidate.tolerance:
                print(f"{name}: relative error {error:.2e} above {candidate.tolerance:.0e}, not timed", file=sys.stderr)
                return None
        figures = measure(candidate)
        if error is not None:
            figures.append(Figure("relative_error", error))
        if best is None or figures[0].value < best[0].value:
            best = figures
    return best


def compare(
    problems: Iterable[tuple[str, Any, dict[str, Any]]],
    providers: dict[str, Callable[[Any], list[Candidate]]],
    measure: Callable[[Any], Measure],
    rows: Rows,
    args: argparse.Namespace,
) -> None:
    """Measure every provider on every problem, print a line each and append its rows.

    Args:
        problems: what a line calls it, the problem, the settings of its rows.
        providers: by name, baselines first.
        measure: of a problem.
    """
    for text, problem, settings in problems:
        baseline: float | None = None
        for name, make in providers.items():
            try:
                figures = fastest(f"{text} {name}", make(problem), measure(problem), args.check)
            except ImportError as error:
                print(f"{name}: not importable here ({error})", file=sys.stderr)
                continue
            torch.cuda.empty_cache()
            if figures is None:
                continue
            taken = float(figures[0].value)
            if name.startswith(BASELINE):
                baseline = min(taken, baseline or taken)
            if baseline is not None:
                figures.append(Figure(SPEEDUP, baseline / taken))
            said = "  ".join(f"{f.metric} {float(f.value):.4g}{f' {f.unit}' if f.unit else ''}" for f in figures)
            print(f"{text:>11} {name:24} {said}", flush=True)
            rows.append(name, settings, figures)


def require_gpu(script: str) -> None:
    """End a script that measures GPU times on a machine without one."""
    if DEVICE.type != "cuda":
        raise SystemExit(f"{script} needs a CUDA device; on a CPU run the tests instead")
