# SPDX-License-Identifier: Apache-2.0
"""What the demo shows at its end: a table and one JSON object of the same facts."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import httpx
from kvarn_kernels.config import KVarNConfig, preset_names
from rich.console import Console
from rich.table import Table

from sglang_kvarn.demo.chat import Turn
from sglang_kvarn.demo.server import Server


def bytes_per_token(model: str, preset: str) -> tuple[int, int]:
    """Return the cache bytes of one token over all layers and KV heads: with the preset, and in 16 bit.

    Example: SmolLM2-135M (30 layers, 3 KV heads, head_dim 64) with ``kvarn``: 5,310 and 23,040.

    Args:
        model: folder or name of a model.
        preset: one of `preset_names`, else a 16-bit cache.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model).get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = config.num_hidden_layers * config.num_key_value_heads
    exact = 2 * 2 * head_dim
    packed = KVarNConfig.from_preset(preset).bytes_per_token(head_dim) if preset in preset_names() else exact
    return heads * packed, heads * exact


def collect(server: Server, model: str, preset: str, turns: list[Turn]) -> dict[str, Any]:
    """Return the facts of the run: what the server says about itself and what the turns measured."""
    info = httpx.get(f"{server.url}/server_info", timeout=60, trust_env=False).json()
    packed, exact = bytes_per_token(model, preset)
    return {
        "kv_cache_dtype": preset,
        "model": model,
        "device": info["device"],
        "answers": [turn.answer for turn in turns],
        "prompt_tokens": turns[-1].prompt_tokens,
        "cached_tokens": turns[-1].cached_tokens,
        "max_total_num_tokens": info["max_total_num_tokens"],
        "bytes_per_token": packed,
        "bytes_per_token_16bit": exact,
        "start_seconds": round(server.start_seconds, 1),
        "turns": [asdict(turn) for turn in turns],
    }


def show(facts: dict[str, Any]) -> None:
    """Print the facts as a short table on stdout."""
    packed, exact = facts["bytes_per_token"], facts["bytes_per_token_16bit"]
    table = Table(
        title=f"{facts['kv_cache_dtype']} on {facts['device']}", show_header=False, title_justify="left"
    )
    table.add_row("tokens of the second prompt", f"{facts['prompt_tokens']:,}")
    table.add_row("  of these from the prefix cache", f"{facts['cached_tokens']:,}")
    table.add_row("tokens in the pool", f"{facts['max_total_num_tokens']:,}")
    table.add_row("bytes per token, all layers", f"{packed:,} (16 bit: {exact:,}, {exact / packed:.2f}x)")
    table.add_row(
        "first token, turns 1 and 2", ", ".join(f"{t['first_token_seconds']:.1f} s" for t in facts["turns"])
    )
    table.add_row(
        "start of the server, whole demo", f"{facts['start_seconds']:.0f} s, {facts['seconds']:.0f} s"
    )
    Console().print(table)
