# SPDX-License-Identifier: Apache-2.0
"""The flags of the servers that are compared: stock SGLang, the same but for the cache."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path

from bench_engine import QWEN3_8B
from engines import CACHES, STOCK

ROOT = Path(__file__).resolve().parents[2]
DUMMY = "qwen3-8b-dummy"
CONTEXT = 140_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that concern the servers."""
    parser.add_argument(
        "--model", default=DUMMY, help=f"{DUMMY} (random weights), tiny, or a folder; default %(default)s"
    )
    parser.add_argument(
        "--caches", nargs="+", default=["bf16", "fp8_e4m3", "kvarn"], choices=CACHES, metavar="CACHE"
    )
    parser.add_argument(
        "--mem-fraction", type=float, default=0.8, help="of the GPU, for every cache; default %(default)s"
    )
    parser.add_argument(
        "--chunk", type=int, default=8192, help="--chunked-prefill-size, default %(default)s tokens"
    )
    parser.add_argument(
        "--max-requests", type=int, default=64, help="--max-running-requests, default %(default)s"
    )
    parser.add_argument("--server-args", default="", help="more flags of every server")
    parser.add_argument(
        "--stock-args", default="", help="more flags of bf16 and fp8_e4m3, such as --attention-backend fa3"
    )
    parser.add_argument("--kvarn-args", default="", help="more flags of the presets")


def settings(args: argparse.Namespace) -> dict:
    """Return what makes results comparable, for the result files."""
    names = ("model", "mem_fraction", "chunk", "max_requests", "server_args", "stock_args", "kvarn_args")
    return {name: getattr(args, name) for name in names}


def model_folder(name: str) -> Path:
    """Return the folder of a model; "tiny" and the dummy are written on the way."""
    folder = Path(tempfile.gettempdir()) / f"sglang-kvarn-bench-{name}"
    if name == DUMMY:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3_8B))
        return folder
    if name == "tiny":
        sys.path.insert(0, str(ROOT / "tests" / "engine"))
        import tiny_model

        return Path(tiny_model.save(folder))
    return Path(name)


def vocabulary(folder: Path) -> int:
    """Return the number of tokens of a model."""
    config = json.loads((folder / "config.json").read_text())
    return config.get("vocab_size") or config["text_config"]["vocab_size"]


def flags(cache: str, folder: Path, args: argparse.Namespace) -> list[str]:
    """Return the flags of the server of a cache; only --kv-cache-dtype differs, and what the user adds."""
    import torch

    found = ["--model-path", str(folder), "--random-seed", "0"]
    found += ["--chunked-prefill-size", str(args.chunk), "--max-running-requests", str(args.max_requests)]
    found += ["--enable-metrics", "--log-level", "info", "--log-level-http", "warning"]
    if torch.cuda.is_available():
        found += ["--mem-fraction-static", str(args.mem_fraction)]
        found += ["--cuda-graph-max-bs-decode", str(args.max_requests)]
    if args.model == DUMMY:
        found += ["--load-format", "dummy", "--context-length", str(CONTEXT)]
    if args.model == "tiny":
        found += ["--dtype", "float32"]
    if cache != "bf16":
        found += ["--kv-cache-dtype", cache]
    more = args.stock_args if cache in STOCK else args.kvarn_args
    return found + shlex.split(args.server_args) + shlex.split(more)
