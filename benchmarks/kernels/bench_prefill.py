# SPDX-License-Identifier: Apache-2.0
"""Prefill attention of one layer: KVarN on FlashAttention 3 (FA3), FlashInfer and Triton against a bf16 cache.

    python -m benchmarks.kernels.bench_prefill --output benchmarks/results/prefill.csv

One request adds NEW tokens to a prefix that is in the cache; with three numbers several requests do, each to its own.
KVarN's time is what a layer really runs: rotate, encode of the pages that fill up, attention with everything around it,
ring store; its parts are listed. The time of a baseline, FlashInfer or the FA3 of sgl_kernel, is the paged attention
alone, over pages of 128 tokens in random order.
Times are medians of CUDA events with a cold L2, the host ahead of the device; `host_time` is what the host needs to
issue a layer, `plan_time` to plan a step (once for all layers). A provider whose check against float32 attention of a
few queries fails prints no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense

from benchmarks.common import cli
from benchmarks.common.rows import Figure, Rows
from benchmarks.kernels import prefill_providers, timing
from benchmarks.kernels.attention_problem import DEVICE, Candidate, heads, shape_settings
from benchmarks.kernels.prefill_problem import Problem, Shape

SHAPES = ["2048x0", "8192x0", "256x8192", "512x8192", "1024x8192", "2048x8192", "2048x32768", "2048x98304"]
# extend_sm90.cu
SHORT = "short"
KERNELS = [*extend_dense.LIBRARIES, "triton", SHORT]
# of FlashInfer; SGLang's FA3 has no backends
SGLANG_FA3, BACKENDS = "sglang_fa3", ["auto", "fa2", "fa3"]


def providers(args: argparse.Namespace) -> dict[str, Callable[[Problem], list[Candidate]]]:
    """Return the chosen providers, baselines first."""
    chosen: dict[str, Callable[[Problem], list[Candidate]]] = {}
    for backend in args.baselines:
        if backend == SGLANG_FA3:
            chosen[timing.BASELINE] = prefill_providers.fa3_bf16
            continue
        chosen[f"flashinfer_bf16_{backend}"] = lambda problem, backend=backend: prefill_providers.flashinfer_bf16(
            problem, backend
        )
    for preset in args.presets:
        for name in args.kernels:
            dense = name if name in extend_dense.LIBRARIES else ""
            if name == "triton" or not KVarNConfig.from_preset(preset).fixed_order:
                chosen[f"{preset}_{name}"] = lambda problem, p=preset, d=dense, s=name == SHORT: (
                    prefill_providers.kvarn(problem, p, d, short=s)
                )
    return chosen


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem, dict[str, Any]]]:
    """Return each shape's name, problem and settings."""
    chosen = heads(args)
    for text in args.shapes:
        *requests, new, prefix = (int(n) for n in text.split("x"))
        shape = Shape(new, prefix, chosen, *requests)
        settings = {"requests": shape.requests} if requests else {}
        yield text, Problem.make(shape), settings | {"new": new, "prefix": prefix} | shape_settings(chosen)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    text = "New tokens x tokens in the cache, or requests x both."
    cli.add_layer(parser, SHAPES, text, 9, "Timed layers, whose median counts.")
    text = f"What attends in a preset's cache, none or several: {', '.join(KERNELS)}."
    parser.add_argument("--kernels", nargs="*", default=KERNELS, choices=KERNELS, metavar="K", help=text)
    names = [SGLANG_FA3, *BACKENDS]
    text = f"What attends over a bf16 cache, SGLang's FA3 or backends of FlashInfer: {', '.join(names)}."
    parser.add_argument("--baselines", nargs="*", default=[SGLANG_FA3], choices=names, metavar="B", help=text)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    rows = Rows(args.output, "prefill")
    timing.require_gpu("bench_prefill")
    flush = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)

    def measure(problem: Problem) -> timing.Measure:
        def of(candidate: Candidate) -> list[Figure]:
            figures = timing.cold_times(candidate, args.repeats, flush)
            return [*figures, Figure("speed", problem.shape.flops / float(figures[0].value) / 1e6, "TFLOP/s")]

        return of

    timing.compare(problems(args), providers(args), measure, rows, args)


if __name__ == "__main__":
    main()
