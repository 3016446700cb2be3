# SPDX-License-Identifier: Apache-2.0
"""Bugs of writing pages out in 16 bits for a library."""

from __future__ import annotations

from .mutation import Mutation
from .paths import DEQUANTISE, DEQUANTISE_CU, TEST_DEQUANTISE, TEST_EXTEND_DENSE

_BATCH = (f"{TEST_DEQUANTISE}::test_dequantise_finds_the_requests_of_a_batch_and_tokens_that_do_not_follow_each_other",)
_BESIDE = (f"{TEST_DEQUANTISE}::test_dequantise_beside_the_encoder_waits_for_the_pages_that_it_fills",)
_RECORDS = (f"{TEST_DEQUANTISE}::test_dequantise_matches_the_decoded_records",)

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
    Mutation(
        "new tokens of a request counted from the first token of the batch (CUDA)",
        DEQUANTISE_CU,
        "(qo_indptr[request] - prefix_len) * stride",
        "(0 - prefix_len) * stride",
        _BATCH,
    ),
    Mutation(
        "values addressed with the strides of the keys (CUDA)",
        DEQUANTISE_CU,
        "is_value ? stride_v_token : stride_k_token",
        "stride_k_token",
        _BATCH,
    ),
    Mutation(
        "page table of the first request for all (CUDA)",
        DEQUANTISE_CU,
        "page_table[(long long)request * stride_page_table + number]",
        "page_table[number]",
        _BATCH,
    ),
    Mutation(
        "ring of the first request for all (CUDA)",
        DEQUANTISE_CU,
        "ring_pages[request * RING_PAGES + position / RING_TOKENS % RING_PAGES]",
        "ring_pages[position / RING_TOKENS % RING_PAGES]",
        _BATCH,
    ),
    Mutation(
        "pages of a prefix hit read from the ring (CUDA)",
        DEQUANTISE_CU,
        "slot < num_exact && number * G >= exact_starts[request]",
        "slot < num_exact",
        (f"{TEST_DEQUANTISE}::test_dequantise_takes_pages_of_a_prefix_hit_from_their_records",),
    ),
    Mutation(
        "tokens after the end of a request read as its own (CUDA)",
        DEQUANTISE_CU,
        "position < seq_len ?",
        "true ?",
        (f"{TEST_DEQUANTISE}::test_dequantise_takes_exact_pages_from_the_ring_and_then_from_the_chunk",),
    ),
    Mutation(
        "values written out without their channel scale (CUDA)",
        DEQUANTISE_CU,
        "channel_scale.x ^ signs[tile].low",
        "0x3C003C00u ^ signs[tile].low",
        _RECORDS,
    ),
    Mutation(
        "first token from its codes (CUDA)",
        DEQUANTISE_CU,
        "if (warp == 0) rotate_back(record",
        "if (warp < 0) rotate_back(record",
        _RECORDS,
    ),
    Mutation(
        "a bit of the channel left out of the rotation (CUDA)",
        DEQUANTISE_CU,
        "for (int bit = 1; bit < STEPS; bit *= 2)\n#pragma unroll\n    for (int s",
        "for (int bit = 1; bit < STEPS / 2; bit *= 2)\n#pragma unroll\n    for (int s",
        _RECORDS,
    ),
    Mutation(
        "top bits of the upper values where those of the lower begin (CUDA)",
        DEQUANTISE_CU,
        "const int top_shift = shift + vector / HALF;",
        "const int top_shift = shift;",
        _RECORDS,
    ),
    Mutation(
        "keys beyond the range of fp16 (CUDA)",
        DEQUANTISE_CU,
        "pack_half(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f))",
        "pack_half(low, high)",
        (f"{TEST_DEQUANTISE}::test_dequantise_stays_finite_for_the_largest_keys_and_values",),
    ),
    Mutation(
        "pages read beside the encoder that fills them (CUDA)",
        DEQUANTISE_CU,
        "if (number >= prefix_lens[request] / G) wait_for_previous();",
        "",
        _BESIDE,
    ),
    Mutation(
        "a kernel that ends before the encoder beside it (CUDA)",
        DEQUANTISE_CU,
        "if (blockIdx.x == gridDim.x - 1) wait_for_previous();",
        "",
        _BESIDE,
    ),
)
