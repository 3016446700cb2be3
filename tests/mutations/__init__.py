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
    host,
    metadata,
    plugin,
    record,
    rings,
    short_steps,
    states,
    torch_form,
    transfer,
    windows,
    write,
)

_ROOMS = (
    *(record, write, decode, columns, decode_plan, extend, short_steps, dense, dequantise),
    *(attention, torch_form, balance, plugin, rings, metadata, drafts, states, host, transfer, windows),
)
MUTATIONS = tuple(mutation for room in _ROOMS for mutation in room.MUTATIONS)
