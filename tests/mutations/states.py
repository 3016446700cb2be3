# SPDX-License-Identifier: Apache-2.0
"""Bugs of hybrid models: states of a wrong token, of a kind that is not known, of a wrong size."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ADMISSION,
    COMPAT,
    PLAN,
    PLUGIN,
    POOL,
    REFUSALS,
    RINGS,
    TEST_COMPAT,
    TEST_HOST_POOL,
    TEST_KNOWN,
    TEST_KNOWN_HOST,
    TEST_MODELS,
    TEST_PLAN,
    TEST_REFUSALS,
)

_TABLE = f"{TEST_MODELS}::test_launch_takes_a_hybrid"
_SAVED = f"{TEST_MODELS}::test_launch_refuses_a_prefix_cache_of_states_that_sglang_saves_at_other_tokens"
_WRONG = f"{TEST_MODELS}::test_launch_refuses_a_hybrid_whose_code_in_sglang_is_wrong"
_VARIANT = f"{TEST_MODELS}::test_launch_judges_by_the_configuration"
_HIT = f"{TEST_KNOWN}::test_a_hit_at_a_state_before_the_end_of_the_cached_pages_reads_exactly_from_there"
_BLACKWELL = f"{TEST_REFUSALS}::test_gated_delta_nets_are_refused_where_sglang_wants_attention_of_its_own"
# these need an SGLang with host memory for states
_STRATEGY = f"{TEST_HOST_POOL}::test_host_memory_for_states_takes_our_pool_where_there_are_some"
_HOSTED = f"{TEST_KNOWN_HOST}::test_a_state_from_the_host_is_read_as_one_that_never_left"
_FAILED = f"{TEST_KNOWN_HOST}::test_a_request_whose_load_fails_goes_on_from_the_state_of_the_device"
_ARGUMENTS = f"{TEST_MODELS}::test_launch_refuses_arguments_of_a_hybrid"

MUTATIONS = (
    Mutation(
        "states of other tokens taken for those of page ends",
        COMPAT,
        """    return is_since("0.5.20")


def checkpoints_states""",
        """    return True


def checkpoints_states""",
        (TEST_COMPAT,),
    ),
    Mutation(
        "a prefix cache of states of other tokens",
        REFUSALS,
        "if not compat.saves_states_at_page_ends():",
        "if False:",
        (_SAVED,),
    ),
    Mutation(
        "a model with an error of SGLang's taken in every version",
        COMPAT,
        """return not is_since(_RIGHT_SINCE.get(type(config).__name__, "0"))""",
        "return False",
        (TEST_COMPAT, _WRONG),
    ),
    Mutation(
        "an error of SGLang's that nobody asks for",
        REFUSALS,
        "if compat.adds_last_residual_twice(compat.hybrid_config(model_config)):",
        "if False:",
        (_WRONG,),
    ),
    Mutation(
        "states that two ranks add twice",
        REFUSALS,
        "if compat.adds_states_per_rank(states):",
        "if False:",
        (f"{TEST_MODELS}::test_launch_refuses_ranks_of_a_hybrid_that_sglang_sums_wrongly",),
    ),
    Mutation(
        "states with fewer groups than ranks",
        COMPAT,
        "return heads % ranks == 0 and (groups % ranks == 0 or is_repeated)",
        "return heads % ranks == 0",
        (f"{TEST_MODELS}::test_launch_refuses_ranks_that_cannot_share_states",),
    ),
    Mutation(
        "state spaces of a model without attention",
        COMPAT,
        "return type(config).__name__ in GATED_DELTA_NETS | MAMBA2 and bool(config.full_attention_layer_ids)",
        "return type(config).__name__ in GATED_DELTA_NETS | MAMBA2",
        (_VARIANT,),
    ),
    Mutation(
        "state spaces that are not known by the name of their layers",
        REFUSALS,
        """_STATE_LAYERS = {"linear_attention", "mamba"}""",
        """_STATE_LAYERS = {"linear_attention"}""",
        (_TABLE,),
    ),
    Mutation(
        "state spaces refused on a GPU on which they are not asked for",
        COMPAT,
        "return type(config).__name__ in GATED_DELTA_NETS\n",
        "return config is not None\n",
        (_BLACKWELL,),
    ),
    Mutation(
        "states of one rank counted for every number of ranks",
        COMPAT,
        """("tp_size", "attn_tp_size", "moe_tp_size"), ranks)""",
        """("tp_size", "attn_tp_size", "moe_tp_size"), 1)""",
        (TEST_COMPAT,),
    ),
    Mutation(
        "a plan that counts the states of one rank",
        PLAN,
        "compat.planned_state_bytes(config, options.tp)",
        "compat.planned_state_bytes(config, 1)",
        (TEST_PLAN,),
    ),
    Mutation(
        "pages behind the state of a hit read as if they were the request's",
        RINGS,
        "[compat.prefix_len(req) for req in reqs]",
        "[n + 128 if n else 0 for n in map(compat.prefix_len, reqs)]",
        (_HIT,),
    ),
    Mutation(
        "a layer beside states that waits for its number among those with records",
        POOL,
        "alone = self.states is None and not self.sliding_tokens",
        "alone = not self.sliding_tokens",
        (_HOSTED,),
    ),
    Mutation(
        "records of a hybrid model under the numbers of their layers in host memory",
        POOL,
        "self.full_attention_layer_id_mapping = {layer: n for n, layer in enumerate(self.layer_ids)}",
        "self.full_attention_layer_id_mapping = dict(enumerate(range(len(self.layer_ids))))",
        (_HOSTED,),
    ),
    Mutation(
        "host memory for states without records",
        PLUGIN,
        "if rings.of_pool(kvcache) is None or kvcache.states is None:",
        "if True:",
        (_STRATEGY,),
    ),
    Mutation(
        "host memory for states of a model that has none",
        PLUGIN,
        "if rings.of_pool(kvcache) is None or kvcache.states is None:",
        "if rings.of_pool(kvcache) is None:",
        (_STRATEGY,),
    ),
    Mutation(
        "states taken into host memory by every version",
        COMPAT,
        "return is_since(HOSTS_STATES_SINCE)",
        "return True",
        (TEST_COMPAT,),
    ),
    Mutation(
        "states in host memory of a GPU taken as tested",
        REFUSALS,
        "    if _is_trial(args.device, UNTESTED_HICACHE_ENV):",
        "    if False:",
        (f"{TEST_MODELS}::test_host_memory_for_states_is_a_trial_on_a_gpu",),
    ),
    Mutation(
        "states in an order of pages that SGLang does not have",
        REFUSALS,
        "if args.hicache_mem_layout != _PAGE_FIRST:",
        "if False:",
        (_ARGUMENTS,),
    ),
    Mutation(
        "a plan in which host memory is for tokens only",
        PLAN,
        "for_others = size * beside // (beside + tokens * token)",
        "for_others = 0",
        (f"{TEST_PLAN}::test_plan_shares_host_memory_between_tokens_and_states_as_the_gpu_does",),
    ),
    Mutation(
        "a request whose load fails, from a state of zeros",
        ADMISSION,
        "if not tokens and params.req.prefix_len:",
        "if tokens and params.req.prefix_len:",
        (_FAILED,),
    ),
    Mutation(
        "a request whose load fails, from the state that was not loaded",
        COMPAT,
        "_replace(best_match_node=node)",
        "_replace(best_match_node=req.best_match_node)",
        (_FAILED,),
    ),
)
