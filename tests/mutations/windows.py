# SPDX-License-Identifier: Apache-2.0
"""Bugs of models with sliding windows: sinks that are lost or counted twice, layers and tokens of the other kind."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    BACKEND,
    CAPACITY,
    COMPAT,
    EXTEND,
    EXTEND_DENSE,
    MERGE,
    MIXED_BACKEND,
    TEST_BUDGET,
    TEST_KNOWN,
    TEST_SINKS,
    TEST_WINDOWS,
    TORCH_FORM,
)

MUTATIONS = (
    Mutation(
        "sinks of other heads where drafts are merged",
        MERGE,
        "tl.load(sinks_ptr + r % SINKS)",
        "tl.load(sinks_ptr + r % HQ % SINKS * 0)",
        (TEST_SINKS,),
    ),
    Mutation(
        "sinks counted in every split of an extend step and where they are merged",
        EXTEND,
        "    if SINKS and not SPLIT:\n",
        "    if SINKS:\n",
        (TEST_SINKS,),
    ),
    Mutation(
        "sinks smaller than the weights of keys by the shift",
        EXTEND,
        "tl.where(empty, 0.0, m) - SHIFT)",
        "tl.where(empty, 0.0, m))",
        (TEST_SINKS,),
    ),
    Mutation(
        "sinks lost in dense steps of one call",
        EXTEND_DENSE,
        "    if sinks is not None:\n        assert lse",
        "    if sinks is not None and len(plan.segments) > 1:\n        assert lse",
        (TEST_SINKS,),
    ),
    Mutation(
        "sinks of the torch form before the queries of a head",
        TORCH_FORM,
        ".expand(-1, -1, queries).reshape(kv_heads, -1, 1)",
        ".expand(-1, -1, queries).transpose(1, 2).reshape(kv_heads, -1, 1)",
        (TEST_SINKS,),
    ),
    Mutation(
        "sinks of a layer not handed on",
        BACKEND,
        'sinks = extra.pop("sinks", None)',
        'sinks = extra.pop("sinks", None) and None',
        (TEST_WINDOWS,),
    ),
    Mutation(
        "records attended in layers with a sliding window",
        MIXED_BACKEND,
        "self._sliding if layer.layer_id in self._sliding_ids else self._full",
        "self._full if layer.layer_id in self._sliding_ids else self._sliding",
        (TEST_WINDOWS,),
    ),
    Mutation(
        "sliding windows evicted for a ring",
        COMPAT,
        "tree_cache.evict(params(num_tokens=missing))",
        "tree_cache.evict(params(num_tokens=missing, swa_num_tokens=tokens))",
        (TEST_KNOWN,),
    ),
    Mutation(
        "sliding windows share the memory by the price of records",
        CAPACITY,
        "of_token = self.token if self.is_chosen else self.plain_token",
        "of_token = self.token",
        (TEST_BUDGET,),
    ),
)
