# SPDX-License-Identifier: Apache-2.0
"""Encode a tile into its record and decode it again."""

from __future__ import annotations

import torch

from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.record import tile
from kvarn_kernels.record.format import first_token_dtype
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.reference.codes import pack_codes, unpack_codes
from kvarn_kernels.reference.quantiser import QuantisedSide, quantise_side, sanitise


def _prepend_zero(x: torch.Tensor, dim: int) -> torch.Tensor:
    return torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x], dim)


def encode_tile(k: torch.Tensor, v: torch.Tensor, config: KVarNConfig) -> torch.Tensor:
    """Encode the keys and values of a tile.

    Args:
        k, v: [..., G, D] rotated, any float dtype; leading dimensions are a batch of tiles.
        config: bit widths.

    Returns:
        uint8 [..., config.record_bytes(D)]; layout in `kvarn_kernels.record.tile`. Token 0 is stored exactly (16 bit:
        bf16 if k is bf16, else fp16) and left out of every statistic.

    Raises:
        ValueError: a shape that is not [..., 128, D] with a supported D.
    """
    if k.shape != v.shape or k.dim() < 2 or k.shape[-2] != TILE_SIZE:
        raise ValueError(
            f"expected k and v of the same shape [..., {TILE_SIZE}, head_dim], got {tuple(k.shape)} and "
            f"{tuple(v.shape)}: encode whole pages of one head"
        )
    head_dim = k.shape[-1]
    config.record_bytes(head_dim)
    keys = quantise_side(sanitise(k[..., 1:, :]).transpose(-1, -2), config.k_bits)
    values = quantise_side(sanitise(v[..., 1:, :]), config.v_bits)
    k_codes = pack_codes(_prepend_zero(keys.codes.transpose(-1, -2), -2), "k", config.k_bits)
    first_dtype = first_token_dtype(k.dtype)
    k_codes[..., 0] |= tile.header(first_dtype == torch.bfloat16)
    v_codes = pack_codes(_prepend_zero(values.codes, -2), "v", config.v_bits)
    halves = [
        keys.scale,
        keys.zero,
        values.cross,
        _prepend_zero(keys.cross, -1),
        _prepend_zero(values.scale, -1),
        _prepend_zero(values.zero, -1),
    ]
    firsts = [x[..., 0, :].to(first_dtype).contiguous().view(torch.uint8) for x in (k, v)]
    return torch.cat([k_codes, v_codes, *(h.half().contiguous().view(torch.uint8) for h in halves), *firsts], -1)


def _split(record: torch.Tensor, config: KVarNConfig, head_dim: int) -> tuple[QuantisedSide, QuantisedSide]:
    """Return the keys (codes [..., G, D], scale and zero per channel) and values of a record."""
    halves_at = tile.scales_offset(head_dim, config.k_bits, config.v_bits)
    values_at = tile.v_codes_offset(head_dim, config.k_bits)
    halves = record[..., halves_at:].contiguous().view(torch.float16).float()

    def section(start: int, length: int) -> torch.Tensor:
        return halves[..., start : start + length]

    keys = QuantisedSide(
        codes=unpack_codes(record[..., :values_at], "k", config.k_bits, head_dim),
        scale=section(tile.k_channel_scale_index(head_dim), head_dim),
        zero=section(tile.k_channel_zero_index(head_dim), head_dim),
        cross=section(tile.k_token_scale_index(head_dim), TILE_SIZE),
    )
    values = QuantisedSide(
        codes=unpack_codes(record[..., values_at:halves_at], "v", config.v_bits, head_dim),
        scale=section(tile.v_token_scale_index(head_dim), TILE_SIZE),
        zero=section(tile.v_token_zero_index(head_dim), TILE_SIZE),
        cross=section(tile.v_channel_scale_index(head_dim), head_dim),
    )
    return keys, values


def _first_tokens(record: torch.Tensor, config: KVarNConfig, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = tile.scales_offset(head_dim, config.k_bits, config.v_bits) + 2 * tile.k_first_index(head_dim)
    raw = record[..., start:].contiguous()
    is_bf16 = ((record[..., :1] & tile.HEADER_BF16) != 0)
    firsts = torch.where(is_bf16, raw.view(torch.bfloat16).float(), raw.view(torch.float16).float())
    return firsts[..., :head_dim], firsts[..., head_dim:]


def decode_tile(record: torch.Tensor, config: KVarNConfig, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Decode records uint8 [..., record_bytes] into (k, v), each float32 [..., G, D], rotated frame.

    Raises:
        ValueError: the last dimension is not the record size of config and head_dim.
    """
    if record.shape[-1] != config.record_bytes(head_dim):
        raise ValueError(
            f"expected records of {config.record_bytes(head_dim)} bytes ({config.name}, head_dim {head_dim}), got "
            f"{record.shape[-1]}: the cache was written with another preset or head_dim"
        )
    keys, values = _split(record, config, head_dim)
    k = (keys.codes * keys.scale.unsqueeze(-2) + keys.zero.unsqueeze(-2)) * keys.cross.unsqueeze(-1)
    v = (values.codes * values.scale.unsqueeze(-1) + values.zero.unsqueeze(-1)) * values.cross.unsqueeze(-2)
    k[..., 0, :], v[..., 0, :] = _first_tokens(record, config, head_dim)
    return k, v
