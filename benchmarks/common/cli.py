# SPDX-License-Identifier: Apache-2.0
"""One vocabulary of flags for all benchmarks. A flag that SGLang has, too, has SGLang's name and meaning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from kvarn_kernels.config import preset_names

from benchmarks.common import models
from benchmarks.common.caches import CACHES


class _Help(argparse.RawDescriptionHelpFormatter):
    """Put the default of a flag behind its sentence; where there is none, the sentence says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text, default = action.help or "", action.default
        if not action.option_strings or default is argparse.SUPPRESS or default is None or default == "":
            return text
        if action.nargs == 0:
            return f"{text} Default: off."
        several = isinstance(default, (list, tuple))
        shown = (" ".join(map(str, default)) or "none") if several else str(default)
        return f"{text} Default: {shown.replace('%', '%%')}."


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows the docstring of a script and the default of every flag."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = f"python -m {spec.name}" if spec is not None and spec.name.startswith("benchmarks.") else None
    return argparse.ArgumentParser(prog=name, description=description, formatter_class=_Help)


def add_output(to: argparse.ArgumentParser, otherwise: str = "Without it nothing is written.") -> None:
    """Add --output, to which a script appends its rows; `otherwise` says what happens without it."""
    text = f"Append rows to this file (common/rows.py). {otherwise}"
    to.add_argument("--output", type=Path, metavar="CSV", help=text)


def add_model(to: argparse.ArgumentParser, default: str) -> None:
    """Add --model, one of `models` or a folder."""
    dummies = " and ".join(models.DUMMIES)
    tiny = f"{models.TINY} and {models.TINY_HYBRID} (random weights, two layers; the second one on a GPU)"
    names = f"{tiny}, {models.SMOLLM2}, {models.GEMMA3}, {dummies} (random weights)"
    to.add_argument("--model", default=default, metavar="M", help=f"Model: {names}, or a folder.")


def add_caches(
    to: argparse.ArgumentParser, default: Sequence[str] | None, choices: Sequence[str] = CACHES, more: str = ""
) -> None:
    """Add --caches: 16 bit, fp8 and presets, one after the other.

    Args:
        more: a sentence, e.g. on what is measured without the flag.
    """
    text = f"Caches to compare, the first one is the baseline of answers: {', '.join(choices)}."
    to.add_argument("--caches", nargs="+", default=default, choices=choices, metavar="C", help=f"{text} {more}".strip())


def add_presets(to: argparse.ArgumentParser) -> None:
    """Add --presets: none, one or several of the plugin's formats."""
    text = f"Presets to measure, none or several: {', '.join(preset_names())}."
    to.add_argument("--presets", nargs="*", default=["kvarn"], choices=preset_names(), metavar="P", help=text)


def add_preset(to: argparse.ArgumentParser) -> None:
    """Add --preset: one of the plugin's formats."""
    text = f"Preset to measure: {', '.join(preset_names())}."
    to.add_argument("--preset", default="kvarn", choices=preset_names(), metavar="P", help=text)


def add_repeats(to: argparse.ArgumentParser, default: int, what: str) -> None:
    """Add --repeats; `what` is the sentence that says of what, with its median."""
    to.add_argument("--repeats", type=int, default=default, metavar="N", help=what)


def add_timeout(to: argparse.ArgumentParser, default: float, of: str) -> None:
    """Add --timeout; `of` completes "Seconds for"."""
    to.add_argument("--timeout", type=float, default=default, metavar="S", help=f"Seconds for {of}.")


def add_seed(to: argparse.ArgumentParser, of: str) -> None:
    """Add --seed; `of` completes "Seed of"."""
    to.add_argument("--seed", type=int, default=0, help=f"Seed of {of}.")


def add_max_running_requests(to: argparse.ArgumentParser, default: int) -> None:
    """Add --max-running-requests, one number for all caches."""
    to.add_argument(
        "--max-running-requests", type=int, default=default, metavar="N", help="Requests at a time of every cache."
    )


