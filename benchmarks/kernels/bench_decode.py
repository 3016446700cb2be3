# SPDX-License-Identifier: Apache-2.0
"""Decode attention of one layer: KVarN against FA3, FlashInfer (bf16, fp8), SGLang's Triton kernel and copy bandwidth.

    python -m benchmarks.kernels.bench_decode --output benchmarks/results/decode.csv
    python -m benchmarks.kernels.bench_decode --verify 4 --output benchmarks/results/verify.csv

Every provider answers the same queries over the same context in the same process, baselines first. KVarN's time is
what a layer really runs: rotate + store + encode-if-full, attention over records and ring, merge + rotate back. Times
are medians of CUDA-graph replays over enough layers that the cache is larger than the L2. A provider whose check
against float32 attention fails prints no time.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks.common import cli
from benchmarks.common.rows import Figure, Rows
from benchmarks.kernels import decode_providers, parts, timing
from benchmarks.kernels.attention_problem import PAGE, Candidate, heads, shape_settings
from benchmarks.kernels.decode_problem import Problem, Shape

SHAPES = ["64x16384", "32x32768", "8x32768", "1x131072", "1x32768", "64x1024"]


def providers(args: argparse.Namespace) -> dict[str, Callable[[Problem], list[Candidate]]]:
    """Return the chosen providers, baselines first."""
    chosen = {name: make for name, make in decode_providers.BASELINES.items() if name in args.baselines}
    for preset in args.presets:
        for part in ["", *(parts.DECODE if args.parts else [])]:
            name = f"{preset} {part}".rstrip()
            chosen[name] = lambda problem, preset=preset, part=part: decode_providers.kvarn(problem, preset, part)
    return chosen


def problems(args: argparse.Namespace) -> Iterator[tuple[str, Problem, dict[str, Any]]]:
    """Return each shape's name, problem and settings."""
    chosen = heads(args)
    for text in args.shapes:
        batch, context = (int(n) for n in text.split("x"))
        shape = Shape(batch, context if args.page_full else context - PAGE // 2, chosen, args.verify)
        settings = {"batch": batch, "context": shape.context, "drafts": args.verify}
        yield text, Problem.make(shape), settings | shape_settings(chosen)


def measure(candidate: Candidate, repeats: int, bandwidth: float) -> list[Figure]:
    """Return the time of a layer and, of a whole one, what it reads and the share of the copy bandwidth."""
    taken = Figure.of("time", timing.graph_times(candidate, repeats), "us")
    if not candidate.bytes:
        return [taken]
    speed = candidate.bytes / float(taken.value) / 1e3
    return [
        *(taken, Figure("bytes", candidate.bytes, "bytes"), Figure("bandwidth", speed, "GB/s")),
        Figure("copy_share", speed * 1e9 / bandwidth),
    ]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    cli.add_layer(
        parser, SHAPES, "Requests x tokens of their context.", 20, "Timed replays of the graph, whose median counts."
    )
    text = "Verify so many drafts of each request instead of decoding one token."
    parser.add_argument("--verify", type=int, default=1, metavar="D", help=text)
    names = list(decode_providers.BASELINES)
    text = f"What to compare with, none or several: {', '.join(names)}."
    parser.add_argument("--baselines", nargs="*", default=names, choices=names, metavar="B", help=text)
    parser.add_argument("--parts", action="store_true", help="Also time the three parts of a layer of each preset.")
    parser.add_argument(
        "--page-full",
        action="store_true",
        help="Let the new token fill a page of every request, which the step encodes.",
    )
    args = parser.parse_args(arguments)
    if args.verify > 1:
        args.baselines = [name for name in args.baselines if name in decode_providers.VERIFY_BASELINES]
    return args


def main() -> None:
    args = parse()
    rows = Rows(args.output, "decode")
    timing.require_gpu("bench_decode")
    bandwidth = timing.copy_bandwidth()
    print(f"{rows.provenance['device']}: device copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    timing.compare(
        problems(args),
        providers(args),
        lambda problem: lambda candidate: measure(candidate, args.repeats, bandwidth),
        rows,
        args,
    )


if __name__ == "__main__":
    main()
