# SPDX-License-Identifier: Apache-2.0
"""Prefill attention of one layer: KVarN on FlashInfer and on Triton against FlashInfer over a bf16 cache.

    python benchmarks/bench_prefill.py --csv benchmarks/results/prefill.csv

One request adds NEW tokens to a prefix that is in the cache. KVarN's time is what a layer really runs: rotate, encode
of the pages that fill up, attention with everything around it, ring store; its parts are listed. FlashInfer's time is
the paged attention alone, over pages of 128 tokens in random order. Times are medians of CUDA events with a cold L2,
the host ahead of the device; `host_us` is what the host needs to issue a layer, `plan_us` to plan a step (once for all
layers). A provider whose check against float32 attention of a few queries fails prints no time.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flashinfer
import torch
from bench_decode import versions
from kvarn_kernels import encode, ops, prefill, reference, rotate, store
from kvarn_kernels.cache import ExtendBatch, LayerCache
from kvarn_kernels.config import KVarNConfig, preset_names
from rows import append, check_columns

PAGE = 128
DEVICE = torch.device("cuda")
SHAPES = ["2048x0", "8192x0", "256x8192", "512x8192", "1024x8192", "2048x8192", "2048x32768", "2048x98304"]
PARTS = ["rotate", "encode", "dequantise", "attention", "merge", "store"]
COLUMNS = [
    "gpu", "torch", "triton", "sglang", "flashinfer", "commit", "provider", "new", "prefix", "qo_heads", "kv_heads",
    "head_dim", "dtype", "median_us", "p20_us", "p80_us", "tflops", "ratio_to_flashinfer_bf16", "host_us", "plan_us",
    *(f"{part}_us" for part in PARTS), "relative_error",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Shape:
    """One problem: a request with `new` tokens after `prefix` cached ones."""

    new: int
    prefix: int
    qo_heads: int
    kv_heads: int
    head_dim: int

    @property
    def seq_len(self) -> int:
        return self.prefix + self.new

    @property
    def pages(self) -> int:
        return -(-self.seq_len // PAGE)

    @property
    def flops(self) -> int:
        """Multiplications and additions of the scores that causality leaves, and of their values."""
        keys = self.new * self.prefix + self.new * (self.new + 1) // 2
        return 4 * keys * self.qo_heads * self.head_dim


@dataclasses.dataclass
class Problem:
    """Inputs of all providers; the prefix repeats a few distinct pages."""

    shape: Shape
    q: torch.Tensor  # [new, Hq, D]
    k: torch.Tensor  # [seq_len, Hk, D]
    v: torch.Tensor
    page_of: torch.Tensor  # [prefix pages], page of the distinct ones that each repeats
    distinct: tuple[torch.Tensor, torch.Tensor]  # [U, G, Hk, D]
    page_table: torch.Tensor  # int32 [1, pages], physical pages in random order, from 1 on

    @classmethod
    def make(cls, shape: Shape, distinct: int = 64) -> Problem:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=DEVICE).bfloat16()

        assert shape.prefix % PAGE == 0, "a prefix of whole pages"
        page_of = torch.randint(distinct, (shape.prefix // PAGE,), generator=generator, device=DEVICE)
        pages = [draw(distinct, PAGE, shape.kv_heads, shape.head_dim) for _ in range(2)]
        k, v = (
            torch.cat([x[page_of].flatten(0, 1), draw(shape.new, shape.kv_heads, shape.head_dim)]) for x in pages
        )
        order = torch.randperm(shape.pages, generator=generator, device=DEVICE) + 1
        q = draw(shape.new, shape.qo_heads, shape.head_dim)
        return cls(shape, q, k, v, page_of, (pages[0], pages[1]), order.int()[None])

    def samples(self) -> list[int]:
        """Return the queries that a check computes."""
        return sorted({0, min(PAGE + 1, self.shape.new - 1), self.shape.new // 2, self.shape.new - 1})

    def attend(self, query: int, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return float32 attention of one query to keys and values [N, Hk, D]: [Hq, D]."""
        group = self.shape.qo_heads // self.shape.kv_heads
        q = self.q[query].float().unflatten(0, (-1, group))
        scores = torch.einsum("hgd,thd->hgt", q, k.float()) * self.shape.head_dim**-0.5
        return torch.einsum("hgt,thd->hgd", scores.softmax(-1), v.float()).flatten(0, 1)


