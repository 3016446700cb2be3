# SPDX-License-Identifier: Apache-2.0
"""Bugs of channel balance and what becomes of it in a model."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ATTENTION_MODULES,
    BACKEND,
    BALANCE,
    BALANCED_LAYERS,
    ENGINE_BALANCE,
    ENGINE_HYBRID,
    TEST_ATTENTION_MODULES,
    TEST_BALANCE,
    TEST_BALANCED_LAYERS,
)

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
        "        balanced_layers.add_output_bias(layer, out)\n",
        "",
        (ENGINE_BALANCE,),
    ),
    Mutation(
        "queries and keys of gated attention that lack their factors",
        BACKEND,
        "q, k = balanced_layers.multiplied(layer, q, k)",
        "q, _ = balanced_layers.multiplied(layer, q, k)",
        (ENGINE_HYBRID,),
    ),
    Mutation(
        "factors in a norm that multiplies by its weight and one",
        BALANCE,
        "in_weights=norms is None or norms.offset == 0,",
        "in_weights=True,",
        (TEST_ATTENTION_MODULES,),
    ),
    Mutation(
        "the gate in the place of the queries",
        ATTENTION_MODULES,
        "x[::parts]",
        "x[parts - 1 :: parts]",
        (f"{TEST_ATTENTION_MODULES}::test_weights_say_how_large_a_channel_is",),
    ),
    Mutation(
        "norms that Falcon-H1 makes and leaves out",
        ATTENTION_MODULES,
        "if _name(module) == _WITHOUT_NORMS or not",
        "if not",
        (TEST_ATTENTION_MODULES,),
    ),
    Mutation(
        "halves of a head as pairs where RoPE turns neighbours",
        ATTENTION_MODULES,
        "rope.is_neox_style)",
        "True)",
        (TEST_ATTENTION_MODULES,),
    ),
    Mutation(
        "channels balanced whose keys and values stay in 16 bits",
        ATTENTION_MODULES,
        "attn.sliding_window_size + 1 in (0, *windows)",
        "True",
        (f"{TEST_BALANCED_LAYERS}::test_layers_with_a_sliding_window_are_balanced_where_it_is_read_from_records",),
    ),
    Mutation(
        "channels of sliding windows in records left as they are",
        ATTENTION_MODULES,
        "attn.sliding_window_size + 1 in (0, *windows)",
        "attn.sliding_window_size == -1",
        (f"{TEST_BALANCED_LAYERS}::test_layers_with_a_sliding_window_are_balanced_where_it_is_read_from_records",),
    ),
    Mutation(
        "a rank of Olmo balances the heads of another one",
        ATTENTION_MODULES,
        "weight.view(-1, size)[module.tp_rank]",
        "weight.view(-1, size)[0]",
        (f"{TEST_ATTENTION_MODULES}::test_a_rank_of_olmo_balances_its_own_heads_in_a_norm_of_all",),
    ),
    Mutation(
        "an update into balanced weights",
        BALANCED_LAYERS,
        "        chosen.take_out(weights)\n",
        "        pass\n",
        (TEST_BALANCED_LAYERS,),
    ),
)
