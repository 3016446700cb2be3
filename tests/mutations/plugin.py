# SPDX-License-Identifier: Apache-2.0
"""Bugs of the rows, the pool and the backend of the plugin."""

from __future__ import annotations

from .mutation import Mutation
from .paths import BACKEND, ENGINE_KERNELS, ENGINE_WINDOW, FUZZ, POOL, ROWS, TEST_ROWS

MUTATIONS = (
    Mutation(
        "a retracted request that finds its own pages",
        ROWS,
        "return None if first is None else min(result, first)",
        "return None",
        (TEST_ROWS,),
    ),
    Mutation(
        "a second admission that moves the limit",
        ROWS,
        "if not hasattr(req, _FIRST_PREFIX):",
        "if True:",
        (TEST_ROWS,),
    ),
    Mutation(
        "a limit for presets whose hits read as misses",
        ROWS,
        "if self._hit_reads_as_miss:",
        "if False:",
        (TEST_ROWS,),
    ),
    Mutation(
        "exact start of a reused row not reset",
        ROWS,
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = [req for req in reqs if compat.request_row(req) is None and compat.prefix_len(req)]",
        (FUZZ,),
    ),
    Mutation(
        "exact start moved by every chunk",
        ROWS,
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = list(reqs)",
        (FUZZ,),
    ),
    Mutation(
        "prefix hit read from the ring of the row's last owner",
        ROWS,
        "[compat.prefix_len(req) for req in reqs]",
        "[0 for req in reqs]",
        (FUZZ,),
    ),
    Mutation(
        "plan of the step before (no plan)",
        BACKEND,
        "            self._step = self.attention.plan(self._buffers.fill(forward_batch, exact_starts))\n",
        "            from kvarn_kernels.attention import Step\n\n"
        "            self._step = Step(self._buffers.fill(forward_batch, exact_starts))\n",
        (ENGINE_KERNELS,),
    ),
    Mutation(
        "exact starts never noted",
        POOL,
        "    pool.tail.attach(req_to_token_pool)\n",
        "",
        (ENGINE_WINDOW,),
    ),
)
