# SPDX-License-Identifier: Apache-2.0
"""Who attends in the decode benchmark: FlashInfer, FlashAttention 3, SGLang's Triton kernel and the presets."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from kvarn_kernels import reference
from kvarn_kernels.attention import Attention, Kernels, Limits
from kvarn_kernels.batch import QKV, DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache

from benchmarks.kernels import parts
from benchmarks.kernels.attention_problem import DEVICE, DTYPE, PAGE, Candidate, encoded, write_ring
from benchmarks.kernels.decode_problem import Problem, Shape

# e4m3 keeps three mantissa bits: about 3 % of a value, less after averaging
FP8_TOLERANCE = 1e-1
# query heads per KV head that FlashInfer decodes without tensor cores
FLASHINFER_GROUPS = (1, 2, 3, 4, 8)


def _ring_pages(problem: Problem, config: KVarNConfig) -> torch.Tensor:
    """Return the pages of every request's ring, int32 [B, N]: those behind the pages of records, in random order."""
    shape, heads = problem.shape, problem.shape.heads
    count = config.ring_pages(heads.head_dim, DTYPE.itemsize, shape.drafts)
    order = torch.randperm(shape.batch * count, device=DEVICE)
    return (1 + shape.batch * shape.pages + order).int().unflatten(0, (shape.batch, count))


