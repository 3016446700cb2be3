# SPDX-License-Identifier: Apache-2.0
"""Who attends in the prefill benchmark: FlashInfer and FlashAttention 3 on a bf16 cache, and the presets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from kvarn_kernels import reference
from kvarn_kernels.attention import Attention, Kernels, Limits, Step, choose_kernels
from kvarn_kernels.batch import QKV, ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense
from kvarn_kernels.dense.paged_calls import Library
from kvarn_kernels.device.gpu import gpu_of
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read import extend, extend_sm90

from benchmarks.kernels import parts
from benchmarks.kernels.attention_problem import DEVICE, PAGE, Candidate, attend_exactly, encoded, write_ring
from benchmarks.kernels.prefill_problem import Problem


def flashinfer_bf16(problem: Problem, backend: str) -> list[Candidate]:
    """Return FlashInfer's paged attention over a bf16 cache, nothing around it."""
    import flashinfer

    shape, heads, caches = problem.shape, problem.shape.heads, _caches(problem)
    scratch = torch.empty(128 << 20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(scratch, "NHD", backend=backend)
    out = torch.empty_like(problem.q)

    def plan() -> None:
        wrapper.plan(
            _indptr(shape.requests, shape.new),
            _indptr(shape.requests, shape.pages),
            problem.page_table.flatten(),
            torch.tensor([(shape.seq_len - 1) % PAGE + 1] * shape.requests, dtype=torch.int32),
            heads.num_qo_heads,
            heads.num_kv_heads,
            heads.head_dim,
            PAGE,
            causal=True,
            q_data_type=problem.q.dtype,
        )

    def run(layer: int) -> None:
        wrapper.run(problem.q, tuple(caches), out=out)

    return [Candidate(run, out, problem.samples, problem.exact, plan=plan)]


def fa3_bf16(problem: Problem, function: Any = None) -> list[Candidate]:
    """Return FlashAttention 3 of sgl_kernel over a bf16 cache, as stock SGLang prefills on Hopper, nothing around it.

    Args:
        function: stands in for flash_attn_with_kvcache.
    """
    if function is None:
        from sgl_kernel.flash_attn import flash_attn_with_kvcache

        function = flash_attn_with_kvcache
    shape, heads, caches = problem.shape, problem.shape.heads, _caches(problem)
    lengths = torch.full((shape.requests,), shape.seq_len, dtype=torch.int32, device=DEVICE)
    rows = _indptr(shape.requests, shape.new).to(DEVICE)
    out = torch.empty_like(problem.q)

    def run(layer: int) -> None:
        function(
            problem.q,
            *caches,
            page_table=problem.page_table,
            cache_seqlens=lengths,
            cu_seqlens_q=rows,
            max_seqlen_q=shape.new,
            softmax_scale=heads.head_dim**-0.5,
            causal=True,
            out=out,
            return_softmax_lse=True,
        )

    return [Candidate(run, out, problem.samples, problem.exact, plan=lambda: None)]


def _indptr(requests: int, each: int) -> torch.Tensor:
    """Return [0, each, 2 each, ...], int32 on the host."""
    return torch.arange(0, (requests + 1) * each, each, dtype=torch.int32)


def _caches(problem: Problem) -> list[torch.Tensor]:
    """Return the keys and the values in pages, [P, G, Hk, D]."""
    shape, caches = problem.shape, []
    for x in (problem.k, problem.v):
        cache = torch.zeros(problem.page_table.numel() + 1, PAGE, *x.shape[1:], dtype=x.dtype, device=DEVICE)
        padded = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, shape.pages * PAGE - shape.seq_len))
        for pages in problem.page_table.long():
            cache[pages] = padded.unflatten(0, (-1, PAGE))
        caches.append(cache)
    return caches


def _ring_pages(problem: Problem, config: KVarNConfig) -> torch.Tensor:
    """Return the pages of the rings, int32 [requests, N]: those behind the pages of records."""
    first, requests = problem.page_table.numel() + 1, problem.shape.requests
    count = config.ring_pages(problem.shape.heads.head_dim, problem.k.element_size())
    pages = torch.arange(first, first + requests * count, dtype=torch.int32, device=DEVICE)
    return pages.unflatten(0, (requests, count))


