# SPDX-License-Identifier: Apache-2.0
"""KVarN for SGLang: the two functions that SGLang's plugin loader calls. Importing this module imports nothing else."""

from __future__ import annotations

__version__ = "0.1.0"


def register() -> None:
    """Register the preset names, the attention backend and the hooks; called by SGLang in every process it starts.

    Raises:
        RuntimeError: the installed SGLang is not a tested version, or a hook no longer fits it. SGLang logs this and
            goes on without the plugin, so that the preset names stay unknown.
    """
    from sglang_kvarn import cpu_platform, hooks

    cpu_platform.prepare_environment()
    hooks.register_all()


def activate_cpu_platform() -> str | None:
    """Return the class of the CPU platform, or None where a device or another platform plugin is to be used."""
    from sglang_kvarn import cpu_platform

    return cpu_platform.activate()
