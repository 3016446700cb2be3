# SPDX-License-Identifier: Apache-2.0
"""Compile every kernel that both entry points launch for an NVIDIA GPU, without one; one JSON line each.

Usage: python compile_kernels.py CAPABILITY SHARED_BYTES PRESET HEAD_DIM DTYPE NUM_QO_HEADS NUM_KV_HEADS

The wrappers run with their own block sizes on CPU tensors; each launch is caught, specialised as Triton
would do it and compiled instead.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import MagicMock

os.environ.pop("TRITON_INTERPRET", None)
os.environ["KVARN_CPU_FORM"] = "triton"
# kernels are caught, so those of others, which would run on a GPU, have nothing to read
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import torch
import triton
from builders import make_cache, make_request, run_decode, run_extend
from kvarn_kernels import extend, gpu, prefill
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.decode import make_workspace
from kvarn_kernels.merge import FEW_ROWS
from kvarn_kernels.ops import decode_attention, extend_attention, plan_decode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

Launch = tuple[JITFunction, tuple, dict]


def caught_launches(preset: str, head_dim: int, dtype: torch.dtype, heads: tuple[int, int]) -> list[Launch]:
    """Return what decode steps and extend steps (a full page, a partial page) launch, in one piece and in several."""
    launches: list[Launch] = []

    def catch(fn, *args, grid, warmup, **kwargs):
        assert all(size > 0 for size in grid), (fn.__name__, grid)
        launches.append((fn, args, kwargs))

    JITFunction.run = catch
    config = KVarNConfig.from_preset(preset)
    cache = make_cache(config, heads[1], head_dim, dtype, pages=8, rows=4)
    request = make_request(300, heads, head_dim, dtype)
    run_extend(extend_attention, [request], [(100, 300)], cache, config)
    extend.MIN_SPLIT_PAGES = 1
    run_extend(extend_attention, [request], [(100, 300)], cache, config)
    # the launches of the FlashInfer form need no FlashInfer
    for pages in (8, 2):
        prefill_workspace = prefill.make_workspace(*heads, head_dim, dtype, pages, torch.device("cpu"), MagicMock())
        run_extend(extend_attention, [request], [(100, 300)], cache, config, workspace=prefill_workspace)

    def decode(q, k, v, out, cache, batch, config, sm_scale):
        plan_decode(batch, config)
        decode_attention(q, k, v, out, cache, batch, config, sm_scale)

    # the merge has a form for many heads
    for size in (4, -(-FEW_ROWS // heads[0])):
        workspace = make_workspace(size, *heads, head_dim, 64, config, torch.device("cpu"))
        run_decode(decode, [request], [299], cache, config, padding=size - 1, workspace=workspace)
    return launches


def compile_launch(launch: Launch, target: GPUTarget):
    """Return the compiled kernel of a launch."""
    fn, args, kwargs = launch
    backend = make_backend(target)
    binder = create_function_from_signature(fn.signature, fn.params, backend)
    kwargs = {"debug": False, "instrumentation_mode": "", **kwargs}
    bound, specialization, options = binder(*args, **kwargs)
    options, signature, constexprs, attrs = fn._pack_args(backend, kwargs, bound, specialization, options)
    return triton.compile(
        ASTSource(fn, signature, constexprs, attrs), target=target, options=options.__dict__
    )


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


def main(
    capability: str, shared: str, preset: str, head_dim: str, dtype: str, num_qo_heads: str, num_kv_heads: str
) -> None:
    """Compile every distinct kernel of one form for a GPU of that capability and shared memory of a block."""
    gpu.shared_memory = lambda: int(shared)
    target = GPUTarget("cuda", int(capability), 32)
    heads = (int(num_qo_heads), int(num_kv_heads))
    seen = set()
    for launch in caught_launches(preset, int(head_dim), getattr(torch, dtype), heads):
        kernel = compile_launch(launch, target)
        if kernel.hash in seen:
            continue
        seen.add(kernel.hash)
        line = {"kernel": launch[0].__name__, "shared": kernel.metadata.shared, **resources(kernel)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
