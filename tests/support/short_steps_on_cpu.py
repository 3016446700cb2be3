# SPDX-License-Identifier: Apache-2.0
"""The kernels of short extend steps as C++, also in a process of an engine, beside interpreted ones."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import cuda_as_cpp
from kvarn_kernels import attention, extend_choice
from kvarn_kernels.read import extend_sm90, finish_short

# what the kernel attended, to be read in the log of the engine
LINE = "attended by extend_sm90 as C++"


def as_cpp(folder: Path, *form) -> Callable[..., None]:
    """Return what launches the kernel of a form, the arguments of `extend_sm90.constants`, as C++."""
    before = "reset_products(); copies.clear(); delays.seed(seed); "
    before += "std::memset(dynamic_shared, 0xFF, sizeof(dynamic_shared));"
    defines = extend_sm90.constants(*form)
    return cuda_as_cpp.build(folder, extend_sm90.SOURCE, extend_sm90.KERNEL, defines, extend_sm90.WARPS.threads, before)


def finish_as_cpp(folder: Path, *form) -> Callable[..., None]:
    """Return the same of what ends the step, by the arguments of `finish_short.constants`."""
    defines, threads = finish_short.constants(*form), 32 * finish_short.WARPS
    return cuda_as_cpp.build(folder, finish_short.SOURCE, finish_short.KERNEL, defines, threads)


@functools.cache
def compiled(*form) -> Callable[..., None]:
    """Stand in for `extend_sm90._compiled`, whose last argument is a device."""
    return as_cpp(Path(tempfile.mkdtemp()), *form[:-1])


@functools.cache
def finish_compiled(*form) -> Callable[..., None]:
    """Stand in for `finish_short._compiled`, whose last argument is a device."""
    return finish_as_cpp(Path(tempfile.mkdtemp()), *form[:-1])


def install() -> None:
    """Let steps of few tokens on a page or more run it, as on Hopper."""
    choose, attend = attention.choose_kernels, extend_sm90.attend

    def with_short(*args, **kwargs):
        return dataclasses.replace(choose(*args, **kwargs), short="cuda")

    def logged(rotated, cache, batch, *args):
        print(f"{LINE}: {batch.new_tokens} on {batch.prefix_lens_host}", flush=True)
        return attend(rotated, cache, batch, *args)

    attention.choose_kernels, extend_choice.SHORT_PAGES = with_short, 1
    extend_sm90._compiled, extend_sm90.current_stream, extend_sm90.attend = compiled, lambda device: 0, logged
    finish_short._compiled, finish_short.current_stream = finish_compiled, lambda device: 0
