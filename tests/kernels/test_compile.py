# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the entry points launch compiles for the GPUs that we serve, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
# shared memory that a block may use, bytes (CUDA C programming guide, table of compute capabilities)
SHARED_LIMIT = {
    80: 163 * 1024,
    86: 99 * 1024,
    89: 99 * 1024,
    90: 227 * 1024,
    100: 227 * 1024,
    120: 99 * 1024,
}
KERNELS = {
    "_rotate_kernel",
    "_encode_ring_kernel",
    "_encode_chunk_kernel",
    "_store_kernel",
    "_extend_kernel",
    "_dequantise_kernel",
    "_merge_parts_kernel",
    "_weigh_against_sinks_kernel",
    "_plan_kernel",
    "_decode_kernel",
    "_merge_kernel",
}
# preset, head_dim, dtype, query heads, KV heads
FORMS = [
    ("kvarn", 128, "bfloat16", 32, 8),
    ("kvarn_k2v2_g128", 64, "float16", 9, 3),
    ("kvarn_k4v4_g128_canonical", 256, "bfloat16", 8, 1),
    ("kvarn_k3v2_g128", 64, "float16", 9, 3),
    ("kvarn_k4v3_g128", 128, "bfloat16", 32, 8),
    ("kvarn_k4v4_g128", 128, "float16", 28, 4),
    ("kvarn", 64, "float16", 9, 3),
    ("kvarn", 256, "bfloat16", 16, 8),
    ("kvarn_k2v2_g128", 128, "bfloat16", 32, 8),
]
# every capability once, with every head_dim and dtype, and presets of 2, 3 and 4 bits; -m long is the product of both
SHORT = list(zip((90, 80, 100, 86, 120, 89), FORMS, strict=False))
LONG = [(capability, form) for form in FORMS for capability in SHARED_LIMIT if (capability, form) not in SHORT]


@pytest.mark.parametrize(
    ("capability", "form"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)],
    ids=lambda x: f"sm_{x}" if isinstance(x, int) else "-".join(map(str, x)),
)
def test_compile_every_kernel_for_a_capability(capability, form):
    arguments = [capability, SHARED_LIMIT[capability], *form]
    command = [sys.executable, str(SUPPORT / "compile_kernels.py"), *map(str, arguments)]
    path = os.pathsep.join([str(SUPPORT), *filter(None, sys.path)])
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["kernel"] for line in compiled} == KERNELS
    for line in compiled:
        assert line["shared"] <= SHARED_LIMIT[capability], line
