# SPDX-License-Identifier: Apache-2.0
"""Prefill attention of one layer: KVarN on FlashInfer and on Triton against FlashInfer over a bf16 cache.

    python -m benchmarks.kernels.bench_prefill --output benchmarks/results/prefill.csv

One request adds NEW tokens to a prefix that is in the cache. KVarN's time is what a layer really runs: rotate, encode
of the pages that fill up, attention with everything around it, ring store; its parts are listed. FlashInfer's time is
the paged attention alone, over pages of 128 tokens in random order. Times are medians of CUDA events with a cold L2,
the host ahead of the device; `host_time` is what the host needs to issue a layer, `plan_time` to plan a step (once for
all layers). A provider whose check against float32 attention of a few queries fails prints no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig

from benchmarks.common import cli
from benchmarks.common.rows import Figure, Rows
from benchmarks.kernels import prefill_providers, timing
from benchmarks.kernels.attention_problem import DEVICE, Candidate, heads, shape_settings
from benchmarks.kernels.prefill_problem import Problem, Shape

SHAPES = ["2048x0", "8192x0", "256x8192", "512x8192", "1024x8192", "2048x8192", "2048x32768", "2048x98304"]
KERNELS, BACKENDS = ["flashinfer", "triton"], ["auto", "fa2", "fa3"]


def providers(args: argparse.Namespace) -> dict[str, Callable[[Problem], list[Candidate]]]:
    """Return the chosen providers, baselines first."""
    chosen: dict[str, Callable[[Problem], list[Candidate]]] = {}
    for backend in args.baselines:
        chosen[f"{timing.BASELINE}_{backend}"] = lambda problem, backend=backend: prefill_providers.flashinfer_bf16(
            problem, backend
        )
    for preset in args.presets:
        for name in args.kernels:
            dense = name == "flashinfer"
            if not (dense and KVarNConfig.from_preset(preset).fixed_order):
                chosen[f"{preset}_{name}"] = lambda problem, p=preset, d=dense: prefill_providers.kvarn(problem, p, d)
    return chosen


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem, dict[str, Any]]]:
    """Return each shape's name, problem and settings."""
    chosen = heads(args)
    for text in args.shapes:
        new, prefix = (int(n) for n in text.split("x"))
        yield text, Problem.make(Shape(new, prefix, chosen)), {"new": new, "prefix": prefix} | shape_settings(chosen)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    cli.add_layer(parser, SHAPES, "New tokens x tokens in the cache.", 9, "Timed layers, whose median counts.")
    text = "What attends in a preset's cache, none or both: flashinfer, triton."
    parser.add_argument("--kernels", nargs="*", default=KERNELS, choices=KERNELS, metavar="K", help=text)
    text = f"Backends of FlashInfer over a bf16 cache, none or several: {', '.join(BACKENDS)}."
    parser.add_argument("--baselines", nargs="*", default=["fa2", "fa3"], choices=BACKENDS, metavar="B", help=text)
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
