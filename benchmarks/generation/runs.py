# SPDX-License-Identifier: Apache-2.0
"""The engine's side: send tasks and conversations, return answers."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from itertools import groupby
from typing import Any

from benchmarks.common import caches, launch
from benchmarks.generation.scoring import Answer
from benchmarks.generation.tasks import Task


def engine_arguments(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Return the arguments of sglang.Engine for the cache of this process.

    Args:
        args: with one (the cache), dtype, seed, mem_fraction_static, bf16_backend.
        folder: of the model.
    """
    import torch

    chosen: dict[str, Any] = {
        "model_path": folder,
        "dtype": args.dtype,
        "random_seed": args.seed,
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "log_level": "info",
    }
    if torch.cuda.is_available():
        chosen["mem_fraction_static"] = args.mem_fraction_static
    chosen |= caches.engine_arguments(args.one, args.bf16_backend)
    if args.one == caches.BF16 and args.dtype == "float32":
        # the dtype of the model would make it a 32-bit cache
        chosen["kv_cache_dtype"] = "bf16"
    return chosen


def _ask(engine: Any, tokenizer: Any, tasks: list[Task], mode: str, temperature: float = 0.0) -> list[Answer]:
    """Send tasks together and return their answers in order."""
    sampling = [{"temperature": temperature, "max_new_tokens": task.new_tokens, "ignore_eos": True} for task in tasks]
    outputs = engine.generate(input_ids=[task.prompt for task in tasks], sampling_params=sampling)
    answers = []
    for task, output in zip(tasks, outputs, strict=True):
        ids, meta = output["output_ids"], output["meta_info"]
        counts = (meta["prompt_tokens"], meta["cached_tokens"])
        answers.append(Answer(task.section, mode, task.expected, ids, tokenizer.decode(ids), *counts, task.depth))
    return answers


def answer_tasks(engine: Any, tokenizer: Any, tasks: Iterable[Task], samples: int, temperature: float) -> list[Answer]:
    """Answer each section greedily with nothing cached, then draw samples where an answer is known.

    A sampled request finds its prompt in the prefix cache. SGLang seeds one generator per engine (random_seed); which
    draw a request gets depends on how the scheduler batches, so two runs differ: bf16 had 1 and then 2 of 3 needles.
    A seed per request (sampling_seed) needs the deterministic mode, which a kvarn cache refuses.
    """
    answers = []
    for section, group in groupby(tasks, key=lambda task: task.section):
        own = list(group)
        launch.report_progress(section)
        launch.flush(engine)
        answers += _ask(engine, tokenizer, own, "greedy")
        if own[0].expected is not None:
            for _ in range(samples):
                answers += _ask(engine, tokenizer, own, "sampled", temperature)
    return answers


def hold_conversations(engine: Any, tokenizer: Any, conversations: list[list[Task]]) -> list[Answer]:
    """Hold conversations side by side, turn by turn, then ask every turn again with an empty prefix cache."""
    turns = [list(tasks) for tasks in zip(*conversations, strict=True)]
    answers = []
    launch.flush(engine)
    for number, tasks in enumerate(turns, 1):
        launch.report_progress(f"conversation, turn {number} of {len(turns)}")
        answers += _ask(engine, tokenizer, tasks, "hit")
    for number, tasks in enumerate(turns, 1):
        launch.report_progress(f"conversation without prefix hits, turn {number} of {len(turns)}")
        launch.flush(engine)
        answers += _ask(engine, tokenizer, tasks, "miss")
    return answers