@dataclasses.dataclass
class Candidate:
    """A provider made ready.

    Attributes:
        plan: prepares a step; run: one layer, writes out.
        expected: attention of one query.
        timed: context manager in which parts of a layer are measured; it yields name -> list of event pairs.
    """

    plan: Callable[[], None]
    run: Callable[[], None]
    out: torch.Tensor
    expected: Callable[[int], torch.Tensor]
    timed: Callable[[], Any] | None = None


def flashinfer_bf16(problem: Problem, backend: str) -> Candidate:
    shape = problem.shape
    caches = []
    for x in (problem.k, problem.v):
        cache = torch.zeros(shape.pages + 1, PAGE, shape.kv_heads, shape.head_dim, dtype=x.dtype, device=DEVICE)
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, shape.pages * PAGE - shape.seq_len))
        cache[problem.page_table[0].long()] = padded.unflatten(0, (-1, PAGE))
        caches.append(cache)
    scratch = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=backend)
    out = torch.empty_like(problem.q)

    def plan() -> None:
        wrapper.plan(
            torch.tensor([0, shape.new], dtype=torch.int32),
            torch.tensor([0, shape.pages], dtype=torch.int32),
            problem.page_table[0],
            torch.tensor([(shape.seq_len - 1) % PAGE + 1], dtype=torch.int32),
            shape.qo_heads,
            shape.kv_heads,
            shape.head_dim,
            PAGE,
            causal=True,
            q_data_type=problem.q.dtype,
        )

    def expected(query: int) -> torch.Tensor:
        end = shape.prefix + query + 1
        return problem.attend(query, problem.k[:end], problem.v[:end])

    return Candidate(plan, lambda: wrapper.run(problem.q, tuple(caches), out=out), out, expected)


def _filled_cache(problem: Problem, config: KVarNConfig) -> LayerCache:
    """Return a cache that holds the prefix: its records, and its last tokens in the ring of row 1."""
    shape = problem.shape
    records = torch.zeros(
        shape.pages + 1, shape.kv_heads, config.record_bytes(shape.head_dim), dtype=torch.uint8, device=DEVICE
    )
    rotated = [reference.rotate(x).bfloat16().transpose(1, 2) for x in problem.distinct]
    encoded = torch.cat(
        [reference.encode_tile(k, v, config) for k, v in zip(*(x.split(16) for x in rotated), strict=True)]
    )
    records[problem.page_table[0, : len(problem.page_of)].long()] = encoded[problem.page_of]
    rings = []
    for x in (problem.k, problem.v):
        ring = torch.zeros(2, config.ring_len, *x.shape[1:], dtype=x.dtype, device=DEVICE)
        positions = torch.arange(max(0, shape.prefix - config.ring_len), shape.prefix, device=DEVICE)
        ring[1, positions % config.ring_len] = reference.rotate(x[positions]).to(x.dtype)
        rings.append(ring)
    return LayerCache(records, *rings)


@contextmanager
def _timed(workspace: prefill.PrefillWorkspace) -> Iterator[dict[str, list]]:
    """Measure the parts of the layers that run inside."""
    events: dict[str, list] = {part: [] for part in PARTS}

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            result = function(*args, **kwargs)
            pair[1].record()
            events[part].append(pair)
            return result

        return call

    places = [
        (rotate, "rotate_chunk", "rotate"),
        (encode, "encode_from_chunk", "encode"),
        (store, "store_extend", "store"),
        (prefill, "dequantise", "dequantise"),
        (prefill, "merge_parts", "merge"),
        *((wrapper, "run", "attention") for wrapper in workspace.wrappers),
    ]
    saved = [(place, name, getattr(place, name)) for place, name, _ in places]
    try:
        for place, name, part in places:
            setattr(place, name, timed(part, getattr(place, name)))
        yield events
    finally:
        for place, name, function in saved:
            setattr(place, name, function)


