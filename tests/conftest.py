# SPDX-License-Identifier: Apache-2.0
"""What must be set before torch and triton are imported by any test."""

import os

# engines share the cores with the tests; OpenMP threads that spin would starve them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

if not torch.cuda.is_available():
    # a kernel is made for the interpreter or the compiler when its module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
