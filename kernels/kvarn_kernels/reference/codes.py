# SPDX-License-Identifier: Apache-2.0
"""Pack and unpack codes in the field order of `kvarn_kernels.record.tile`."""

from __future__ import annotations

from functools import lru_cache

import torch

from kvarn_kernels.record import tile
from kvarn_kernels.record.tile import TILE_SIZE


@lru_cache(maxsize=16)
def code_places(side: str, bits: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (word index, bit) of every code of a side ("k" or "v"), int64 and int32 [G, D]; of 3 bits, the low two."""
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
    return word, (field * tile.low_bits(bits)).int()


@lru_cache(maxsize=8)
def _top_places(side: str, head_dim: int) -> torch.Tensor:
    """Return the indices of the two low words whose top bits each top word has, int64 [2, G * D / 32]."""
    top = torch.arange(TILE_SIZE * head_dim // 32)
    if side == "k":
        width = head_dim // tile.k_channel_blocks(head_dim, 3)
        first = top // width * 2 * width + top % width
        return torch.stack([first, first + width])
    half = head_dim // 8
    row, column = torch.arange(TILE_SIZE // 4)[:, None], torch.arange(half)[None, :]
    places = torch.empty(2, len(top), dtype=torch.int64)
    for upper in range(2):
        low = tile.v_word_index.fn(row, column + half * upper, 2 * half)
        places[upper, tile.v_word_index.fn(row, column, half).flatten()] = low.flatten()
    return places


def pack_codes(codes: torch.Tensor, side: str, bits: int) -> torch.Tensor:
    """Pack codes [..., G, D] (int32, 0 .. 2^bits - 1) of a side into uint8 [..., G * D * bits / 8]."""
    if bits != 3:
        return _to_bytes(_pack_fields(codes, side, bits))
    # two words of 2-bit fields that hold 0 or 1 fit into each other
    tops = _pack_fields(codes >> 2, side, 3)[..., _top_places(side, codes.shape[-1]).to(codes.device)]
    return _to_bytes(torch.cat([_pack_fields(codes & 3, side, 3), tops[..., 0, :] | tops[..., 1, :] << 1], -1))


def unpack_codes(packed: torch.Tensor, side: str, bits: int, head_dim: int) -> torch.Tensor:
    """Unpack uint8 [..., G * D * bits / 8] of a side into codes int32 [..., G, D]."""
    words = packed.contiguous().view(torch.int32)
    if bits != 3:
        return _unpack_fields(words, side, bits, head_dim)
    low, top = words.split([tile.top_index(head_dim), TILE_SIZE * head_dim // 32], -1)
    tops = torch.empty_like(low)
    for n, places in enumerate(_top_places(side, head_dim).to(words.device)):
        tops[..., places] = top >> n & 0x55555555
    return _unpack_fields(low, side, 3, head_dim).bitwise_or_(_unpack_fields(tops, side, 3, head_dim) << 2)


def _to_bytes(words: torch.Tensor) -> torch.Tensor:
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.contiguous().view(torch.uint8)


def _pack_fields(codes: torch.Tensor, side: str, bits: int) -> torch.Tensor:
    """Pack codes that fit into a field into words, int64 [..., W] from 0 to 2^32 - 1."""
    *lead, tokens, head_dim = codes.shape
    word, bit = (x.to(codes.device) for x in code_places(side, bits, head_dim))
    size = tokens * head_dim * tile.low_bits(bits) // 32
    words = torch.zeros(*lead, size, dtype=torch.int64, device=codes.device)
    # fields do not overlap, so the sum is the bitwise or
    return words.index_add_(-1, word.flatten(), (codes.long() << bit).flatten(-2))


def _unpack_fields(words: torch.Tensor, side: str, bits: int, head_dim: int) -> torch.Tensor:
    """Unpack words int32 [..., W] into what their fields hold, int32 [..., G, D]."""
    word, bit = (x.to(words.device) for x in code_places(side, bits, head_dim))
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
    return (words >> shifts).bitwise_and_(2 ** tile.low_bits(bits) - 1).flatten(-2).flatten(-3, -2)
