# SPDX-License-Identifier: Apache-2.0
"""An SGLang engine per cache, each in a process of its own, one after the other."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kvarn_kernels.config import preset_names

# 16 bit and 8 bit, and what the plugin adds
STOCK = ("bf16", "fp8_e4m3")
CACHES = (*STOCK, *preset_names())
RESULT, PROGRESS = "BENCH_RESULT ", "BENCH_PROGRESS "


def device_facts() -> dict[str, str]:
    """Return the device and the versions that a figure belongs to."""
    import torch

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    return {"device": device, "torch": torch.__version__, "sglang": version("sglang")}


def model_folder(model: str) -> str:
    """Return the folder of a model; "smollm2" is prepared if it is not there."""
    if model != "smollm2":
        return model
    from sglang_kvarn import smollm2

    return str(smollm2.prepare())


def cache_arguments(cache: str, backend: str | None) -> dict[str, Any]:
    """Return the arguments of sglang.Engine that choose a cache.

    Args:
        cache: one of `CACHES`; bf16 is the dtype of the model, SGLang's default.
        backend: attention backend of bf16 and fp8_e4m3; None leaves it to SGLang.
    """
    if cache not in STOCK:
        return {"kv_cache_dtype": cache}
    chosen: dict[str, Any] = {"page_size": 128} | ({"attention_backend": backend} if backend else {})
    return chosen if cache == "bf16" else chosen | {"kv_cache_dtype": cache}


def flush(engine: Any) -> None:
    """Empty the prefix cache; SGLang refuses while a request is in flight, its last step included.

    Raises:
        RuntimeError: the engine did not become idle within 30 s.
    """
    deadline = time.monotonic() + 30
    while not engine.flush_cache().success:
        if time.monotonic() > deadline:
            raise RuntimeError("expected the engine to be idle within 30 s: see what still runs in its log")
        time.sleep(0.1)


def report_progress(text: str) -> None:
    """Tell the parent process how far the engine of this one is."""
    print(PROGRESS + text, flush=True)


def report_result(result: dict[str, Any]) -> None:
    """Hand the result of this process to its parent."""
    print(RESULT + json.dumps(result), flush=True)


def run_alone(cache: str, timeout: float, show: Callable[[str], None] = lambda text: None) -> dict[str, Any] | None:
    """Run this script again with `--one CACHE` in a process of its own and return what it reported.

    Args:
        timeout: seconds after which the process and its engine are killed.
        show: called with each line of `report_progress`.

    Returns:
        None if there is no result; then the end of the log is printed.
    """
    # the engine is in a process group of its own, which ends in `finally`
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--one", cache]
    deadline = time.monotonic() + timeout
    with tempfile.NamedTemporaryFile("w+", suffix=f"-{cache}.log", delete=False) as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            while process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.5)
                steps = _reported(log.name, PROGRESS)
                show(steps[-1] if steps else "start")
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)
                process.wait()
    found = _reported(log.name, RESULT)
    if not found:
        end = Path(log.name).read_text(errors="replace").splitlines()[-15:]
        print(f"{cache}: no result, the log is {log.name} and ends with", *end, sep="\n  ", file=sys.stderr)
        return None
    return json.loads(found[-1])


def _reported(log: str, mark: str) -> list[str]:
    """Return what the lines of a log that begin with a mark say."""
    lines = Path(log).read_text(errors="replace").splitlines()
    return [line[len(mark) :] for line in lines if line.startswith(mark)]


def agreement(first: list[int], other: list[int]) -> int:
    """Return how many leading tokens are equal."""
    return next((n for n, (a, b) in enumerate(zip(first, other, strict=False)) if a != b), min(len(first), len(other)))
