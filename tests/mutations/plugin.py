# SPDX-License-Identifier: Apache-2.0
"""Bugs of rows and rings, the pool and the backend of the plugin."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    BACKEND,
    BUDGET,
    CAPACITY,
    COMPAT,
    ENGINE_DP_ATTENTION,
    ENGINE_KERNELS,
    ENGINE_OUTPUTS,
    ENGINE_WINDOW,
    FUZZ,
    POOL,
    RINGS,
    TEST_BACKEND_OUTPUT,
    TEST_BUDGET,
    TEST_COMPAT,
    TEST_RINGS,
)

MUTATIONS = (
    Mutation(
        "a retracted request that finds its own pages",
        RINGS,
        "return None if first is None else min(result, first)",
        "return None",
        (TEST_RINGS,),
    ),
    Mutation(
        "a second admission that moves the limit",
        RINGS,
        "if not hasattr(req, _FIRST_PREFIX):",
        "if True:",
        (TEST_RINGS,),
    ),
    Mutation(
        "a limit for presets whose hits read as misses",
        RINGS,
        "if self._hit_reads_as_miss:",
        "if False:",
        (TEST_RINGS,),
    ),
    Mutation(
        "exact start of a reused row not reset",
        RINGS,
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = [req for req in reqs if compat.request_row(req) is None and compat.prefix_len(req)]",
        (FUZZ,),
    ),
    Mutation(
        "exact start moved by every chunk",
        RINGS,
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = list(reqs)",
        (FUZZ,),
    ),
    Mutation(
        "prefix hit read from the ring of the row's last owner",
        RINGS,
        "[compat.prefix_len(req) for req in reqs]",
        "[0 for req in reqs]",
        (FUZZ,),
    ),
    Mutation(
        "output beside the place where a prefill graph reads it",
        BACKEND,
        "compat.attention_output(forward_batch)",
        "None",
        (ENGINE_OUTPUTS,),
    ),
    Mutation(
        "a step of a rank without requests that is planned",
        BACKEND,
        "if mode.is_idle():",
        "if False:",
        (ENGINE_DP_ATTENTION,),
    ),
    Mutation(
        "rows for the requests of all ranks on each",
        BUDGET,
        "max(1, requests // compat.get_parallel().attn_dp_size)",
        "requests",
        (TEST_BUDGET,),
    ),
    Mutation(
        "no room for the requests that a decode step is padded to",
        CAPACITY,
        "max(rows + 1, padded, self.graph_batch)",
        "max(rows + 1, self.graph_batch)",
        (TEST_BUDGET,),
    ),
    Mutation(
        "output to a place of another dtype",
        BACKEND,
        " and wanted.dtype == q.dtype",
        "",
        (TEST_BACKEND_OUTPUT,),
    ),
    Mutation(
        "plan of the step before (no plan)",
        BACKEND,
        "            self._step = self.attention.plan(self._buffers.fill(forward_batch))\n",
        "            from kvarn_kernels.attention import Step\n\n"
        "            self._step = Step(self._buffers.fill(forward_batch))\n",
        (ENGINE_KERNELS,),
    ),
    Mutation(
        "no rings: rows get none",
        POOL,
        "    setattr(req_to_token_pool, ATTRIBUTE, pool.rings)\n",
        "",
        (ENGINE_WINDOW,),
    ),
    Mutation(
        "records for layers that keep states",
        COMPAT,
        "        ids = states.full_attention_layer_ids\n",
        "        ids = range(start, end)\n",
        (TEST_COMPAT,),
    ),
    Mutation(
        "memory of a layer by its place among those with attention",
        POOL,
        "self._layer_caches = dict(zip(self.layer_ids, caches, strict=True))",
        "self._layer_caches = dict(enumerate(caches))",
        (TEST_BUDGET,),
    ),
    Mutation(
        "a cached session that takes one state",
        CAPACITY,
        "by_states = self.number // self.per_session",
        "by_states = self.number",
        (TEST_BUDGET,),
    ),
    Mutation(
        "the user's share of states overwritten",
        BUDGET,
        "if config is None or not compat.is_state_ratio_open(configurator.server_args):",
        "if config is None:",
        (TEST_BUDGET,),
    ),
    Mutation(
        "workspaces for more requests than states allow",
        CAPACITY,
        "min(bounds.requests or MAX_ROWS, bounds.states or MAX_ROWS)",
        "bounds.requests or MAX_ROWS",
        (TEST_BUDGET,),
    ),
)
