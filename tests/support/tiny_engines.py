# SPDX-License-Identifier: Apache-2.0
"""Engines of tiny models on the device that is there: SGLang's own kernels on a GPU, torch in their place on a CPU."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from near_ties import Tally
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

from benchmarks.common import tiny_model
from benchmarks.common.tiny_model import answers

ON_GPU = torch.cuda.is_available()
# of the models: SGLang's code has bfloat16 in embeddings of blocks of drafts, and in layers with states; the stand-ins
# are in 32 bits
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
# requests at a time
ROWS = 4
# of one engine, with its start; KVARN_ENGINE_SECONDS is for a first start, which builds kernels
LIMIT_SECONDS = int(os.environ.get("KVARN_ENGINE_SECONDS", 150 if ON_GPU else 900))
_HEADS, _DELTA = tiny_model.PUBLISHED_HEADS, tiny_model.PUBLISHED_DELTA
# sizes of published models, in which kernels of SGLang are run and tested
_SHAPES: dict[str, dict[str, Any]] = {
    "qwen3_next": _DELTA,
    "qwen3_5_text": _DELTA,
    "falcon_h1": {"mamba_d_ssm": 256, "mamba_d_head": 64, "mamba_d_state": 128},
    "granitemoehybrid": {"mamba_d_state": 128, "hidden_size": 1024, "mamba_n_heads": 32},
    "nemotron_h": {"mamba_head_dim": 64, "ssm_state_size": 128},
    # its heads have hidden_size / num_attention_heads channels
    "qwen2": {"hidden_size": 1024},
    "olmo3": {"hidden_size": 1024},
    "gpt_oss": {"head_dim": 64},
    "gemma3_text": {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256},
}


def save(folder: Path, family: str = "llama", dtype: torch.dtype = DTYPE, **changes: Any) -> str:
    """Write a model with head_dim 128, 8 query and 2 KV heads, whose weights fit a dtype; return its folder.

    Args:
        changes: fields of the configuration.
    """
    folder.mkdir()
    shape = _HEADS | _SHAPES.get(family, {}) | changes
    peak = tiny_model.STEADY_PEAK / shape.get("hidden_size", 256) ** 0.5
    saved = tiny_model.save(folder, family, rounded_to=dtype, peak=peak, **shape)
    if family == "gpt_oss":
        # SGLang gives its projections the dtype of the configuration, whatever the engine's is
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"dtype": str(dtype).removeprefix("torch.")}))
    return saved


def prepare(
    patch: pytest.MonkeyPatch,
    folder: Path,
    *,
    drafts: bool = False,
    states: bool = False,
    windows: bool = False,
    dp_attention: bool = False,
) -> None:
    """Let SGLang check every page of every step; on a CPU, put torch in the place of its kernels.

    Args:
        drafts: for engines that speculate; states: for models that keep states; windows: for models whose windows
            SGLang keeps apart; dp_attention: for ranks with requests of their own.
    """
    patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
    if ON_GPU:
        return
    platform.prepare_environment()
    # not on a GPU, where what they stand in for may be missing
    import dp_attention_on_cpu
    import drafts_on_cpu
    import states_on_cpu
    import triton_attention_on_cpu

    if windows:
        triton_attention_on_cpu.prepare(patch, folder / "windows")
        # experts of gpt-oss compile their activation, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
    if states:
        states_on_cpu.prepare(patch, folder / "states")
    if dp_attention:
        dp_attention_on_cpu.prepare(patch, folder / "dp_attention")
    if drafts:
        drafts_on_cpu.prepare(patch, folder / "drafts")


def ring_pages(folder: str, preset: str, itemsize: int, drafts: int) -> int:
    """Return the pages of a ring of a model, by the bytes of a number and the drafts that a step verifies."""
    head_dim = (_HEADS | json.loads((Path(folder) / "config.json").read_text()))["head_dim"]
    return KVarNConfig.from_preset(preset).ring_pages(head_dim, itemsize, drafts)


@contextmanager
def start(tally: Tally, *, pages: int = 40, rows: int = ROWS, drafts: int = 1, **options: Any) -> Iterator[Any]:
    """Run an engine with a pool of so many pages beside the rings of some requests.

    Args:
        tally: with the model, its dtype and the preset.
        rows: requests whose rings there is room for beside the pages.
        drafts: that a step verifies, 1 without speculation.

    Raises:
        TimeoutError: engine and block took longer than `LIMIT_SECONDS`.
    """
    ring = ring_pages(tally.folder, tally.preset, tally.dtype.itemsize, drafts)
    chosen = {
        "model_path": tally.folder,
        "skip_tokenizer_init": True,
        "grammar_backend": "none",
        "sampling_backend": "pytorch",
        "dtype": str(tally.dtype).removeprefix("torch."),
        "kv_cache_dtype": tally.preset,
        "max_total_tokens": (rows * ring + pages) * 128,
        "max_running_requests": ROWS,
        "chunked_prefill_size": 256,
        "random_seed": 0,
        "log_level": "info",
        "decode_log_interval": 1,
        "custom_sigquit_handler": tiny_model.fail,
    }
    if ON_GPU:
        # a bound that is not reached: several engines may start on one GPU, and each sees what others take
        chosen |= {"mem_fraction_static": 0.3, "cuda_graph_max_bs_decode": ROWS, "disable_prefill_cuda_graph": True}
    before = signal.signal(signal.SIGALRM, _out_of_time)
    signal.alarm(LIMIT_SECONDS)
    engine = None
    try:
        engine = compat.resolve("sglang.Engine")(**chosen | options)
        yield engine
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        if engine is None:
            # processes of an engine that did not start
            compat.resolve("sglang.srt.utils.kill_process_tree")(os.getpid(), include_parent=False)
        else:
            engine.shutdown()


def _out_of_time(signum: int, frame: Any) -> None:
    raise TimeoutError(f"expected the engine to be done within {LIMIT_SECONDS} s")


def ask(engine: Any, tally: Tally, prompts: list[list[int]], new_tokens: int) -> list[dict[str, Any]]:
    """Return `tiny_model.answers`, each of which the oracle agrees with."""
    found = answers(engine, prompts, new_tokens)
    for tokens, answer in zip(prompts, found, strict=True):
        tally.judge(tokens, answer["tokens"], answer["cached"])
    return found


def check_graphs(log: str) -> None:
    """Check that decode steps ran in CUDA graphs, on a GPU.

    Args:
        log: of an engine that has ended.
    """
    steps = re.findall(r"Decode batch.*graph: (\w+)", log)
    assert steps, "the engine has logged no decode step"
    assert not ON_GPU or set(steps) == {"True"}, f"{steps.count('False')} of {len(steps)} steps ran without a graph"
