# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel that both entry points launch for an NVIDIA GPU, without one; one JSON line each.

Usage: python compile_kernels.py CAPABILITY SHARED_BYTES PRESET HEAD_DIM DTYPE NUM_QO_HEADS NUM_KV_HEADS

The wrappers run with their own block sizes on CPU tensors; each launch is caught, specialised as Triton
would do it and compiled instead.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

os.environ.pop("TRITON_INTERPRET", None)
# kernels are caught, so those of others, which would run on a GPU, have nothing to read
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import triton
from builders import attention_for, in_layer, make_cache, make_request, run_decode, run_extend, shape_of
from kvarn_kernels.attention import TRITON
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense
from kvarn_kernels.device.gpu import H100, Gpu
from kvarn_kernels.extend_choice import DENSE
from kvarn_kernels.read import extend
from kvarn_kernels.read.merge import FEW_ROWS
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Launch = tuple[JITFunction, tuple, dict]
# of a request in the verify step
DRAFTS = 4


def caught_launches(preset: str, head_dim: int, dtype: torch.dtype, heads: tuple[int, int], gpu: Gpu) -> list[Launch]:
    """Return what decode, verify and extend steps (a full page, a partial page) launch, in one piece and in several."""
    launches: list[Launch] = []

    def catch(fn, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in grid), (fn.__name__, grid)
        launches.append((fn, args, kwargs))

    JITFunction.run = catch
    config = KVarNConfig.from_preset(preset)
    cache = make_cache(config, heads[1], head_dim, dtype, pages=8, rows=4)
    request = make_request(300, heads, head_dim, dtype)
    # the merge has a form for many heads
    few, many = 4, -(-FEW_ROWS // heads[0])
    windows, batch = [200], max(few, many)
    attention = attention_for(
        cache, heads[0], config, TRITON, max_batch=batch, max_pages=64, gpu=gpu, sliding_windows=windows
    )
    # a layer with all that a layer may have
    layer = in_layer(attention, sinks=torch.zeros(heads[0], dtype=dtype), sliding_window=windows[0])
    least = extend.MIN_SPLIT_PAGES
    for attend in (attention, layer):
        extend.MIN_SPLIT_PAGES = least
        run_extend(attend, [request], [(100, 300)], cache, config)
        extend.MIN_SPLIT_PAGES = 1
        run_extend(attend, [request], [(100, 300)], cache, config)
        for size in (few, many):
            run_decode(attend, [request], [299], cache, config, padding=size - 1)
    more = config.ring_pages(head_dim, dtype.itemsize, DRAFTS) - config.ring_pages(head_dim, dtype.itemsize)
    drafted = make_cache(config, heads[1], head_dim, dtype, pages=8, rows=4, more_ring_pages=more)
    verify = attention_for(drafted, heads[0], config, TRITON, max_batch=DRAFTS, max_pages=64, drafts=DRAFTS, gpu=gpu)
    run_decode(verify, [request] * DRAFTS, range(300 - DRAFTS, 300), drafted, config, drafts=DRAFTS)
    # the launches of the dense form need no FlashInfer
    attention._extend_form = lambda *step: DENSE
    for pages in (8, 2):
        device, library = torch.device("cpu"), MagicMock()
        attention._dense_workspace = extend_dense.make_workspace(
            shape_of(cache, heads[0]), pages, device, library, sliding_windows=windows
        )
        for attend in (attention, layer):
            run_extend(attend, [request], [(100, 300)], cache, config)
    return launches


def specialised(launch: Launch, target: GPUTarget) -> tuple[ASTSource, Any]:
    """Return the source of a launch, specialised as Triton would do it, and its options."""
    fn, args, kwargs = launch
    backend = make_backend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return ASTSource(fn, signature, constexprs, attrs), options


def resources(kernel) -> dict[str, int]:
    """Return registers and stack bytes (spills) of a compiled kernel."""
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return {"registers": int(registers), "stack": int(stack)}


# sources and options, which cannot be pickled; a forked process has them
_distinct: dict[int, tuple[ASTSource, Any]] = {}


def compiled(target: GPUTarget, n: int) -> dict[str, Any]:
    """Compile one of the sources; return its name, shared memory, registers and spills."""
    source, options = _distinct[n]
    kernel = triton.compile(source, target=target, options=options.__dict__)
    return {"kernel": source.fn.__name__, "shared": kernel.metadata.shared, **resources(kernel)}


def main(
    capability: str, shared: str, preset: str, head_dim: str, dtype: str, num_qo_heads: str, num_kv_heads: str
) -> None:
    """Compile every distinct kernel of one form for a GPU of that capability and shared memory of a block."""
    sizes = {"shared_memory": int(shared), "shared_of_multiprocessor": int(shared) + 1024}
    gpu = replace(H100, capability=divmod(int(capability), 10), **sizes)
    target = GPUTarget("cuda", int(capability), 32)
    heads = (int(num_qo_heads), int(num_kv_heads))
    launches = caught_launches(preset, int(head_dim), getattr(torch, dtype), heads, gpu)
    sources = [specialised(launch, target) for launch in launches]
    _distinct.update(enumerate({(s.hash(), o.hash()): (s, o) for s, o in sources}.values()))
    # on every core, since compiling holds Python's lock
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("fork")) as pool:
        for line in pool.map(partial(compiled, target), _distinct):
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
