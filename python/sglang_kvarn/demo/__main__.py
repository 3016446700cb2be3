# SPDX-License-Identifier: Apache-2.0
"""Serve a model with a KVarN cache, hold a two-turn chat with it, and show what the cache did.

    python -m sglang_kvarn.demo [--model DIR] [--kv-cache-dtype PRESET] [--port N] [--max-tokens N]

The answers stream to the terminal; a table follows; the last line of stdout is one JSON object. The server is
a stock `python -m sglang.launch_server`, on the GPU if there is one, else on the CPU, and ends with the demo.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from time import monotonic

from kvarn_kernels.config import preset_names

_GEMMA3 = "gemma3-270m"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(prog="python -m sglang_kvarn.demo", description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--model",
        help=f"folder or name of a model, or {_GEMMA3}, which has sliding windows and, like the default, comes from "
        "PyPI; default: SmolLM2-135M-Instruct",
    )
    parser.add_argument(
        "--kv-cache-dtype",
        default="kvarn",
        choices=[*preset_names(), "auto"],
        help="preset of the cache, or auto for SGLang's own cache in 16 bit (default: %(default)s)",
    )
    parser.add_argument("--port", type=int, help="TCP port of the server on 127.0.0.1; default: a free one")
    parser.add_argument(
        "--max-tokens", type=int, default=48, help="most tokens of an answer (default: %(default)s)"
    )
    return parser.parse_args(arguments)


def _end_on_signal(number: int, frame: object) -> None:
    sys.exit(128 + number)


def main(arguments: list[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    options = parse_arguments(arguments)
    # a shell starts background jobs with Ctrl-C ignored; the other signals must leave the same way as Ctrl-C,
    # through the code that ends the server
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end_on_signal)
    started = monotonic()

    from rich.console import Console

    from sglang_kvarn.demo import chat, gemma3, report, server
    from sglang_kvarn.demo import model as default_model

    progress = Console(stderr=True)
    try:
        port = server.choose_port(options.port)
        if options.model in (None, _GEMMA3):
            model = str((default_model if options.model is None else gemma3).prepare())
        else:
            model = options.model
        flags = ["--model-path", model, "--kv-cache-dtype", options.kv_cache_dtype, "--enable-cache-report"]
        with server.running(server.launch_command(flags, port), port, progress) as running:
            progress.print(
                f"server ready after {running.start_seconds:.0f} s, log in {running.log}", highlight=False
            )
            turns = chat.hold(running, options.max_tokens)
            facts = report.collect(running, model, options.kv_cache_dtype, turns)
    except RuntimeError as error:
        progress.print(f"the demo failed: {error}", highlight=False, markup=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    facts["seconds"] = round(monotonic() - started, 1)
    report.show(facts)
    print(json.dumps(facts), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
