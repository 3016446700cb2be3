# SPDX-License-Identifier: Apache-2.0
"""Bugs of extend steps on FlashInfer: what they read, and the merge of what they give."""

from __future__ import annotations

from .mutation import Mutation
from .paths import EXTEND_DENSE, MERGE_PARTS, PAGED_CALLS, SEGMENTS, TEST_EXTEND_DENSE, TEST_SEGMENTS

MUTATIONS = (
    Mutation(
        "last page of a request read to its end",
        SEGMENTS,
        "last_page_len=end - number * page,",
        "last_page_len=np.full_like(end, page),",
        (TEST_SEGMENTS,),
    ),
    Mutation(
        "no exact window (dense)",
        SEGMENTS,
        "exact = np.maximum(number - config.window_pages, oldest)",
        "exact = number",
        (TEST_SEGMENTS, TEST_EXTEND_DENSE),
    ),
    Mutation(
        "queries without a past merge the key that stands in",
        MERGE_PARTS,
        "exists = valid & (tl.load(seen_ptr + part // HQ, mask=valid, other=0) != 0)",
        "exists = valid",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "parts of a dense extend step merged without their weights",
        MERGE_PARTS,
        "a, b = tl.exp2(m - top), tl.exp2(lse - top)",
        "a, b = tl.exp2(m - top), tl.exp2(m - top)",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "part of a dense extend step merged into the first tokens",
        MERGE_PARTS,
        "at = r + begin * HQ",
        "at = r",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "splits of a dense extend step leave the last records out",
        SEGMENTS,
        "np.arange(splits + 1)[:, None] // splits",
        "np.arange(splits + 1)[:, None] // (splits + 1)",
        (TEST_SEGMENTS,),
    ),
    Mutation(
        "queries of a page see its later tokens",
        EXTEND_DENSE,
        "causal=segment.causal,",
        "causal=False,",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "segment planned on the wrapper of another",
        PAGED_CALLS,
        "wrapper, (_, kv_heads, page, head_dim) = self.wrappers[number], pages.shape",
        "wrapper, (_, kv_heads, page, head_dim) = self.wrappers[0], pages.shape",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "log sums of FlashAttention 3 taken for base 2",
        PAGED_CALLS,
        "torch.mul(found.T, 1 / math.log(2), out=lse)",
        "torch.mul(found.T, 1.0, out=lse)",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "last pages of FlashAttention 3 taken for full ones",
        SEGMENTS,
        "(counts - 1) * TILE_SIZE + self.last_page_len.numpy()",
        "counts * TILE_SIZE",
        (TEST_EXTEND_DENSE,),
    ),
)
