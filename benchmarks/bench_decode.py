# SPDX-License-Identifier: Apache-2.0
"""Decode attention of one layer: KVarN against FA3, FlashInfer (bf16, fp8), SGLang's Triton kernel and copy bandwidth.

    python benchmarks/bench_decode.py --csv benchmarks/results/decode.csv

Every provider answers the same queries over the same context in the same process, baselines first. KVarN's time is
what a layer really runs: rotate + store + encode-if-full, attention over records and ring, merge + un-rotate. Times
are medians of CUDA-graph replays over enough layers that the cache is larger than the L2. A provider whose check
against float64 attention fails prints no time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from kvarn_kernels import ops, reference
from kvarn_kernels.cache import DecodeBatch, LayerCache
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.decode import decode, make_workspace
from kvarn_kernels.merge import merge
from kvarn_kernels.store import store_decode
from rows import append, check_columns, commit

PAGE = 128
DEVICE = torch.device("cuda")
# rotate + store + encode-if-full, attention over records and ring, merge + un-rotate
PARTS = ["store", "attend", "merge"]
SHAPES = ["64x16384", "32x32768", "8x32768", "1x131072", "1x32768", "64x1024"]
COLUMNS = [
    "gpu", "torch", "triton", "sglang", "flashinfer", "commit", "provider", "batch", "context", "qo_heads", "kv_heads",
    "head_dim", "dtype", "median_us", "p20_us", "p80_us", "bytes", "gb_per_s", "copy_share", "ratio_to_flashinfer_bf16",
    "relative_error",
]  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """One decode problem: batch requests of context tokens each (the new one included)."""

    batch: int
    context: int
    qo_heads: int
    kv_heads: int
    head_dim: int

    @property
    def pages(self) -> int:
        return -(-self.context // PAGE)

    def layers(self, bytes_per_layer: int) -> int:
        """Return how many layers keep a replay out of the L2 (60 MB on H100/H200), at most 8."""
        return max(1, min(8, math.ceil(4 * 60e6 / bytes_per_layer)))


@dataclass
class Problem:
    """Inputs of all providers: queries, and the keys and values of a few distinct pages that the context repeats."""

    shape: Shape
    q: torch.Tensor
    k_new: torch.Tensor
    v_new: torch.Tensor
    k_pages: torch.Tensor  # [U, G, Hk, D]
    v_pages: torch.Tensor
    page_of: torch.Tensor  # [B, P] index into k_pages

    @classmethod
    def make(cls, shape: Shape, unique: int = 64) -> Problem:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def draw(*size: int) -> torch.Tensor:
            return torch.randn(size, generator=generator, device=DEVICE).bfloat16()

        heads, head_dim = shape.kv_heads, shape.head_dim
        return cls(
            shape,
            draw(shape.batch, shape.qo_heads, head_dim),
            draw(shape.batch, heads, head_dim),
            draw(shape.batch, heads, head_dim),
            draw(unique, PAGE, heads, head_dim),
            draw(unique, PAGE, heads, head_dim),
            torch.randint(unique, (shape.batch, shape.pages), generator=generator, device=DEVICE),
        )

    def keys_values(self, b: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return k, v [context, Hk, D] of request b."""
        k, v = (x[self.page_of[b]].flatten(0, 1)[: self.shape.context].clone() for x in (self.k_pages, self.v_pages))
        k[-1], v[-1] = self.k_new[b], self.v_new[b]
        return k, v

    def physical_pages(self) -> torch.Tensor:
        """Return a random physical page for every logical one, int32 [B, P]; page 0 is padding."""
        count = self.page_of.numel()
        order = torch.randperm(count, device=DEVICE) + 1
        return order.view_as(self.page_of).int()

    def exact(self, b: int) -> torch.Tensor:
        """Return float32 attention of request b in plain torch, [Hq, D]."""
        k, v = (x.float().repeat_interleave(self.shape.qo_heads // self.shape.kv_heads, 1) for x in self.keys_values(b))
        scores = torch.einsum("hd,thd->ht", self.q[b].float(), k) * self.shape.head_dim**-0.5
        return torch.einsum("ht,thd->hd", scores.softmax(-1), v)


@dataclass
class Candidate:
    """A provider made ready: run(layer) writes out; its bytes are those of the context it must read.

    expected(b) is what the first and the last request are checked against; None for a part of a layer.
    """

    run: Callable[[int], None]
    out: torch.Tensor
    layers: int
    bytes: int
    expected: Callable[[int], torch.Tensor] | None
    tolerance: float


def kvarn_candidate(problem: Problem, preset: str, part: str = "") -> Candidate:
    """Return a preset made ready: what a layer runs, or one of `PARTS` of it, whose bytes are not counted."""
    shape, config = problem.shape, KVarNConfig.from_preset(preset)
    page_table = problem.physical_pages()
    count, heads, head_dim = page_table.numel() + 1, shape.kv_heads, shape.head_dim
    record_bytes = config.record_bytes(head_dim)
    rotated = [reference.rotate(x).bfloat16() for x in (problem.k_pages, problem.v_pages)]
    unique = reference.encode_tile(*(x.transpose(1, 2) for x in rotated), config)
    layers = shape.layers(shape.batch * shape.pages * heads * record_bytes)
    caches = []
    for _ in range(layers):
        records = torch.empty(count, heads, record_bytes, dtype=torch.uint8, device=DEVICE)
        records[page_table.flatten().long()] = unique[problem.page_of.flatten()]
        rings = [
            torch.zeros(shape.batch + 1, config.ring_len, heads, head_dim, device=DEVICE, dtype=torch.bfloat16)
            for _ in range(2)
        ]
        first = max(0, (shape.context - 1) // PAGE - config.window_pages)
        for page in range(first, shape.pages):
            slots = torch.arange(page * PAGE, (page + 1) * PAGE, device=DEVICE) % config.ring_len
            for ring, x in zip(rings, rotated, strict=True):
                ring[1:, slots] = x[problem.page_of[:, page]]
        caches.append(LayerCache(records, *rings))
    batch = DecodeBatch(
        rows=torch.arange(1, shape.batch + 1, device=DEVICE),
        seq_lens=torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE),
        page_table=page_table,
        store_pages=page_table[:, -1].contiguous(),
        exact_starts=torch.zeros(shape.batch, dtype=torch.int32, device=DEVICE),
        workspace=make_workspace(shape.batch, shape.qo_heads, heads, head_dim, shape.pages, config, DEVICE),
    )
    out = torch.empty_like(problem.q)
    # once per step, not per layer
    ops.plan_decode(batch, config)

    def run(layer: int) -> None:
        ops.decode_attention(
            problem.q, problem.k_new, problem.v_new, out, caches[layer], batch, config, head_dim**-0.5
        )

    def run_part(layer: int) -> None:
        if part == "store":
            store_decode(problem.q, problem.k_new, problem.v_new, caches[layer], batch, config)
        elif part == "attend":
            decode(caches[layer], batch, config, shape.qo_heads, heads, head_dim**-0.5)
        else:
            merge(out, batch, config)

    if part:
        run(0)
        return Candidate(run_part, out, layers, 0, None, math.inf)

    def expected(b: int) -> torch.Tensor:
        return reference.attention(problem.q[b : b + 1], *problem.keys_values(b), config)[0]

    ring = min(shape.context, config.ring_len) * 4 * head_dim
    pages = max(0, (shape.context - 1) // PAGE - config.window_pages)
    total = shape.batch * heads * (pages * record_bytes + ring)
    return Candidate(run, out, layers, total, expected, tolerance=5e-3)


def _flashinfer(problem: Problem, dtype: torch.dtype, tensor_cores: bool) -> Candidate:
    import flashinfer

    shape = problem.shape
    page_table = problem.physical_pages()
    item = torch.finfo(dtype).bits // 8
    per_layer = shape.batch * shape.pages * PAGE * 2 * shape.kv_heads * shape.head_dim * item
    layers = shape.layers(per_layer)
    caches = []
    for _ in range(layers):
        cache = torch.empty(
            page_table.numel() + 1, 2, PAGE, shape.kv_heads, shape.head_dim, dtype=dtype, device=DEVICE
        )
        for n, pages in enumerate((problem.k_pages, problem.v_pages)):
            cache[page_table.flatten().long(), n] = pages.to(dtype)[problem.page_of.flatten()]
        offset = (shape.context - 1) % PAGE
        for n, new in enumerate((problem.k_new, problem.v_new)):
            cache[page_table[:, -1].long(), n, offset] = new.to(dtype)
        caches.append(cache)
    workspace = torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=tensor_cores)
    wrapper.plan(
        torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE) * shape.pages,
        page_table.flatten(),
        torch.full((shape.batch,), (shape.context - 1) % PAGE + 1, dtype=torch.int32, device=DEVICE),
        shape.qo_heads,
        shape.kv_heads,
        shape.head_dim,
        PAGE,
        q_data_type=torch.bfloat16,
        kv_data_type=dtype,
    )
    out = torch.empty_like(problem.q)

    def run(layer: int) -> None:
        wrapper.run(problem.q, caches[layer], out=out)

    # e4m3 keeps three mantissa bits: about 3 % of a value, less after averaging
    tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-1
    total = shape.batch * shape.context * 2 * shape.kv_heads * shape.head_dim * item
    return Candidate(run, out, layers, total, problem.exact, tolerance)


def flashinfer_bf16(problem: Problem) -> list[Candidate]:
    return [_flashinfer(problem, torch.bfloat16, cores) for cores in (False, True)]


def flashinfer_fp8(problem: Problem) -> list[Candidate]:
    return [_flashinfer(problem, torch.float8_e4m3fn, True)]


def fa3_bf16(problem: Problem) -> list[Candidate]:
    """Return FlashAttention 3 of sgl_kernel on pages of 128 tokens, as stock SGLang decodes by default on Hopper."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    shape = problem.shape
    page_table = problem.physical_pages()
    per_layer = shape.batch * shape.pages * PAGE * 4 * shape.kv_heads * shape.head_dim
    layers = shape.layers(per_layer)
    caches = []
    for _ in range(layers):
        kv = []
        for pages, new in ((problem.k_pages, problem.k_new), (problem.v_pages, problem.v_new)):
            cache = torch.empty(
                page_table.numel() + 1, PAGE, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device=DEVICE
            )
            cache[page_table.flatten().long()] = pages[problem.page_of.flatten()]
            cache[page_table[:, -1].long(), (shape.context - 1) % PAGE] = new
            kv.append(cache)
        caches.append(kv)
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE)
    qo_indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)
    out = torch.empty_like(problem.q)

    def run(layer: int) -> None:
        flash_attn_with_kvcache(
            problem.q,
            *caches[layer],
            page_table=page_table,
            cache_seqlens=seq_lens,
            cu_seqlens_q=qo_indptr,
            max_seqlen_q=1,
            softmax_scale=shape.head_dim**-0.5,
            causal=True,
            out=out,
        )

    total = shape.batch * shape.context * 4 * shape.kv_heads * shape.head_dim
    return [Candidate(run, out, layers, total, problem.exact, 1e-2)]


def sglang_triton(problem: Problem) -> list[Candidate]:
    """Return SGLang's own Triton decode kernel on a bf16 cache, 8 or 16 splits."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    shape = problem.shape
    page_table = problem.physical_pages()
    slots = (page_table[:, :, None].long() * PAGE + torch.arange(PAGE, device=DEVICE)).flatten(1)[:, : shape.context]
    caches = []
    per_layer = shape.batch * shape.context * 4 * shape.kv_heads * shape.head_dim
    layers = shape.layers(per_layer)
    for _ in range(layers):
        kv = []
        for pages, new in ((problem.k_pages, problem.k_new), (problem.v_pages, problem.v_new)):
            cache = torch.empty(
                (page_table.numel() + 1) * PAGE, shape.kv_heads, shape.head_dim, dtype=torch.bfloat16, device=DEVICE
            )
            cache[slots.flatten()] = pages[problem.page_of].flatten(1, 2)[:, : shape.context].flatten(0, 1)
            cache[slots[:, -1]] = new
            kv.append(cache)
        caches.append(kv)
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE) * shape.context
    indices = slots.flatten().to(torch.int64)

    def candidate(splits: int) -> Candidate:
        logits = torch.empty(shape.batch, shape.qo_heads, splits, shape.head_dim, device=DEVICE)
        lse = torch.empty(shape.batch, shape.qo_heads, splits, device=DEVICE)
        per_request = torch.full((shape.batch,), splits, dtype=torch.int32, device=DEVICE)
        out = torch.empty_like(problem.q)

        def run(layer: int) -> None:
            k, v = caches[layer]
            decode_attention_fwd(
                problem.q, k, v, out, indptr, indices, logits, lse, per_request, splits, shape.head_dim**-0.5, 1.0, 1.0
            )

        return Candidate(run, out, layers, per_layer, problem.exact, 1e-2)

    return [candidate(8), candidate(16)]


