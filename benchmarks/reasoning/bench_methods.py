# SPDX-License-Identifier: Apache-2.0
"""What each part of the method buys on long chains: presets, the published method, and a preset without its parts.

    python -m benchmarks.reasoning.train reasoner-qwen3
    python -m benchmarks.reasoning.bench_methods reasoner-qwen3 --output methods.csv
    python -m benchmarks.reasoning.bench_methods reasoner-qwen2 --presets kvarn kvarn_k4v3_g128

A chain is read in one pass with each cache, as bench_quality reads texts, without a server. The first token that is not
the most likely one is where a model that writes greedily leaves the chain: up to there it has written the same. So one
pass gives both figures: wrong tokens of a million behind right ones (teacher-forced), and chains that are right so far
at each of --lengths (free-running). The model runs in float32; q, k and v enter the cache in --dtype.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.common import cli, paired
from benchmarks.common.caches import PAGE
from benchmarks.common.rows import Figure, Rows
from benchmarks.quality import caches
from benchmarks.quality.frames import UNTOUCHED
from benchmarks.quality.model import Model
from benchmarks.reasoning import bench_chains, tasks, training


def methods(presets: Sequence[str], prompt: int) -> list[caches.Cache]:
    """Return the caches that are compared, the 16-bit one first.

    Args:
        prompt: tokens of the shortest prompt: the published method attends its whole pages exactly.
    """
    found = [caches.unquantised(), caches.fp8()]
    for name in presets:
        preset = caches.kvarn(name)
        assert preset.config is not None, "a preset has a configuration"
        found += [preset, caches.unbalanced(preset), *caches.lacking(name)]
        found.append(caches.published_kvarn(preset.config.k_bits, preset.config.v_bits, prompt // PAGE * PAGE))
    return found


def wrong_tokens(model: Model, chain: tasks.Chain, cache: caches.Cache) -> torch.Tensor:
    """Return which tokens of a solution are not the most likely ones behind the right ones, bool [tokens]."""
    answer = chain.answer
    with model.form(UNTOUCHED, cache.balanced):
        found = model.logits(chain.prompt + answer, cache.attend)[len(chain.prompt) - 1 : -1].argmax(-1)
    return found.cpu() != torch.tensor(answer)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    option = parser.add_argument
    option("model", type=Path, help="Folder that reasoning.train has made.")
    cli.add_presets(parser)
    option("--tasks", nargs="+", default=list(tasks.TASKS), choices=tasks.TASKS, metavar="T", help="Tasks.")
    lengths = list(training.FULL.lengths)
    option("--lengths", nargs="+", type=int, default=lengths, metavar="N", help="Tokens at which chains are judged.")
    option("--chains", type=int, default=200, metavar="N", help="Chains of each task and length.")
    option("--tiny", action="store_true", help="Problems of the size that train --tiny is trained on.")
    cli.add_seed(parser, "chains")
    text = "Data type of q, k and v."
    option("--dtype", default="bfloat16", choices=("float16", "bfloat16"), help=text)
    cli.add_output(parser)
    return parser.parse_args(arguments)


def load(folder: Path, dtype: str) -> Model:
    """Return the reasoner in float32.

    Raises:
        SystemExit: there is no model.
    """
    from transformers import AutoModelForCausalLM

    bench_chains.check_folder(folder)
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Model(network, None, torch.device(training.device()), getattr(torch, dtype))


def main(arguments: Sequence[str] | None = None) -> int:
    from rich.console import Console

    args = parse(arguments)
    console = Console(stderr=True)
    written = Rows(args.output, "methods")
    model = load(args.model, args.dtype)
    for task in args.tasks:
        chains = bench_chains.make_chains(args, task, max(args.lengths))
        first: list[torch.Tensor] | None = None
        for cache in methods(args.presets, min(len(chain.prompt) for chain in chains)):
            wrong = [wrong_tokens(model, chain, cache) for chain in chains]
            size = Figure("bytes_per_token", cache.bytes_per_token(model.head_dim), "bytes")
            for tokens in args.lengths:
                right = [not own[:tokens].any() for own in wrong]
                parts = torch.cat([own[:tokens] for own in wrong]).double()
                figures = [
                    size,
                    Figure("right", 100 * sum(right) / len(right), "%"),
                    Figure("wrong_tokens", 1e6 * parts.mean().item(), "of a million"),
                ]
                if first is not None:
                    figures += paired.compare(right, [not own[:tokens].any() for own in first], len(right))
                settings = {"model": args.model.name, "dtype": args.dtype, "seed": args.seed, "chains": args.chains}
                written.append(cache.name, settings | {"task": task, "tokens": tokens}, figures)
                shown = ", ".join(f"{figure.metric} {figure.value:.4g} {figure.unit}" for figure in figures)
                console.print(f"{task}, {tokens:,} tokens, {cache.name}: {shown}", highlight=False, soft_wrap=True)
            first = first or wrong
    return 0


if __name__ == "__main__":
    sys.exit(main())
