# SPDX-License-Identifier: Apache-2.0
"""The command that starts the server of a plan, with the flags that it needs and no others.

Attention backend, page size and the share of states of a hybrid model are what the plugin chooses by itself.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from typing import Any

from sglang_kvarn import compat, refusals
from sglang_kvarn.drafts import DFLASH, NGRAM

# flags that a server takes as the plan does
_AS_GIVEN = (
    "mem_fraction_static",
    "max_running_requests",
    "speculative_algorithm",
    "speculative_draft_model_path",
    "speculative_num_draft_tokens",
)
# the default, then presets of fewer bytes, for sessions that do not fit with it
PRESETS = ("kvarn", "kvarn_k3v2_g128", "kvarn_k2v2_g128")


def _command(options: argparse.Namespace, model_config: Any, preset: str) -> str:
    """Return a line for a shell."""
    host_memory = bool(options.hicache_size)
    variables = refusals.trials_on_gpus(
        model_config, ranks=options.tp, host_memory=host_memory, algorithm=options.speculative_algorithm or ""
    )
    words = [*(f"{name}=1" for name in variables), "python", "-m", "sglang.launch_server"]
    words += ["--model-path", options.folder, "--kv-cache-dtype", preset]
    if options.tp > 1:
        words += ["--tp-size", str(options.tp)]
    if options.trust_remote_code:
        words.append("--trust-remote-code")
    for name in _AS_GIVEN:
        if (given := getattr(options, name)) is not None:
            words += ["--" + name.replace("_", "-"), str(given)]
    if options.speculative_algorithm == NGRAM:
        words += ["--speculative-ngram-max-bfs-breadth", "1"]
    elif options.speculative_num_draft_tokens and options.speculative_algorithm != DFLASH:
        words += ["--speculative-num-steps", str(options.speculative_num_draft_tokens - 1)]
    if host_memory:
        words += ["--enable-hierarchical-cache", "--hicache-size", str(options.hicache_size)]
    if compat.hybrid_config(model_config) is not None and not compat.saves_states_at_page_ends():
        words.append("--disable-radix-cache")
    return shlex.join(words)


def recommend(
    options: argparse.Namespace, model_config: Any, plan_of: Callable[[str], dict[str, Any]]
) -> dict[str, Any]:
    """Return the command for what a plan was asked, and whether a GPU or host memory then holds the sessions.

    Args:
        options: of the plan; model_config: SGLang's ModelConfig; plan_of: returns the row of a preset in the plan.
    """

    def holds(preset: str) -> bool:
        row = plan_of(preset)
        return max(row["sessions"], row.get("host_sessions", 0)) >= options.sessions

    preset = next(filter(holds, PRESETS), None)
    return {"command": _command(options, model_config, preset or PRESETS[0]), "fits": preset is not None}