def check(candidate: Candidate, shape: Shape) -> float:
    """Return the relative RMS error of the first and last request; layer 0."""
    candidate.out.fill_(float("nan"))
    candidate.run(0)
    torch.cuda.synchronize()
    assert candidate.expected is not None, "a part has no result of its own"
    rows = sorted({0, shape.batch - 1})
    expected = torch.stack([candidate.expected(b) for b in rows])
    got = candidate.out[rows].float()
    return ((got - expected).norm() / expected.norm()).item()


def graph_times(candidate: Candidate, replays: int) -> list[float]:
    """Return microseconds of one layer, one number per replay of a graph over all layers."""
    for layer in range(candidate.layers):
        candidate.run(layer)
    torch.cuda.synchronize()
    repeat = max(1, 8 // candidate.layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for layer in range(candidate.layers):
                candidate.run(layer)
    times = []
    for n in range(replays + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if n >= 3:
            times.append(start.elapsed_time(end) * 1e3 / (repeat * candidate.layers))
    return times


def copy_bandwidth() -> float:
    """Return bytes per second of a device copy, read and written bytes counted."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = []
    for _ in range(8):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return 2 * source.numel() / statistics.median(times)


def versions() -> dict[str, str]:
    """Return what a row must name to be comparable."""

    def of(module: str) -> str:
        try:
            return str(__import__(module).__version__)
        except (ImportError, AttributeError):
            return ""

    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "sglang": of("sglang"),
        "flashinfer": of("flashinfer"),
        "commit": commit(),
    }


def measure(name: str, candidates: list[Candidate], shape: Shape, args: argparse.Namespace) -> dict | None:
    """Return the row of the fastest correct candidate of a provider; None if a check is red."""
    best: dict | None = None
    for candidate in candidates:
        checked = args.check and candidate.expected is not None
        error = check(candidate, shape) if checked else float("nan")
        if checked and not error < candidate.tolerance:
            print(f"{name}: relative error {error:.2e} above {candidate.tolerance:.0e}, not timed", file=sys.stderr)
            return None
        times = sorted(graph_times(candidate, args.replays))
        median = statistics.median(times)
        if best is None or median < best["median_us"]:
            best = {
                "provider": name,
                "median_us": median,
                "p20_us": times[len(times) // 5],
                "p80_us": times[len(times) * 4 // 5],
            }
            if candidate.bytes:
                best |= {"bytes": candidate.bytes, "gb_per_s": candidate.bytes / median / 1e3, "relative_error": error}
    return best


def providers(args: argparse.Namespace) -> dict[str, Callable[[Problem], list[Candidate]]]:
    """Return the chosen providers, baselines first."""
    baselines: dict[str, Callable[[Problem], list[Candidate]]] = {
        "flashinfer_bf16": flashinfer_bf16,
        "fa3_bf16": fa3_bf16,
        "flashinfer_fp8": flashinfer_fp8,
        "sglang_triton_bf16": sglang_triton,
    }
    chosen = {name: baselines[name] for name in baselines if name in args.baselines}
    for preset in args.presets:
        for part in ["", *(PARTS if args.parts else [])]:
            name = f"{preset} {part}".rstrip()
            chosen[name] = lambda problem, preset=preset, part=part: [kvarn_candidate(problem, preset, part)]
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES, help="BATCHxCONTEXT, default: %(default)s")
    parser.add_argument("--heads", default="32/8", help="query heads / KV heads, default %(default)s")
    parser.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256))
    parser.add_argument("--presets", nargs="*", default=["kvarn"], choices=preset_names())
    all_baselines = ["flashinfer_bf16", "fa3_bf16", "flashinfer_fp8", "sglang_triton_bf16"]
    parser.add_argument("--baselines", nargs="*", default=all_baselines, choices=all_baselines)
    parser.add_argument("--parts", action="store_true", help="also time the three steps of a layer of each preset")
    parser.add_argument("--replays", type=int, default=20, help="timed graph replays, default %(default)s")
    parser.add_argument("--no-check", dest="check", action="store_false", help="time without checking first")
    parser.add_argument(
        "--page-full",
        action="store_true",
        help="the new token fills a page of every request, so that the step encodes it; "
        "without it the context ends in the middle of a page",
    )
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    return parser.parse_args()


def main() -> None:
    args = parse()
    check_columns(args.csv, COLUMNS)
    if not torch.cuda.is_available():
        raise SystemExit("bench_decode.py needs a CUDA device; on a CPU run the tests instead")
    bandwidth, common = copy_bandwidth(), versions()
    print(f"{common['gpu']}: device copy {bandwidth / 1e12:.2f} TB/s", flush=True)
    qo_heads, kv_heads = (int(n) for n in args.heads.split("/"))
    for text in args.shapes:
        rows = []
        batch, context = (int(n) for n in text.split("x"))
        shape = Shape(batch, context if args.page_full else context - PAGE // 2, qo_heads, kv_heads, args.head_dim)
        problem = Problem.make(shape)
        bar = None
        for name, make in providers(args).items():
            try:
                row = measure(name, make(problem), shape, args)
            except ImportError as error:
                print(f"{name}: not importable here ({error})", file=sys.stderr)
                continue
            torch.cuda.empty_cache()
            if row is None:
                continue
            bar = row["median_us"] if name == "flashinfer_bf16" else bar
            row |= common | {
                "batch": batch, "context": shape.context, "qo_heads": qo_heads, "kv_heads": kv_heads,
                "head_dim": args.head_dim, "dtype": "bfloat16",
            }  # fmt: skip
            said = f"{text:>10} {name:24} {row['median_us']:9.1f} us"
            if "bytes" in row:
                share, ratio = row["gb_per_s"] * 1e9 / bandwidth, bar / row["median_us"] if bar else ""
                row |= {"copy_share": share, "ratio_to_flashinfer_bf16": ratio}
                said += f" {row['gb_per_s']:7.0f} GB/s {share:5.0%} of copy "
                said += (f"{ratio:5.2f}x" if bar else "     -") + f"  error {row['relative_error']:.1e}"
            print(said, flush=True)
            rows.append(row)
        if args.csv:
            append(args.csv, COLUMNS, rows)


if __name__ == "__main__":
    main()
