# SPDX-License-Identifier: Apache-2.0
"""Without a GPU the Triton kernels are interpreted; the switch must be set before triton is imported."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