def _filled_cache(problem: Problem, config: KVarNConfig) -> LayerCache:
    """Return a cache that holds the prefix: its records, and its last tokens in the ring."""
    shape, heads, rings = problem.shape, problem.shape.heads, _ring_pages(problem, config)
    size = (1 + problem.page_table.numel() + rings.numel(), heads.num_kv_heads, config.record_bytes(heads.head_dim))
    records = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    prefix = encoded(problem.distinct, config)[problem.page_of]
    for pages in problem.page_table.long():
        records[pages[: len(prefix)]] = prefix
    cache, start = LayerCache(records, heads.head_dim, problem.k.dtype), max(0, shape.prefix - config.ring_len)
    newest = [reference.rotate(x[start : shape.prefix]).to(x.dtype) for x in (problem.k, problem.v)]
    for ring in rings:
        write_ring(cache, ring, start, *newest)
    return cache


def _batch(problem: Problem, config: KVarNConfig) -> ExtendBatch:
    shape, requests = problem.shape, problem.shape.requests

    def int32(value: int) -> torch.Tensor:
        return torch.full((requests,), value, dtype=torch.int32, device=DEVICE)

    return ExtendBatch(
        ring_pages=_ring_pages(problem, config),
        prefix_lens=int32(shape.prefix),
        seq_lens=int32(shape.seq_len),
        qo_indptr=_indptr(requests, shape.new).to(DEVICE),
        page_table=problem.page_table,
        exact_starts=int32(0),
        prefix_lens_host=[shape.prefix] * requests,
        seq_lens_host=[shape.seq_len] * requests,
    )


def kvarn(
    problem: Problem,
    preset: str,
    dense: str | Library = "",
    kernels: Kernels | None = None,
    *,
    short: bool = False,
) -> list[Candidate]:
    """Return a preset made ready.

    Args:
        dense: who attends, however short the step is: one of `extend_dense.LIBRARIES` or what stands in for it; empty
            for the kernels that read records.
        short: of those extend_sm90.cu, not Triton.
        kernels: other ones than a server would run.
    """
    shape, heads, config = problem.shape, problem.shape.heads, KVarNConfig.from_preset(preset)
    cache, out, batch = _filled_cache(problem, config), torch.empty_like(problem.q), _batch(problem, config)
    limits = Limits(
        decode_batch=1,
        request_pages=shape.pages,
        extend_requests=shape.requests,
        chunk_pages=-(-shape.new // PAGE) + 1,
    )
    chosen = kernels or choose_kernels(heads, config, DEVICE)
    attention = Attention(heads, config, DEVICE, limits, replace(chosen, dense=""))
    workspace, compiled = None, chosen.dequantise == "cuda"
    if dense:
        workspace = extend_dense.make_workspace(heads, limits.extend_pages, DEVICE, dense, compiled=compiled)
    new = QKV(problem.q, *(x[shape.prefix :].repeat(shape.requests, 1, 1) for x in (problem.k, problem.v)))
    step: Step | None = None

    def plan() -> None:
        nonlocal step
        if workspace is None:
            make = extend_sm90.plan_short if short else extend.plan_extend
            step = Step(batch, make(batch, heads, config, gpu_of(DEVICE)))
        else:
            step = Step(batch, extend_dense.plan_dense(batch, workspace, config, gpu_of(DEVICE)))

    def run(layer: int) -> None:
        # only the first run finds the prefix in the ring; that is the one that is checked
        assert step is not None, "planned before it runs"
        attention.attend(new, out, cache, step, heads.head_dim**-0.5)

    def expected(query: int) -> torch.Tensor:
        position = shape.prefix + query % shape.new
        exact = max(position // PAGE - config.window_pages, 0)
        records = cache.records[problem.page_table[0, :exact].long()].transpose(0, 1)
        past = torch.empty(2, exact * PAGE, *problem.k.shape[1:], device=DEVICE)
        for first in range(0, exact, 64):
            decoded = reference.decode_tile(records[:, first : first + 64], config, heads.head_dim)
            for x, side in zip(decoded, past, strict=True):
                tokens = reference.rotate(x).flatten(1, 2).transpose(0, 1)
                side[first * PAGE : first * PAGE + len(tokens)] = tokens
        rest = slice(exact * PAGE, position + 1)
        k, v = (torch.cat([old, x[rest].float()]) for old, x in zip(past, (problem.k, problem.v), strict=True))
        return attend_exactly(problem.q[query], k, v)

    timed = parts.timed if short or workspace is not None else None
    return [Candidate(run, out, problem.samples, expected, plan=plan, timed=timed)]
