# SPDX-License-Identifier: Apache-2.0
"""Bugs of channel balance and what becomes of it in a model."""

from __future__ import annotations

from .mutation import Mutation
from .paths import BACKEND, BALANCE, BALANCED_LAYERS, ENGINE_BALANCE, TEST_BALANCE, TEST_BALANCED_LAYERS

MUTATIONS = (
    Mutation(
        "a RoPE pair with two factors",
        BALANCE,
        "if self.partners is not None:",
        "if False:",
        (f"{TEST_BALANCE}::test_no_weight_grows_beyond_its_dtype",),
    ),
    Mutation(
        "a factor that takes a weight beyond its dtype",
        BALANCE,
        "torch.minimum(torch.maximum(ideal, -shrink), grow)",
        "ideal",
        (f"{TEST_BALANCE}::test_no_weight_grows_beyond_its_dtype",),
    ),
    Mutation(
        "a value bias that is added nowhere",
        BACKEND,
        "add_(bias[:, None])",
        "add_(0 * bias[:, None])",
        (ENGINE_BALANCE,),
    ),
    Mutation(
        "an update into balanced weights",
        BALANCED_LAYERS,
        "        chosen.take_out(weights)\n",
        "        pass\n",
        (TEST_BALANCED_LAYERS,),
    ),
)