def kvarn(problem: Problem, preset: str, form: str) -> Candidate:
    shape, config = problem.shape, KVarNConfig.from_preset(preset)
    cache, out = _filled_cache(problem, config), torch.empty_like(problem.q)

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    batch = ExtendBatch(
        rows=torch.tensor([1], device=DEVICE),
        prefix_lens=int32(shape.prefix),
        seq_lens=int32(shape.seq_len),
        qo_indptr=int32(0, shape.new),
        page_table=problem.page_table,
        exact_starts=int32(0),
        prefix_lens_host=[shape.prefix],
        seq_lens_host=[shape.seq_len],
    )
    workspace = None
    if form == "flashinfer":
        heads = (shape.qo_heads, shape.kv_heads, shape.head_dim)
        workspace = prefill.make_workspace(*heads, problem.q.dtype, 2 * shape.pages, DEVICE)

    def plan() -> None:
        nonlocal batch
        if workspace is not None:
            planned = prefill.plan_prefill(workspace, batch.prefix_lens_host, batch.seq_lens_host, config)
            batch = dataclasses.replace(batch, prefill=planned)

    def run() -> None:
        # only the first run finds the prefix in the ring; that is the one that is checked
        k, v = problem.k[shape.prefix :], problem.v[shape.prefix :]
        ops.extend_attention(problem.q, k, v, out, cache, batch, config, shape.head_dim**-0.5)

    def expected(query: int) -> torch.Tensor:
        position = shape.prefix + query
        exact = max(position // PAGE - config.window_pages, 0)
        records = cache.records[problem.page_table[0, :exact].long()].transpose(0, 1)
        past = torch.empty(2, exact * PAGE, *problem.k.shape[1:], device=DEVICE)
        for first in range(0, exact, 64):
            decoded = reference.decode_tile(records[:, first : first + 64], config, shape.head_dim)
            for x, side in zip(decoded, past, strict=True):
                tokens = reference.rotate(x).flatten(1, 2).transpose(0, 1)
                side[first * PAGE : first * PAGE + len(tokens)] = tokens
        rest = slice(exact * PAGE, position + 1)
        return problem.attend(
            query, torch.cat([past[0], problem.k[rest].float()]), torch.cat([past[1], problem.v[rest].float()])
        )

    timed = None if workspace is None else lambda: _timed(workspace)
    return Candidate(plan, run, out, expected, timed)


def check(candidate: Candidate, problem: Problem) -> float:
    """Return the relative RMS error of a few queries."""
    candidate.out.fill_(float("nan"))
    candidate.plan()
    candidate.run()
    torch.cuda.synchronize()
    queries = problem.samples()
    expected = torch.stack([candidate.expected(query) for query in queries])
    return ((candidate.out[queries].float() - expected).norm() / expected.norm()).item()


def measure(candidate: Candidate, rounds: int, flush: torch.Tensor) -> tuple[list[float], float, float, dict]:
    """Return (sorted microseconds of a layer, host microseconds of a layer, of a plan, microseconds by part)."""
    times, host, plans, parts = [], [], [], {part: [] for part in PARTS}
    for n in range((2 if candidate.timed else 1) * rounds + 2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        candidate.plan()
        plans.append((time.perf_counter() - begin) * 1e6)
        flush.zero_()
        # some milliseconds of sleep, so that the host is ahead
        torch.cuda._sleep(5 * 10**6)
        if n >= rounds + 2:
            assert candidate.timed is not None, "parts are measured after the layers"
            with candidate.timed() as events:
                candidate.run()
            torch.cuda.synchronize()
            for part, pairs in events.items():
                parts[part].append(sum(a.elapsed_time(b) for a, b in pairs) * 1e3)
        else:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            begin = time.perf_counter()
            candidate.run()
            spent = (time.perf_counter() - begin) * 1e6
            end.record()
            torch.cuda.synchronize()
            if n >= 2:
                times.append(start.elapsed_time(end) * 1e3)
                host.append(spent)
    medians = {f"{part}_us": statistics.median(values) for part, values in parts.items() if values}
    return sorted(times), statistics.median(host), statistics.median(plans), medians


def providers(args: argparse.Namespace) -> dict[str, Callable[[Problem], Candidate]]:
    """Return the chosen providers, baselines first."""
    chosen: dict[str, Callable[[Problem], Candidate]] = {}
    for backend in args.baselines:
        chosen[f"flashinfer_bf16_{backend}"] = lambda problem, backend=backend: flashinfer_bf16(problem, backend)
    for preset in args.presets:
        for form in args.forms:
            if form == "triton" or not KVarNConfig.from_preset(preset).is_canonical:
                chosen[f"{preset}_{form}"] = lambda problem, p=preset, f=form: kvarn(problem, p, f)
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="NEWxPREFIX, default: %(default)s")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads, default %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--presets", nargs="*", default=["kvarn"], choices=preset_names())
    parser.add_argument("--forms", nargs="*", default=["flashinfer", "triton"], choices=["flashinfer", "triton"])
    parser.add_argument("--baselines", nargs="*", default=["fa2", "fa3"], choices=["auto", "fa2", "fa3"])
    parser.add_argument("--rounds", type=int, default=9, help="timed layers, default %(default)s")
    parser.add_argument("--no-check", dest="check", action="store_false", help="time without checking first")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    check_columns(args.csv, COLUMNS)
    if not torch.cuda.is_available():
        raise SystemExit("bench_prefill.py needs a CUDA device; on a CPU run the tests instead")
    common = versions()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    qo_heads, kv_heads = (int(n) for n in args.heads.split("/"))
    rows = []
    for text in args.shapes:
        new, prefix = (int(n) for n in text.split("x"))
        shape = Shape(new, prefix, qo_heads, kv_heads, args.head_dim)
        problem = Problem.make(shape)
        bar = None
        for name, make in providers(args).items():
            candidate = make(problem)
            error = check(candidate, problem) if args.check else float("nan")
            if args.check and not error < 1e-2:
                print(f"{text} {name}: relative error {error:.2e} above 1e-2, not timed", file=sys.stderr)
                continue
            times, host, plan, parts = measure(candidate, args.rounds, flush)
            median = statistics.median(times)
            if name.startswith("flashinfer"):
                bar = median if bar is None else min(bar, median)
            rows.append(
                common
                | {
                    "provider": name, "new": new, "prefix": prefix, "qo_heads": qo_heads, "kv_heads": kv_heads,
                    "head_dim": args.head_dim, "dtype": "bfloat16", "median_us": median,
                    "p20_us": times[len(times) // 5], "p80_us": times[len(times) * 4 // 5],
                    "tflops": shape.flops / median / 1e6, "host_us": host, "plan_us": plan, "relative_error": error,
                    "ratio_to_flashinfer_bf16": median / bar if bar else "",
                }
                | parts
            )  # fmt: skip
            listed = " ".join(f"{part} {parts[f'{part}_us']:.0f}" for part in PARTS if f"{part}_us" in parts)
            print(
                f"{text:>11} {name:22} {median:9.1f} us {shape.flops / median / 1e6:5.0f} TFLOP/s "
                f"{f'{median / bar:5.2f}x' if bar else '     -'} host {host:5.0f} plan {plan:5.0f} "
                f"error {error:.1e} {listed}",
                flush=True,
            )
            del candidate
            torch.cuda.empty_cache()
    if args.csv:
        append(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
