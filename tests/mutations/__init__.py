# SPDX-License-Identifier: Apache-2.0
"""Plausible bugs, a table for each room of the code; `python -m tests.mutations.run` shows that tests catch them."""

from . import (
    attention,
    balance,
    columns,
    decode,
    decode_plan,
    dense,
    dequantise,
    drafts,
    extend,
    extend_columns,
    host,
    metadata,
    plugin,
    record,
    rings,
    states,
    torch_form,
    transfer,
    windows,
    write,
)

_ROOMS = (
    *(record, write, decode, columns, decode_plan, extend, extend_columns, dense, dequantise),
    *(attention, torch_form, balance, plugin, rings, metadata, drafts, states, host, transfer, windows),
)
MUTATIONS = tuple(mutation for room in _ROOMS for mutation in room.MUTATIONS)
