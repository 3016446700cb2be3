# SPDX-License-Identifier: Apache-2.0
"""Bugs of speculative decoding: drafts that are rejected and stay, rows of a verify step, memory of the draft model."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ADMISSION,
    BUDGET,
    CAPACITY,
    CONFIG,
    DECODE_SM90,
    DRAFTS,
    ENGINE_DRAFTS,
    FUZZ,
    METADATA,
    POOL,
    SETTINGS,
    TEST_ADMISSION,
    TEST_BUDGET,
    TEST_DECODE_SM90,
    TEST_DRAFTS,
    TEST_METADATA,
    TEST_SETTINGS,
    TEST_VERIFY,
    TORCH_FORM,
)

SHARED_SPLITS = f"{TEST_DECODE_SM90}::test_drafts_that_share_their_splits_match_the_oracle"

MUTATIONS = (
    Mutation(
        "ring without room for rejected drafts",
        CONFIG,
        "self.ring_len + draft_tokens - 1",
        "self.ring_len",
        (TEST_VERIFY,),
    ),
    Mutation(
        "ring a token too short for drafts",
        CONFIG,
        "self.ring_len + draft_tokens - 1",
        "self.ring_len + draft_tokens - 2",
        (TEST_VERIFY,),
    ),
    Mutation(
        "page encoded only if a request ends with it, not if a draft does",
        TORCH_FORM,
        "        if seq_len % TILE_SIZE == 0:\n            k_page",
        "        if seq_len % TILE_SIZE == 0 and seq_len == max(seq_lens):\n            k_page",
        (TEST_VERIFY,),
    ),
    Mutation(
        "page of drafts encoded into the page of the first one",
        METADATA,
        "        slots = forward_batch.out_cache_loc[:size]\n",
        "        slots = forward_batch.out_cache_loc[:size:each].repeat_interleave(each)[:size]\n",
        (TEST_METADATA, FUZZ),
    ),
    Mutation(
        "lengths of a verify step without its drafts",
        METADATA,
        "            batch.seq_lens.view(requests, each).add_(self._counted[:each])\n",
        "            batch.seq_lens.add_(1)\n",
        (TEST_METADATA, FUZZ),
    ),
    Mutation(
        "rows of a verify step by draft, not by request",
        METADATA,
        "        rows.view(requests, each).copy_(forward_batch.req_pool_indices[:requests, None])\n",
        "        rows.view(each, requests).copy_(forward_batch.req_pool_indices[:requests])\n",
        (TEST_METADATA, FUZZ),
    ),
    Mutation(
        "pool whose rings have no room for drafts",
        POOL,
        "capacity.ring_pages(self.shape, self.config, self._draft_tokens)",
        "capacity.ring_pages(self.shape, self.config)",
        (FUZZ,),
    ),
    Mutation(
        "pool taken that holds no ring with drafts",
        CAPACITY,
        "    needed = (ring_pages(shape.attention, config, draft_tokens) + MIN_PAGES) * PAGE_SIZE\n",
        "    needed = (ring_pages(shape.attention, config) + MIN_PAGES) * PAGE_SIZE\n",
        (TEST_BUDGET,),
    ),
    Mutation(
        "workspaces for one row of a request",
        CAPACITY,
        "max(rows + 1, self.graph_batch) * self.draft_tokens",
        "max(rows + 1, self.graph_batch)",
        (TEST_BUDGET,),
    ),
    Mutation(
        "drafts not asked for when memory is split",
        BUDGET,
        "        draft_tokens=compat.draft_tokens(server_args),\n",
        "",
        (TEST_BUDGET,),
    ),
    Mutation(
        "lengths without room for what SGLang allocates ahead",
        ADMISSION,
        "    ahead = 2 * drafts if drafts > 1 else 0\n",
        "    ahead = 0\n",
        (TEST_ADMISSION,),
    ),
    Mutation(
        "a token that fills up a short chain follows the root",
        DRAFTS,
        "    tokens, mask = result\n",
        "    return None\n    tokens, mask = result\n",
        (TEST_DRAFTS, ENGINE_DRAFTS),
    ),
    Mutation(
        "drafts of other caches made chains too",
        DRAFTS,
        """    if not settings.is_kvarn(compat.published_argument("kv_cache_dtype")):
        return None
    tokens""",
        "    tokens",
        (TEST_DRAFTS,),
    ),
    Mutation(
        "draft model's tokens cost nothing",
        DRAFTS,
        "token_bytes(config) + drafted",
        "token_bytes(config)",
        (TEST_DRAFTS,),
    ),
    Mutation(
        "draft model's tokens charged as 16-bit ones whatever its cache",
        DRAFTS,
        ".full_token_bytes(itemsize)",
        ".full_token_bytes(model_config.dtype.itemsize)",
        (TEST_DRAFTS,),
    ),
    Mutation(
        "format of the draft's cache not passed on",
        SETTINGS,
        """        _, dtype = original(**kwargs | {"server_args_kv_cache_dtype": "auto"})
        return None, dtype
""",
        """        return None, kwargs["model_dtype"]
""",
        (TEST_SETTINGS,),
    ),
    Mutation(
        "SGLang's choice of a tree of drafts left alone",
        DRAFTS,
        "            server_args.speculative_eagle_topk = 1\n",
        "            pass\n",
        (TEST_DRAFTS,),
    ),
    Mutation(
        "draft reads a page as a record that it reads exactly too",
        DECODE_SM90,
        "      if (DRAFTS > 1 && !sees[c][0]) own[0] = own[2] = MINUS_INF;\n",
        "",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "draft sees those after it",
        DECODE_SM90,
        "start + n <= newest[c][h] && ",
        "",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "draft reads a page exactly that it reads as a record too",
        DECODE_SM90,
        " && start + n >= exact_from[c][h] * G",
        "",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "draft reads the first token of a page twice",
        DECODE_SM90,
        "{ return start + n < exact_from[c][h]; }",
        "{ return true; }",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "ring of drafts read from where the last one reads exactly",
        DECODE_SM90,
        "return first_exact * G + (max",
        "return exact_page * G + (max",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "second tile of columns with the queries of the first",
        DECODE_SM90,
        "query.load(own, c, n);",
        "query.load(own, 0, n);",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "second tile of columns with the scales of the first",
        DECODE_SM90,
        "weight(s[c][t][2 * r], scale[c][0], st[c].m[0])",
        "weight(s[c][t][2 * r], scale[0][0], st[c].m[0])",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "second tile of columns reads the pages of the first as records",
        DECODE_SM90,
        "sees[c][0] = p < exact_from[c][0];",
        "sees[c][0] = p < exact_from[0][0];",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "queries of all tiles read before they are written",
        DECODE_SM90,
        "  if (COLUMN_TILES > 1) __syncthreads();\n",
        "",
        (SHARED_SPLITS,),
    ),
    Mutation(
        "drafts and KV heads of a request change places",
        DECODE_SM90,
        "return ((of * DRAFTS + draft) * HK + head) * GROUP + c - draft * GROUP;",
        "return ((of * HK + head) * DRAFTS + draft) * GROUP + c - draft * GROUP;",
        (SHARED_SPLITS,),
    ),
)
