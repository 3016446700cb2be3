# SPDX-License-Identifier: Apache-2.0
"""`python -m sglang.launch_server`, whose other processes are copies of its first one.

SGLang lets each of the three processes of a server start anew. On two cores their imports take most of the time until
a server answers, and here only the first process imports anything. The others have the hooks that it has applied; where
each loads its plugins itself, as for a user, is tested by engines.
"""

from __future__ import annotations

import importlib
import multiprocessing
import runpy

# what the other processes import
IMPORTED = ("entrypoints.http_server", "managers.scheduler", "managers.detokenizer_manager", "models.registry")


def main() -> None:
    """Run the server that the command line describes."""
    for name in IMPORTED:
        importlib.import_module(f"sglang.srt.{name}")
    multiprocessing.set_start_method("fork")
    # SGLang sets its own way
    multiprocessing.set_start_method = lambda *args, **kwargs: None
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    main()
