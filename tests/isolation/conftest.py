# SPDX-License-Identifier: Apache-2.0
"""SGLang's pools with the plugin in place, in this process; kernels interpreted where there is no GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def sglang() -> None:
    """Load the plugin's hooks."""
    from sglang_kvarn import compat, plugin
    from sglang_kvarn.cpu import platform

    # thousands of small tensors: more threads only wait for each other
    torch.set_num_threads(1)
    platform.prepare_environment()
    compat.load_plugins()
    plugin.register_rest()


@pytest.fixture(scope="module", autouse=True)
def published(sglang: None) -> None:
    """Publish the few server arguments that SGLang's pools read; a test of another folder may have taken them back."""
    from prefix_cache import calls

    calls.publish_arguments()


@pytest.fixture(autouse=True)
def device_of_torch() -> Iterator[None]:
    """Give SGLang back its streams, threads and keys, in whose place worlds with host memory put their own."""
    from host_tier import users_of_streams
    from storage_tier import places

    taken = [(module, "device_module") for module in users_of_streams()] + places()
    before = [getattr(*place) for place in taken]
    yield
    for place, value in zip(taken, before, strict=True):
        setattr(*place, value)
