# SPDX-License-Identifier: Apache-2.0
"""Pack and unpack codes in the field order of `kvarn_kernels.tile`."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvarn_kernels import tile

TILE_SIZE = tile.TILE_SIZE


@lru_cache(maxsize=16)
def code_places(side: str, bits: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (word index, bit) of every code in a plane of a side ("k" or "v"), int64 and int32 [G, D]."""
    token, channel = torch.arange(TILE_SIZE)[:, None], torch.arange(head_dim)[None, :]
    if side == "k":
        tokens, channels = tile.k_token_blocks(head_dim, bits), tile.k_channel_blocks(head_dim, bits)
        inner = channel % channels
        field = tile.k_field.fn(token % tokens, inner // 2, inner % 2, head_dim, bits)
        word = token // tokens * (head_dim // channels) + channel // channels
    else:
        width = head_dim // tile.v_channel_blocks(bits)
        field = tile.v_field.fn(token % 4 // 2, channel // width, token % 2, bits)
        word = tile.v_word_index.fn(token // 4, channel % width, width)
    return word, (field * bits).int()


def pack_codes(codes: torch.Tensor, side: str, bits: int) -> torch.Tensor:
    """Pack codes [..., G, D] (int32, 0 .. 2^bits - 1) of a side into uint8 [..., G * D * bits / 8], plane by plane."""
    planes = enumerate(tile.planes(bits))
    return torch.cat([_pack_plane(codes >> tile.plane_shift(bits, n) & 2**b - 1, side, b) for n, b in planes], -1)


def unpack_codes(packed: torch.Tensor, side: str, bits: int, head_dim: int) -> torch.Tensor:
    """Unpack uint8 [..., G * D * bits / 8] of a side into codes int32 [..., G, D]."""
    sizes = [TILE_SIZE * head_dim * b // 8 for b in tile.planes(bits)]
    codes = None
    for n, plane in enumerate(packed.split(sizes, -1)):
        part = _unpack_plane(plane, side, tile.planes(bits)[n], head_dim)
        codes = part if codes is None else codes.bitwise_or_(part << tile.plane_shift(bits, n))
    assert codes is not None, "codes have at least one plane"
    return codes


def _pack_plane(codes: torch.Tensor, side: str, bits: int) -> torch.Tensor:
    *lead, tokens, head_dim = codes.shape
    word, bit = (x.to(codes.device) for x in code_places(side, bits, head_dim))
    words = torch.zeros(*lead, tokens * head_dim * bits // 32, dtype=torch.int64, device=codes.device)
    # fields do not overlap, so the sum is the bitwise or
    words.index_add_(-1, word.flatten(), (codes.long() << bit).flatten(-2))
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.contiguous().view(torch.uint8)


def _unpack_plane(packed: torch.Tensor, side: str, bits: int, head_dim: int) -> torch.Tensor:
    word, bit = (x.to(packed.device) for x in code_places(side, bits, head_dim))
    words = packed.contiguous().view(torch.int32)
    # every word is shifted by all its fields at once, in an order that needs no copy of the codes afterwards
    if side == "k":
        tokens, channels = tile.k_token_blocks(head_dim, bits), tile.k_channel_blocks(head_dim, bits)
        # [G / TB, TB, D / CB, CB]
        words = words.unflatten(-1, (TILE_SIZE // tokens, 1, head_dim // channels, 1))
        shifts = bit[:tokens, None, :channels]
    else:
        width = head_dim // tile.v_channel_blocks(bits)
        # [G / 4, 4, CB, D / CB]
        words = words.index_select(-1, word[::4, :width].flatten()).unflatten(
            -1, (TILE_SIZE // 4, 1, 1, width)
        )
        shifts = bit[:4, ::width, None]
    return (words >> shifts).bitwise_and_(2**bits - 1).flatten(-2).flatten(-3, -2)
