# SPDX-License-Identifier: Apache-2.0
"""Copies of pages between a GPU and page-locked memory of its host: our kernel against the copy engines.

    python -m benchmarks.kernels.bench_copy_pages --output benchmarks/results/copy_pages.csv

The pages of --tokens tokens, all layers, scattered over both memories: to the host all layers at once, as HiCache
copies them, and from it layer by layer. "memcpy" copies as many bytes in one piece by the copy engine, "kernel" writes
as a load reads, which a server does not. Every copy is compared with its source before it is timed. --beside
REQUESTSxCONTEXT times a decode layer of that shape while copies run on a stream beside it, against the same layer
alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.shape import AttentionShape
from kvarn_kernels.transfer import copy_pages as module

from benchmarks.common import cli
from benchmarks.common.rows import Figure, Rows
from benchmarks.kernels import decode_providers, timing
from benchmarks.kernels.attention_problem import PAGE
from benchmarks.kernels.decode_problem import Problem, Shape

# copies that are queued before each timed replay: more than it takes
COPIES_BESIDE = 4


class Pages:
    """Hold device and host memory of twice the pages that are copied, and which pages these are.

    Attributes:
        device: uint8 [P, L, row] of a slab whose layers are apart; host: the same with pages apart.
    """

    def __init__(self, layers: int, row_bytes: int, count: int, device: str) -> None:
        slab = torch.randint(256, (layers, 2 * count, row_bytes), dtype=torch.uint8, device=device)
        self.device = slab.transpose(0, 1)
        self.host = torch.zeros(2 * count, layers, row_bytes, dtype=torch.uint8, pin_memory=device == "cuda")
        self.source_pages, self.target_pages = (torch.randperm(2 * count, device=device)[:count] for _ in range(2))
        # as SGLang gives them: of each page the first of its slots
        self.source_slots, self.target_slots = (
            (pages[:, None] * PAGE + torch.arange(PAGE, device=device)).flatten()[::PAGE]
            for pages in (self.source_pages, self.target_pages)
        )
        self.num_bytes = count * layers * row_bytes
        self._write = module.StagedWrite(layers, row_bytes, torch.device(device))
        self._host_slots = self.target_slots.cpu()

    def write(self) -> None:
        """Copy to the host."""
        self._write(self.device, self.host, self.source_slots, self._host_slots, PAGE)

    def write_by_kernel(self, programs: int) -> None:
        """Copy to the host as a load copies."""
        module.copy_pages(self.device, self.host, self.source_slots, self.target_slots, PAGE, programs)

    def load(self, programs: int = module.LOAD_PROGRAMS) -> None:
        """Copy back from it, layer by layer."""
        for n in range(self.device.shape[1]):
            one = slice(n, n + 1)
            host, device = self.host[:, one], self.device[:, one]
            module.copy_pages(host, device, self.target_slots, self.source_slots, PAGE, programs)

    def check(self) -> None:
        """Compare both ways with the source.

        Raises:
            AssertionError: a page differs.
        """
        before = self.device[self.source_pages].cpu()
        self.write()
        _synchronize()
        assert torch.equal(self.host[self.target_pages.cpu()], before), "pages in host memory"
        self.device[self.source_pages] = 0
        self.load()
        _synchronize()
        assert torch.equal(self.device[self.source_pages].cpu(), before), "pages on the device"


def beside(problem: Problem, preset: str, copy: Callable[[], object] | None, repeats: int) -> list[float]:
    """Return microseconds of a decode layer, of CUDA graphs that run while copies do; copy: None for none."""
    (candidate,) = decode_providers.kvarn(problem, preset)
    stream = torch.cuda.Stream()

    def start() -> None:
        if copy is not None:
            with torch.cuda.stream(stream):
                for _ in range(COPIES_BESIDE):
                    copy()

    times = timing.graph_times(candidate, repeats, before=start)
    torch.cuda.synchronize()
    return times


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    parser.add_argument("--layers", type=int, default=36, metavar="N", help="Layers with attention.")
    parser.add_argument("--kv-heads", type=int, default=8, metavar="N", help="KV heads of a rank.")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256), help="Channels of a head.")
    parser.add_argument("--tokens", type=int, default=32_768, metavar="N", help="Tokens whose pages are copied.")
    text = f"Programs of our kernel; each number is measured, a server takes {module.LOAD_PROGRAMS}."
    parser.add_argument("--programs", type=int, nargs="+", default=[8, 16, 32, 64, 132], metavar="N", help=text)
    text = "Also time a decode layer of so many requests x tokens beside copies. Without it none."
    parser.add_argument("--beside", metavar="S", help=text)
    cli.add_preset(parser)
    cli.add_repeats(parser, 7, "Timed copies, whose median counts.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse()
    rows = Rows(args.output, "copy_pages")
    timing.require_gpu("bench_copy_pages")
    row_bytes = args.kv_heads * KVarNConfig.from_preset(args.preset).record_bytes(args.head_dim)
    pages = Pages(args.layers, row_bytes, args.tokens // PAGE, "cuda")
    pages.check()
    one = torch.empty(pages.num_bytes, dtype=torch.uint8, pin_memory=True)
    other = one.to("cuda")
    settings = {"tokens": args.tokens, "layers": args.layers, "kv_heads": args.kv_heads, "head_dim": args.head_dim}

    def report(provider: str, direction: str, run: Callable[[], object], **more: int) -> None:
        times = timing.milliseconds(run, args.repeats, skipped=2)
        taken = Figure.of("time", times, "ms")
        speed = Figure("bandwidth", pages.num_bytes / float(taken.value) / 1e6, "GB/s")
        rows.append(provider, settings | {"direction": direction} | more, [taken, speed])
        print(f"{provider:24} {direction:10} {more} {taken.value:8.2f} ms {speed.value:7.1f} GB/s", flush=True)

    report("memcpy", "write", lambda: one.copy_(other, non_blocking=True))
    report("memcpy", "load", lambda: other.copy_(one, non_blocking=True))
    report(args.preset, "write", pages.write)
    for programs in args.programs:
        report("kernel", "write", partial(pages.write_by_kernel, programs), programs=programs)
        report(args.preset, "load", partial(pages.load, programs), programs=programs)
    if args.beside:
        batch, context = (int(n) for n in args.beside.split("x"))
        shape = AttentionShape(4 * args.kv_heads, args.kv_heads, args.head_dim, torch.bfloat16)
        problem = Problem.make(Shape(batch, context - PAGE // 2, shape))
        settings |= {"batch": batch, "context": context - PAGE // 2}

        def slowed(direction: str, copy: Callable[[], object] | None, **more: int) -> None:
            taken = Figure.of("decode_time", beside(problem, args.preset, copy, args.repeats), "us")
            rows.append(args.preset, settings | {"direction": direction} | more, [taken])
            print(f"decode beside {direction:10} {more} {taken.value:8.2f} us", flush=True)

        slowed("none", None)
        slowed("write", pages.write)
        slowed("memcpy write", lambda: one.copy_(other, non_blocking=True))
        for programs in args.programs:
            slowed("kernel write", partial(pages.write_by_kernel, programs), programs=programs)
            slowed("load", partial(pages.load, programs), programs=programs)
        slowed("none", None)


if __name__ == "__main__":
    main()
