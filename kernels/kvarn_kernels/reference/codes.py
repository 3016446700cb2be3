# SPDX-License-Identifier: Apache-2.0
"""Pack and unpack codes in the field order of `kvarn_kernels.tile`."""

from __future__ import annotations

import torch

TILE_SIZE = 128


def pack_codes(codes: torch.Tensor, bits: int, token_blocks: int, channel_blocks: int) -> torch.Tensor:
    """Pack codes [..., G, D] (int32, 0 .. 2^bits - 1) into uint8 [..., G * D * bits / 8]."""
    *lead, tokens, channels = codes.shape
    fields = codes.reshape(*lead, token_blocks, tokens // token_blocks, channel_blocks, channels // channel_blocks)
    fields = fields.movedim(-2, -3).reshape(*lead, -1, tokens // token_blocks, channels // channel_blocks).long()
    shifts = bits * torch.arange(fields.shape[-3], device=codes.device)
    words = (fields << shifts[:, None, None]).sum(-3)
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.flatten(-2).contiguous().view(torch.uint8)


def unpack_codes(packed: torch.Tensor, bits: int, token_blocks: int, channel_blocks: int, head_dim: int) -> torch.Tensor:
    """Unpack uint8 [..., G * D * bits / 8] into codes int32 [..., G, D]."""
    words = packed.contiguous().view(torch.int32)
    words = words.unflatten(-1, (TILE_SIZE // token_blocks, head_dim // channel_blocks))
    shifts = bits * torch.arange(32 // bits, device=packed.device, dtype=torch.int32)
    fields = (words.unsqueeze(-3) >> shifts[:, None, None]) & (2**bits - 1)
    fields = fields.unflatten(-3, (token_blocks, channel_blocks)).movedim(-3, -2)
    return fields.flatten(-2).flatten(-3, -2)
