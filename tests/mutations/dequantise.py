# SPDX-License-Identifier: Apache-2.0
"""Bugs of writing pages out in 16 bits for FlashInfer."""

from __future__ import annotations

from .mutation import Mutation
from .paths import DEQUANTISE, TEST_DEQUANTISE, TEST_EXTEND_DENSE

MUTATIONS = (
    Mutation(
        "new tokens of a request counted from the first token of the batch",
        DEQUANTISE,
        "token = tl.load(qo_indptr_ptr + b).to(tl.int64) + position - prefix_len",
        "token = position.to(tl.int64) - prefix_len",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "pages of a prefix hit read from the ring (dense)",
        DEQUANTISE,
        "(slot < num_exact) & (page * G >= tl.load(exact_starts_ptr + b))",
        "slot < num_exact",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "key and value of a ring token swapped (dense)",
        DEQUANTISE,
        "            if is_value:\n                at += D",
        "            if not is_value:\n                at += D",
        (f"{TEST_DEQUANTISE}::test_dequantise_takes_exact_pages_from_the_ring_and_then_from_the_chunk",),
    ),
    Mutation(
        "values written out without their channel scale",
        DEQUANTISE,
        "signs * channel_scale[:, None]",
        "signs",
        (TEST_DEQUANTISE,),
    ),
    Mutation(
        "first token quantised (dense)",
        DEQUANTISE,
        "if first == 0:",
        "if first == 1:",
        (TEST_DEQUANTISE,),
    ),
    Mutation(
        "record of KV head 0 for every head (dense)",
        DEQUANTISE,
        "record = records_ptr + (page_id * HK + head) * RECORD",
        "record = records_ptr + page_id * HK * RECORD",
        (TEST_DEQUANTISE,),
    ),
    Mutation(
        "keys beyond the range of fp16 (dense)",
        DEQUANTISE,
        "y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)",
        "y = y * 1.0",
        (TEST_DEQUANTISE,),
    ),
    Mutation(
        "values addressed with the strides of the keys",
        DEQUANTISE,
        "source = v_ptr + token[:, None] * stride_v_token",
        "source = v_ptr + token[:, None] * stride_k_token",
        (TEST_EXTEND_DENSE,),
    ),
    Mutation(
        "tokens after the end of a request read as its own (dense)",
        DEQUANTISE,
        "((position >= prefix_len) & (position < tl.load(seq_lens_ptr + b)))[:, None]",
        "(position >= prefix_len)[:, None]",
        (TEST_DEQUANTISE,),
    ),
)
