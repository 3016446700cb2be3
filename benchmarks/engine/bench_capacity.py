# SPDX-License-Identifier: Apache-2.0
"""How many tokens a GiB of KV memory holds: every preset against a 16-bit and an fp8 cache, with the rings of the
requests that run.

    python -m benchmarks.engine.bench_capacity --gib 40 --output benchmarks/results/capacity.csv

No GPU is needed: the figures come from the functions that size the pool of a server (`sglang_kvarn.capacity`), for an
H100 with what is installed here (FlashInfer: a workspace of prefill). A request that runs takes the pages of its ring
from the pool, the newest tokens in 16 bits; a request that waits takes none, nor does text that is only cached. What a
server takes besides, the padding page and CUDA graphs beyond its rows, is not counted; its start-up log names the exact
pool.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn.capacity import MIB, Bounds, ModelShape, charge, requests_of, ring_pages

from benchmarks.common import cli
from benchmarks.common.caches import BF16, FP8
from benchmarks.common.rows import Figure, Rows


def _shape(layers: int, num_qo_heads: int, num_kv_heads: int, head_dim: int) -> ModelShape:
    return ModelShape(layers, AttentionShape(num_qo_heads, num_kv_heads, head_dim, torch.bfloat16))


SHAPES = {
    "SmolLM2-135M": _shape(30, 9, 3, 64),
    "Qwen2.5-7B": _shape(28, 28, 4, 128),
    "Llama-3.1-8B": _shape(32, 32, 8, 128),
    "Qwen3-8B": _shape(36, 32, 8, 128),
    "Qwen3-32B": _shape(64, 64, 8, 128),
    "Llama-3.3-70B/TP4": _shape(80, 16, 2, 128),
    "Gemma-7B": _shape(28, 16, 16, 256),
}
# the aliases repeat one of the others
PRESETS = [name for name in preset_names() if name not in ("kvarn", "kvarn_canonical")]
# SGLang's --chunked-prefill-size on an 80 GB GPU
CHUNK = 8192
# and the largest batch of its decode graphs there
GRAPH_BATCH = 256
# tokens of the requests that requests_of_8k counts
LONG = 8192
# figure -> unit. A running request takes ring_tokens of the pool beside its records; context_tokens is what the rings
# leave for the text of requests and of the prefix cache, and the last three figures are of it
UNITS = {
    "bytes_per_token": "bytes",
    "ring_tokens": "tokens",
    "ring_mib": "MiB",
    "workspace_mib": "MiB",
    "pool_tokens": "tokens",
    "context_tokens": "tokens",
    "requests_of_8k": "",
    "tokens_per_gib": "tokens",
    "to_bf16": "",
    "to_fp8": "",
}


def check_record_sizes() -> None:
    """Compare the bytes per token of every preset with the size of a record that the oracle encodes."""
    for name in PRESETS:
        config = KVarNConfig.from_preset(name)
        for head_dim in (64, 128, 256):
            tile = torch.zeros(TILE_SIZE, head_dim)
            size = reference.encode_tile(tile, tile, config).numel()
            assert size == config.bytes_per_token(head_dim) * TILE_SIZE, (name, head_dim, size)


def plain_row(shape: ModelShape, memory: int, itemsize: int) -> dict[str, object]:
    """Return the capacity of SGLang's own cache: itemsize bytes per element, no ring."""
    per_token = shape.full_token_bytes(itemsize)
    return {
        **{"bytes_per_token": per_token, "requests": "", "running": ""},
        **{"ring_tokens": 0, "ring_mib": 0, "workspace_mib": 0, "pool_tokens": memory // per_token},
        **{"context_tokens": memory // per_token, "requests_of_8k": memory // per_token // LONG},
    }


def kvarn_row(shape: ModelShape, memory: int, name: str, requested: int | None, context: int) -> dict[str, object]:
    """Return the capacity of a preset: what the workspaces leave, in whole pages, and what the rings leave of that.

    Args:
        memory: bytes of KV memory.
        requested: requests at a time, all of which run; None for the server's own choice, none of which runs.
        context: longest request in tokens.
    """
    config = KVarNConfig.from_preset(name)
    bounds = Bounds(requested, min(GRAPH_BATCH, requested or GRAPH_BATCH), context, CHUNK)
    taken = charge(shape, config, memory, bounds, torch.device("cuda"), H100)
    pool = (memory - taken.workspace) // (shape.token_bytes(config) * TILE_SIZE) * TILE_SIZE
    ring, running = ring_pages(shape.attention, config) * TILE_SIZE, requested or 0
    return {
        "bytes_per_token": shape.token_bytes(config),
        "requests": taken.rows,
        "running": running,
        "ring_tokens": ring,
        "ring_mib": round(ring * shape.token_bytes(config) / MIB, 1),
        "workspace_mib": round(taken.workspace / MIB, 1),
        "pool_tokens": pool,
        "context_tokens": max(0, pool - running * ring),
        "requests_of_8k": requests_of(pool, ring, LONG, taken.rows),
    }


def measure(model: str, gib: float, requests: list[int], context: int) -> list[dict[str, object]]:
    """Return the rows of one model: bf16, fp8, then every preset with nothing running and with each of requests."""
    shape, memory = SHAPES[model], int(gib * 1024 * MIB)
    rows = [(BF16, plain_row(shape, memory, 2)), (FP8, plain_row(shape, memory, 1))]
    for name in PRESETS:
        for requested in (None, *requests):
            try:
                rows.append((name, kvarn_row(shape, memory, name, requested, context)))
            except ValueError as error:
                print(f"{model} {name}: left out, {error}", file=sys.stderr)
    bf16, fp8 = rows[0][1]["context_tokens"], rows[1][1]["context_tokens"]
    heads = shape.attention
    facts = {"layers": shape.layers, "num_kv_heads": heads.num_kv_heads, "head_dim": heads.head_dim, "kv_gib": gib}
    return [
        {
            **{"model": model, **facts, "cache": cache, **row},
            "tokens_per_gib": round(row["context_tokens"] / gib),
            "to_bf16": round(row["context_tokens"] / bf16, 3),
            "to_fp8": round(row["context_tokens"] / fp8, 3),
        }
        for cache, row in rows
    ]


def show(rows: list[dict[str, object]]) -> None:
    """Print one table per model."""
    from rich.console import Console
    from rich.table import Table

    columns = ("cache", "requests", "running", *UNITS)
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        shape = f"{own[0]['layers']} layers, {own[0]['num_kv_heads']} KV heads of {own[0]['head_dim']}"
        table = Table(title=f"{model} ({shape}), {own[0]['kv_gib']:g} GiB KV memory", title_justify="left")
        for column in columns:
            table.add_column(column, justify="left" if column == "cache" else "right")
        for row in own:
            table.add_row(*(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns))
        Console(width=190).print(table)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    text = f"Model shapes: {', '.join(SHAPES)}."
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES), metavar="M", help=text)
    parser.add_argument("--gib", type=float, default=40.0, help="KV memory of one GPU in GiB.")
    text = "Requests at a time of the presets, all running; beside a server's own choice with none running."
    parser.add_argument("--max-running-requests", type=int, nargs="*", default=[32, 256], metavar="N", help=text)
    parser.add_argument("--context", type=int, default=32768, metavar="N", help="Tokens of the longest request.")
    cli.add_output(parser)
    return parser.parse_args(arguments)


def main() -> None:
    """Check the record sizes, compute, print and write the rows."""
    args = parse()
    written = Rows(args.output, "capacity")
    check_record_sizes()
    rows = [row for m in args.models for row in measure(m, args.gib, args.max_running_requests, args.context)]
    show(rows)
    for row in rows:
        settings = {name: value for name, value in row.items() if name not in UNITS and name != "cache" and value != ""}
        written.append(str(row["cache"]), settings, [Figure(name, row[name], unit) for name, unit in UNITS.items()])


if __name__ == "__main__":
    main()
