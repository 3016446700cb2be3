# SPDX-License-Identifier: Apache-2.0
"""What must be set before torch and triton are imported by any test, the seed, poison in fresh memory, and logging."""

import os

# engines share the cores with the tests; OpenMP threads that spin would starve them
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import logging
import sys
from collections.abc import Callable, Iterator
from functools import wraps

import pytest
import torch

if not torch.cuda.is_available():
    # a kernel is made for the interpreter or the compiler when its module is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

PACKAGES = ("kvarn_kernels", "sglang_kvarn")
# torch.device as a context notes the functions that allocate on its first use: before `poisoned_memory` replaces some
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """Take back the log handlers of a test: SGLang's command line adds one that writes to what pytest closes."""
    root = logging.getLogger()
    before = root.handlers[:]
    yield
    for handler in root.handlers[:]:
        if type(handler) is logging.StreamHandler and handler not in before:
            root.removeHandler(handler)


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return the function, with NaN (integers: 0xFF) in what it gives to code of PACKAGES."""

    @wraps(allocate)
    def poisoned(*args, **kwargs) -> torch.Tensor:
        x = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in PACKAGES and x.device.type != "meta":
            x.fill_(float("nan")) if x.is_floating_point() else x.view(torch.uint8).fill_(0xFF)
        return x

    return poisoned


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch) -> None:
    """Let no test pass because memory that was never written happened to hold zeros."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))
