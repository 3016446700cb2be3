# SPDX-License-Identifier: Apache-2.0
"""SGLang's pools with the plugin in place, in this process; kernels interpreted where there is no GPU."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def sglang() -> None:
    """Load the plugin's hooks and the few server arguments that SGLang's pools read."""
    from sglang_kvarn import compat, plugin
    from sglang_kvarn.cpu import platform

    # thousands of small tensors: more threads only wait for each other
    torch.set_num_threads(1)
    platform.prepare_environment()
    compat.load_plugins()
    plugin.register_rest()
    from prefix_cache import calls

    calls.publish_arguments()
