# SPDX-License-Identifier: Apache-2.0
"""The layout of a record for CUDA C++: constants in front of a source."""

from __future__ import annotations

from typing import Any

from kvarn_kernels.record import tile


def rotation_constants(head_dim: int, is_bf16: bool) -> dict[str, Any]:
    """Return the constants that every kernel over rows of the model's dtype needs."""
    return {"D": head_dim, "BF16": int(is_bf16), "ROTATION_SCALE": f"{head_dim**-0.5!r}f"}


def format_constants(
    bits: tuple[int, int], head_dim: int, num_kv_heads: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants that every kernel over records and rings needs; every offset comes from `tile`.

    Args:
        bits: of a key code and of a value code.
    """
    k_bits, v_bits = bits
    return rotation_constants(head_dim, is_bf16) | {
        "G": tile.TILE_SIZE,
        "K_BITS": k_bits,
        "V_BITS": v_bits,
        "K_FIELD_BITS": tile.low_bits(k_bits),
        "V_FIELD_BITS": tile.low_bits(v_bits),
        "HK": num_kv_heads,
        "RING_PAGES": ring_pages,
        "RING_TOKENS": tile.exact_tokens(head_dim, k_bits, v_bits, 2),
        "K_CHANNEL_BLOCKS": tile.k_channel_blocks(head_dim, k_bits),
        "V_CHANNEL_BLOCKS": tile.v_channel_blocks(v_bits),
        "TOP_INDEX": tile.top_index(head_dim),
        "RECORD": tile.record_bytes(head_dim, k_bits, v_bits),
        "V_CODES_OFFSET": tile.v_codes_offset(head_dim, k_bits),
        "SCALES_OFFSET": tile.scales_offset(head_dim, k_bits, v_bits),
        "K_CHANNEL_SCALE": tile.k_channel_scale_index(head_dim),
        "K_CHANNEL_ZERO": tile.k_channel_zero_index(head_dim),
        "V_CHANNEL_SCALE": tile.v_channel_scale_index(head_dim),
        "K_TOKEN_SCALE": tile.k_token_scale_index(head_dim),
        "V_TOKEN_SCALE": tile.v_token_scale_index(head_dim),
        "V_TOKEN_ZERO": tile.v_token_zero_index(head_dim),
        "K_FIRST": tile.k_first_index(head_dim),
        "V_FIRST": tile.v_first_index(head_dim),
    }
