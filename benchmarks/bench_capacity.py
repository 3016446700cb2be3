# SPDX-License-Identifier: Apache-2.0
"""How many tokens a GiB of KV memory holds: every preset against a 16-bit and an fp8 cache, ring rows
included.

    python benchmarks/bench_capacity.py [--gib 40] [--requests 32 256] [--csv benchmarks/results/capacity.csv]

No GPU is needed: the figures come from the functions that size the pool of a server (`sglang_kvarn.budget`), for a
CUDA host with what is installed here (FlashInfer: a workspace of prefill). What a server takes besides, the padding
page and CUDA graphs beyond its rows, is not counted; its start-up log names the exact pool.
"""

from __future__ import annotations

import argparse
import csv
import sys
from pathlib import Path

import torch
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig, preset_names
from sglang_kvarn.budget import MIB, ModelShape, choose_rows, workspace_bytes

SHAPES = {
    "SmolLM2-135M": ModelShape(layers=30, kv_heads=3, qo_heads=9, head_dim=64, itemsize=2),
    "Qwen2.5-7B": ModelShape(layers=28, kv_heads=4, qo_heads=28, head_dim=128, itemsize=2),
    "Llama-3.1-8B": ModelShape(layers=32, kv_heads=8, qo_heads=32, head_dim=128, itemsize=2),
    "Qwen3-8B": ModelShape(layers=36, kv_heads=8, qo_heads=32, head_dim=128, itemsize=2),
    "Qwen3-32B": ModelShape(layers=64, kv_heads=8, qo_heads=64, head_dim=128, itemsize=2),
    "Llama-3.3-70B/TP4": ModelShape(layers=80, kv_heads=2, qo_heads=16, head_dim=128, itemsize=2),
    "Gemma-7B": ModelShape(layers=28, kv_heads=16, qo_heads=16, head_dim=256, itemsize=2),
}
# the aliases repeat one of the others
PRESETS = [name for name in preset_names() if name not in ("kvarn", "kvarn_canonical")]
# SGLang's --chunked-prefill-size on an 80 GB GPU
CHUNK = 8192
# and the largest batch of its decode graphs there
GRAPH_BATCH = 256
FIELDS = (
    *("model", "layers", "kv_heads", "head_dim", "kv_gib", "cache", "bytes_per_token", "requests"),
    *("ring_mib", "workspace_mib", "pool_tokens", "tokens_per_gib", "to_bf16", "to_fp8"),
)


def check_record_sizes() -> None:
    """Compare the bytes per token of every preset with the size of a record that the oracle encodes."""
    for name in PRESETS:
        config = KVarNConfig.from_preset(name)
        for head_dim in (64, 128, 256):
            tile = torch.zeros(config.tile_size, head_dim)
            size = reference.encode_tile(tile, tile, config).numel()
            assert size == config.bytes_per_token(head_dim) * config.tile_size, (name, head_dim, size)


def plain_row(shape: ModelShape, memory: int, itemsize: int) -> dict[str, object]:
    """Return the capacity of SGLang's own cache: itemsize bytes per element, no ring."""
    per_token = shape.full_token_bytes(itemsize)
    return {
        **{"bytes_per_token": per_token, "requests": "", "ring_mib": 0, "workspace_mib": 0},
        "pool_tokens": memory // per_token,
    }


def kvarn_row(
    shape: ModelShape, memory: int, name: str, requested: int | None, context: int
) -> dict[str, object]:
    """Return the capacity of a preset: what ring and workspace leave, in whole pages.

    Args:
        memory: bytes of KV memory.
        requested: requests at a time, None for the server's own choice.
        context: longest request in tokens.
    """
    config = KVarNConfig.from_preset(name)
    rows, _ = choose_rows(memory, shape.row_bytes(config), requested, GRAPH_BATCH)
    # one more row is the padding target of CUDA graphs
    ring = (rows + 1) * shape.row_bytes(config)
    workspace = workspace_bytes(shape, config, torch.device("cuda"), torch.bfloat16, rows + 1, rows, context, CHUNK)
    pages = (memory - ring - workspace) // (shape.token_bytes(config) * config.tile_size)
    return {
        "bytes_per_token": shape.token_bytes(config),
        "requests": rows,
        "ring_mib": round(ring / MIB, 1),
        "workspace_mib": round(workspace / MIB, 1),
        "pool_tokens": pages * config.tile_size,
    }


def measure(model: str, gib: float, requests: list[int], context: int) -> list[dict[str, object]]:
    """Return the rows of one model: bf16, fp8, then every preset with the server's rows and with each of
    requests."""
    shape, memory = SHAPES[model], int(gib * 1024 * MIB)
    rows = [("bf16", plain_row(shape, memory, 2)), ("fp8_e4m3", plain_row(shape, memory, 1))]
    for name in PRESETS:
        for requested in (None, *requests):
            try:
                rows.append((name, kvarn_row(shape, memory, name, requested, context)))
            except ValueError as error:
                print(f"{model} {name}: left out, {error}", file=sys.stderr)
    bf16, fp8 = rows[0][1]["pool_tokens"], rows[1][1]["pool_tokens"]
    facts = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim, "kv_gib": gib}
    return [
        {
            **{"model": model, **facts, "cache": cache, **row},
            "tokens_per_gib": round(row["pool_tokens"] / gib),
            "to_bf16": round(row["pool_tokens"] / bf16, 3),
            "to_fp8": round(row["pool_tokens"] / fp8, 3),
        }
        for cache, row in rows
    ]


def show(rows: list[dict[str, object]]) -> None:
    """Print one table per model."""
    from rich.console import Console
    from rich.table import Table

    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        shape = f"{own[0]['layers']} layers, {own[0]['kv_heads']} KV heads of {own[0]['head_dim']}"
        table = Table(title=f"{model} ({shape}), {own[0]['kv_gib']:g} GiB KV memory", title_justify="left")
        for column in FIELDS[5:]:
            table.add_column(column, justify="left" if column == "cache" else "right")
        for row in own:
            table.add_row(*(f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in FIELDS[5:]))
        Console(width=140).print(table)


def main() -> None:
    """Check the record sizes, compute, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--gib", type=float, default=40.0, help="KV memory of one GPU (default: %(default)s)")
    parser.add_argument("--requests", type=int, nargs="*", default=[32, 256], help="requests at a time")
    parser.add_argument(
        "--context", type=int, default=32768, help="longest request (default: %(default)s tokens)"
    )
    parser.add_argument("--csv", type=Path, help="write the rows here")
    options = parser.parse_args()
    check_record_sizes()
    models = options.model or SHAPES
    rows = [row for m in models for row in measure(m, options.gib, options.requests, options.context)]
    show(rows)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
