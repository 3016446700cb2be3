# SPDX-License-Identifier: Apache-2.0
"""CUDA sources of this project compiled by NVRTC, without a GPU, and what ptxas made of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import torch
import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def compiled(source: str, kernel: str, capability: str) -> bytes:
    code, _ = torch.cuda._utils._nvrtc_compile(source, kernel, compute_capability=capability)
    return code


def registers_and_stack(code: bytes, folder: Path) -> tuple[int, int]:
    """Return the registers of a thread and its bytes of local memory, of the only kernel in a cubin."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code)
    done = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    assert usage, done.stdout
    return int(usage[1]), int(usage[2])


def product_groups(code: bytes, folder: Path) -> tuple[int, int]:
    """Return the products of a warpgroup in a cubin's only kernel, and after how many of them a group ends.

    Where ptxas gives up on letting products overlap with what stands between them, a group ends after each.
    """
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(code)
    done = subprocess.run([CUOBJDUMP, "--dump-sass", cubin], capture_output=True, text=True, check=True)
    products = re.findall(r"HGMMA.*", done.stdout)
    return len(products), sum("gsb0" in line for line in products)
