# SPDX-License-Identifier: Apache-2.0
"""The oracle: every step in plain torch, batched over leading dimensions, on any device."""

from kvarn_kernels.reference.attention import attention
from kvarn_kernels.reference.codes import pack_codes, unpack_codes
from kvarn_kernels.reference.hadamard import hadamard, rotate
from kvarn_kernels.reference.quantiser import QuantisedSide, cross_scale, quantise_side
from kvarn_kernels.reference.record import decode_tile, encode_tile

__all__ = [
    "QuantisedSide",
    "attention",
    "cross_scale",
    "decode_tile",
    "encode_tile",
    "hadamard",
    "pack_codes",
    "quantise_side",
    "rotate",
    "unpack_codes",
]
