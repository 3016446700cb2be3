# SPDX-License-Identifier: Apache-2.0
"""KVarN for SGLang: the two functions that SGLang's plugin loader calls. Importing it is free."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Register preset names, attention backend and hooks; called by SGLang in every process it starts.

    Raises:
        RuntimeError: the installed SGLang is not a tested version, or a hook does not fit it. SGLang logs
            this and goes on without the plugin, so that the preset names stay unknown.
    """
    from sglang_kvarn import plugin
    from sglang_kvarn.cpu import platform

    platform.prepare_environment()
    plugin.register_all()


def activate_cpu_platform() -> str | None:
    """Return the class of the CPU platform, None where a device or another platform plugin is to be used."""
    from sglang_kvarn.cpu import platform

    return platform.activate()