def _caches(problem: Problem, config: KVarNConfig, page_table: torch.Tensor, rings: torch.Tensor) -> list[LayerCache]:
    """Return caches that hold the context, one a layer: records of all pages, then the pages of the rings."""
    shape, heads = problem.shape, problem.shape.heads
    record_bytes = config.record_bytes(heads.head_dim)
    unique = encoded(problem.pages, config)
    rotated = [reference.rotate(x).to(DTYPE) for x in problem.pages]
    size = (1 + page_table.numel() + rings.numel(), heads.num_kv_heads, record_bytes)
    # the first draft reads the most tokens exactly; the last ones of the context are written when a layer runs
    end = shape.context - shape.drafts
    first = max(0, end // PAGE - config.window_pages)
    caches = []
    for _ in range(shape.layers(shape.batch * shape.pages * heads.num_kv_heads * record_bytes)):
        records = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        records[page_table.flatten().long()] = unique[problem.page_of.flatten()]
        cache = LayerCache(records, heads.head_dim, DTYPE)
        for ring, page_of in zip(rings, problem.page_of, strict=True):
            tokens = (x[page_of[first:]].flatten(0, 1)[: end - first * PAGE] for x in rotated)
            write_ring(cache, ring, first * PAGE, *tokens)
        caches.append(cache)
    return caches


def kvarn(problem: Problem, preset: str, part: str = "", kernels: Kernels | None = None) -> list[Candidate]:
    """Return a preset made ready.

    Args:
        part: of `parts.DECODE`, to run that part of a layer alone; its bytes are not counted.
        kernels: other ones than a server would run.
    """
    shape, heads, config = problem.shape, problem.shape.heads, KVarNConfig.from_preset(preset)
    page_table = problem.physical_pages()
    rings = _ring_pages(problem, config)
    caches = _caches(problem, config, page_table, rings)
    rows, seq_lens = page_table.repeat_interleave(shape.drafts, 0), problem.seq_lens
    batch = DecodeBatch(
        ring_pages=rings.repeat_interleave(shape.drafts, 0),
        seq_lens=seq_lens,
        page_table=rows,
        store_pages=rows.gather(1, (seq_lens.long()[:, None] - 1) // PAGE)[:, 0],
        exact_starts=torch.zeros_like(seq_lens),
        drafts=shape.drafts,
    )
    limits = Limits(len(rows), shape.pages, extend_requests=1, chunk_pages=1, draft_tokens=shape.drafts)
    attention = Attention(heads, config, DEVICE, limits, kernels)
    # once per step, not per layer
    step = attention.plan(batch)
    new, out = QKV(problem.q, problem.k_new, problem.v_new), torch.empty_like(problem.q)

    def run(layer: int) -> None:
        attention.attend(new, out, caches[layer], step, heads.head_dim**-0.5)

    def run_part(layer: int) -> None:
        with parts.only(part):
            run(layer)

    if part:
        # what the part reads
        run(0)
        return [Candidate(run_part, out, [], None, math.inf, len(caches))]

    def expected(row: int) -> torch.Tensor:
        return reference.attention(problem.q[row : row + 1], *problem.keys_values(row), config)[0]

    # as if the drafts of a request read its tokens together
    pages = max(0, (shape.context - 1) // PAGE - config.window_pages)
    exact = min(shape.context, config.ring_len) * heads.full_token_bytes
    total = shape.batch * (pages * heads.num_kv_heads * config.record_bytes(heads.head_dim) + exact)
    return [Candidate(run, out, problem.samples, expected, 5e-3, len(caches), total)]


def _flashinfer(
    problem: Problem, dtype: torch.dtype, wrapper_of: Callable[..., Any], *qo_indptr: torch.Tensor, **options: Any
) -> Candidate:
    """Return FlashInfer on a cache of a dtype.

    Args:
        wrapper_of: makes its wrapper of a workspace; qo_indptr: first row of each request, for a wrapper that takes it.
        options: more of the wrapper's plan.
    """
    shape, heads = problem.shape, problem.shape.heads
    page_table = problem.physical_pages()
    layers = shape.layers(shape.batch * shape.pages * PAGE * heads.full_token_bytes * dtype.itemsize // DTYPE.itemsize)
    caches = [torch.stack(problem.paged(page_table, dtype), 1) for _ in range(layers)]
    wrapper = wrapper_of(torch.empty(512 << 20, dtype=torch.uint8, device=DEVICE), "NHD")
    wrapper.plan(
        *qo_indptr,
        _counted(shape) * shape.pages,
        page_table.flatten(),
        torch.full((shape.batch,), (shape.context - 1) % PAGE + 1, dtype=torch.int32, device=DEVICE),
        heads.num_qo_heads,
        heads.num_kv_heads,
        heads.head_dim,
        PAGE,
        q_data_type=DTYPE,
        kv_data_type=dtype,
        **options,
    )
    out = torch.empty_like(problem.q)

    def run(layer: int) -> None:
        wrapper.run(problem.q, caches[layer], out=out)

    tolerance = 1e-2 if dtype == DTYPE else FP8_TOLERANCE
    total = shape.full_bytes * dtype.itemsize // DTYPE.itemsize
    return Candidate(run, out, problem.samples, problem.exact, tolerance, layers, total)


def _counted(shape: Shape) -> torch.Tensor:
    """Return 0, 1, ... up to the number of requests, int32 on the device."""
    return torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE)


def flashinfer_bf16(problem: Problem) -> list[Candidate]:
    """Return FlashInfer on a bf16 cache: decode without tensor cores, where it has that, and with them; or verify."""
    import flashinfer

    shape, decode = problem.shape, flashinfer.BatchDecodeWithPagedKVCacheWrapper
    if shape.drafts > 1:
        verify = flashinfer.BatchPrefillWithPagedKVCacheWrapper
        return [_flashinfer(problem, DTYPE, verify, _counted(shape) * shape.drafts, causal=True)]
    ways = (False, True) if shape.heads.group in FLASHINFER_GROUPS else (True,)
    return [_flashinfer(problem, DTYPE, partial(decode, use_tensor_cores=cores)) for cores in ways]


def flashinfer_fp8(problem: Problem) -> list[Candidate]:
    """Return FlashInfer on an fp8 cache."""
    import flashinfer

    decode = partial(flashinfer.BatchDecodeWithPagedKVCacheWrapper, use_tensor_cores=True)
    return [_flashinfer(problem, torch.float8_e4m3fn, decode)]


def fa3_bf16(problem: Problem) -> list[Candidate]:
    """Return FlashAttention 3 of sgl_kernel on pages of 128 tokens, as stock SGLang decodes by default on Hopper."""
    from sgl_kernel.flash_attn import flash_attn_with_kvcache

    shape, heads = problem.shape, problem.shape.heads
    page_table = problem.physical_pages()
    layers = shape.layers(shape.batch * shape.pages * PAGE * heads.full_token_bytes)
    caches = [problem.paged(page_table, DTYPE) for _ in range(layers)]
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device=DEVICE)
    qo_indptr = _counted(shape) * shape.drafts
    out = torch.empty_like(problem.q)

    def run(layer: int) -> None:
        flash_attn_with_kvcache(
            problem.q,
            *caches[layer],
            page_table=page_table,
            cache_seqlens=seq_lens,
            cu_seqlens_q=qo_indptr,
            max_seqlen_q=shape.drafts,
            softmax_scale=heads.head_dim**-0.5,
            causal=True,
            out=out,
        )

    return [Candidate(run, out, problem.samples, problem.exact, 1e-2, layers, shape.full_bytes)]


def sglang_triton_bf16(problem: Problem) -> list[Candidate]:
    """Return SGLang's own Triton decode kernel on a bf16 cache, 8 or 16 splits."""
    from sglang.kernels.ops.attention.decode_attention import decode_attention_fwd

    shape, heads = problem.shape, problem.shape.heads
    page_table = problem.physical_pages()
    layers = shape.layers(shape.full_bytes)
    # by token: [P * G, Hk, D]
    caches = [[x.flatten(0, 1) for x in problem.paged(page_table, DTYPE)] for _ in range(layers)]
    slots = (page_table[:, :, None].long() * PAGE + torch.arange(PAGE, device=DEVICE)).flatten(1)[:, : shape.context]
    indptr = torch.arange(shape.batch + 1, dtype=torch.int32, device=DEVICE) * shape.context
    indices = slots.flatten().to(torch.int64)

    def candidate(splits: int) -> Candidate:
        logits = torch.empty(shape.batch, heads.num_qo_heads, splits, heads.head_dim, device=DEVICE)
        lse = torch.empty(shape.batch, heads.num_qo_heads, splits, device=DEVICE)
        per_request = torch.full((shape.batch,), splits, dtype=torch.int32, device=DEVICE)
        out = torch.empty_like(problem.q)

        def run(layer: int) -> None:
            k, v = caches[layer]
            decode_attention_fwd(
                problem.q, k, v, out, indptr, indices, logits, lse, per_request, splits, heads.head_dim**-0.5, 1.0, 1.0
            )

        return Candidate(run, out, problem.samples, problem.exact, 1e-2, layers, shape.full_bytes)

    return [candidate(8), candidate(16)]


BASELINES = {
    "fa3_bf16": fa3_bf16,
    "flashinfer_bf16": flashinfer_bf16,
    "flashinfer_fp8": flashinfer_fp8,
    "sglang_triton_bf16": sglang_triton_bf16,
}
# those that attend more than one new token of a request
VERIFY_BASELINES = ("flashinfer_bf16", "fa3_bf16")