def add_mem_fraction(to: argparse.ArgumentParser) -> None:
    """Add --mem-fraction-static."""
    to.add_argument(
        "--mem-fraction-static", type=float, default=0.8, metavar="F", help="Share of a GPU's memory for every cache."
    )


def add_bf16_backend(to: argparse.ArgumentParser, default: str | None) -> None:
    """Add --bf16-backend: who attends in the stock caches."""
    text = "Attention backend of bf16 and fp8_e4m3, e.g. triton, flashinfer, fa3."
    otherwise = "" if default else " Without it SGLang chooses."
    to.add_argument("--bf16-backend", default=default, metavar="B", help=text + otherwise)


def add_engines(to: argparse.ArgumentParser, timeout: float) -> None:
    """Add what scripts share that run an engine for each cache with `launch.run_each`; timeout: seconds for one."""
    import torch

    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    to.add_argument("--dtype", default=dtype, help="Data type of the model.")
    add_mem_fraction(to)
    add_bf16_backend(to, None)
    add_timeout(to, timeout, "one cache")
    add_one(to)


def drafts(text: str) -> tuple[str, int]:
    """Return algorithm and number of --drafts.

    Raises:
        argparse.ArgumentTypeError: it is spelt otherwise.
    """
    algorithm, _, number = text.partition("=")
    if algorithm not in models.DRAFTERS or not number.isdecimal() or int(number) < 2:
        known = " or ".join(f"{name}=D" for name in models.DRAFTERS)
        raise argparse.ArgumentTypeError(f"expected {known} with D of at least 2, got {text!r}")
    return algorithm, int(number)


def add_one(to: argparse.ArgumentParser) -> None:
    """Add the hidden flag with which `launch.run_alone` runs a script for one cache."""
    to.add_argument("--one", choices=CACHES, help=argparse.SUPPRESS)


def add_layer(to: argparse.ArgumentParser, shapes: list[str], of: str, repeats: int, what: str) -> None:
    """Add what benchmarks of one layer share.

    Args:
        shapes: the default; `of`: the sentence that explains one.
        repeats, what: see `add_repeats`.
    """
    to.add_argument("--shapes", nargs="+", default=shapes, metavar="S", help=of)
    to.add_argument("--heads", default="32/8", metavar="Q/K", help="Query heads / KV heads.")
    to.add_argument("--head-dim", type=int, default=128, choices=(64, 128, 256), help="Channels of a head.")
    add_presets(to)
    add_repeats(to, repeats, what)
    to.add_argument("--no-check", dest="check", action="store_false", help="Time without checking first.")
    add_output(to)


def add_hicache(to: argparse.ArgumentParser) -> None:
    """Add the size of the host memory."""
    text = "GB of host memory behind the cache of every loaded server (HiCache). Without it none."
    to.add_argument("--hicache", type=int, metavar="GB", help=text)


def add_sweep(to: argparse.ArgumentParser, default: Sequence[int], folder: str) -> None:
    """Add what sweeps over servers share: numbers of clients, a folder that keeps results, and the servers' flags."""
    text = "Clients at a time; each number is measured."
    to.add_argument("--concurrency", nargs="+", type=int, default=list(default), metavar="N", help=text)
    text = "Keep one JSON a result here; what is there is not measured again."
    to.add_argument("--folder", type=Path, default=Path(folder), help=text)
    add_model(to, models.DUMMY)
    add_caches(to, ["bf16", "fp8_e4m3", "kvarn"])
    add_mem_fraction(to)
    add_max_running_requests(to, 64)
    text = "Leave sizes to SGLang: memory fraction, prefill step, requests at a time. Every server gets its cache only."
    to.add_argument("--only-the-flag", action="store_true", help=text)
    text = "Tokens of a prefill step of every server."
    to.add_argument("--chunked-prefill-size", type=int, default=8192, metavar="N", help=text)
    add_hicache(to)
    to.add_argument("--server-args", default="", help="More flags of every server; without it none.")
    text = "More flags for bf16 and fp8_e4m3, such as --attention-backend fa3; without it none."
    to.add_argument("--stock-args", default="", help=text)
    to.add_argument("--kvarn-args", default="", help="More flags of the presets; without it none.")
