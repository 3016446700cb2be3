# SPDX-License-Identifier: Apache-2.0
"""Bugs of the order of what a step does."""

from __future__ import annotations

from .mutation import Mutation
from .paths import ATTENTION, TEST_DECODE, TEST_EXTEND, TEST_EXTEND_DENSE

_STORE_STEP = "        rotate.rotate_to_rings(new, workspace.rotated_q, cache, batch, config)\n"
_ENCODE_STEP = "        self._encode.encode_from_ring(cache, batch, config)\n"
_STORE_CHUNK = "        self._store.store_chunk(rotated, cache, batch, config)\n"
_ENCODE_CHUNK = "        self._encode.encode_from_chunk(rotated, cache, batch, config)\n"
_ATTEND = "        if isinstance(plan, extend_dense.DensePlan):\n"

MUTATIONS = (
    Mutation(
        "page encoded before its last token is stored",
        ATTENTION,
        _STORE_STEP + _ENCODE_STEP,
        _ENCODE_STEP + _STORE_STEP,
        (f"{TEST_DECODE}::test_decode_keeps_encoding_pages_over_many_steps",),
    ),
    Mutation(
        "ring written before the chunk is attended",
        ATTENTION,
        _ATTEND,
        _STORE_CHUNK + _ATTEND,
        (
            f"{TEST_EXTEND}::test_extend_stores_the_same_bytes_as_the_torch_form",
            f"{TEST_EXTEND_DENSE}::test_extend_dense_step_stores_the_same_bytes_as_the_torch_form",
        ),
    ),
    Mutation(
        "ring written before the pages of the chunk are encoded (kernels)",
        ATTENTION,
        _ENCODE_CHUNK,
        _STORE_CHUNK + _ENCODE_CHUNK,
        (f"{TEST_EXTEND}::test_extend_stores_the_same_bytes_as_the_torch_form",),
    ),
)
