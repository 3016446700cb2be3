# SPDX-License-Identifier: Apache-2.0
"""How a decode step is split among programs: planned on the device from the lengths of the step, once for all layers.

The work of a request is counted in units: one for each page that it reads as a record, RING_UNITS for each chunk of
RING_CHUNK tokens of its ring. A split is a run of units of one request; it serves all KV heads, one program each.

    default     Every request is cut evenly into splits of at most `share` units, the smallest share that needs no more
                splits than wanted_splits(batch size): whole waves of programs, long requests in more splits than short
                ones.
    canonical   A split is CANONICAL_SPLIT_UNITS units, counted from position 0: the plan of a request depends on its
                position only, never on its company.

Splits of a request follow each other; split_requests and split_indptr of `DecodeWorkspace` hold the plan. Nothing is
read by the host and grids are sized by max_splits, so that one CUDA graph serves any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvarn_kernels import decode_sm90, gpu
from kvarn_kernels.cache import DecodeBatch
from kvarn_kernels.config import KVarNConfig

CANONICAL_SPLIT_UNITS = 16
# a split shorter than this costs more in the merge than it hides
MIN_SPLIT_UNITS = 2
RING_CHUNK = tl.constexpr(decode_sm90.RING_CHUNK)
RING_UNITS = tl.constexpr(decode_sm90.RING_UNITS)
# programs of the Triton kernel (2 warps) that a multiprocessor runs at once
TRITON_PROGRAMS = 8
# what wanted_splits plans with: units of a request, and units of time that a split takes besides its own
TYPICAL_UNITS = 64
SPLIT_OVERHEAD = 4
MAX_WAVES = 16


def resident_programs(head_dim: int) -> int:
    """Return the programs of the decode kernel that the current GPU runs at once."""
    device = torch.device("cuda")
    is_triton = torch.cuda.is_available() and not decode_sm90.is_supported(device)
    return gpu.multiprocessors() * (TRITON_PROGRAMS if is_triton else decode_sm90.MIN_BLOCKS[head_dim])


def split_units(config: KVarNConfig) -> int:
    """Return the units of a split, 0 where they depend on the step."""
    return CANONICAL_SPLIT_UNITS if config.is_canonical else 0


def max_units(max_pages: int, config: KVarNConfig) -> int:
    """Return the most units of a request of up to max_pages pages."""
    return max_pages + RING_UNITS.value * (config.ring_len // RING_CHUNK.value)


def wanted_splits(batch_size: int, programs_per_split: int, head_dim: int) -> int:
    """Return the most splits of a step of a default preset: what fills a whole number of waves of programs.

    More waves cut the work finer, but every split costs something. Estimated for requests of equal length, which fill
    the waves the worst, plus half a split for the uneven end of requests of different lengths.

    Args:
        programs_per_split: programs that a split takes, one per KV head and 8 query heads.
    """
    resident = resident_programs(head_dim)

    def cost(waves: int) -> float:
        per_request = waves * resident // programs_per_split // batch_size
        if not per_request:
            return float("inf")
        return waves * (TYPICAL_UNITS / per_request + SPLIT_OVERHEAD) + TYPICAL_UNITS / per_request / 2

    waves = min(range(1, MAX_WAVES + 1), key=cost)
    return max(batch_size, waves * resident // programs_per_split)


def max_splits(batch_size: int, wanted: int, max_pages: int, config: KVarNConfig) -> int:
    """Return the most splits of a step, whatever its lengths."""
    if config.is_canonical:
        return batch_size * triton.cdiv(max_units(max_pages, config), CANONICAL_SPLIT_UNITS)
    return wanted


@triton.jit
def work_of(seq_len, exact_start, WINDOW: tl.constexpr, G: tl.constexpr):
    """Return (page of the first key that is read exactly, units) of a request; pages before it are read as records."""
    position = seq_len - 1
    page = position // G
    exact_page = tl.minimum(tl.maximum(page - WINDOW, exact_start // G), page)
    return exact_page, exact_page + (position - exact_page * G) // RING_CHUNK * RING_UNITS + RING_UNITS


@triton.jit
def ring_start(unit, exact_page, G: tl.constexpr):
    """Return the first ring position of a split that begins with a unit; the end of one that ends before it."""
    return exact_page * G + (tl.maximum(unit - exact_page, 0) + RING_UNITS - 1) // RING_UNITS * RING_CHUNK


@triton.jit(do_not_specialize=["batch_size", "wanted"])
def _plan_kernel(
    seq_lens_ptr,  # [B] int32
    exact_starts_ptr,  # [B] int32
    requests_ptr,  # [S] int32, written: request of each split
    indptr_ptr,  # [B + 1] int32, written: first split of each request
    batch_size,
    wanted,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    SPLIT_UNITS: tl.constexpr,  # 0: an equal share of the step
    MIN_UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.arange(0, BLOCK)
    valid = b < batch_size
    seq_lens = tl.load(seq_lens_ptr + b, mask=valid, other=1)
    _, units = work_of(seq_lens, tl.load(exact_starts_ptr + b, mask=valid, other=0), WINDOW, G)
    units = tl.where(valid, units, 0)
    share = tl.full([], SPLIT_UNITS, tl.int32)
    if SPLIT_UNITS == 0:
        share = tl.maximum(tl.cdiv(tl.sum(units, 0), wanted), MIN_UNITS)
        enough = tl.maximum(tl.max(units, 0), share)
        while share < enough:
            middle = (share + enough) // 2
            if tl.sum(tl.cdiv(units, middle), 0) <= wanted:
                enough = middle
            else:
                share = middle + 1
    count = tl.cdiv(units, share)
    end = tl.cumsum(count, 0)
    begin = end - count
    tl.store(indptr_ptr + b, begin, mask=valid)
    tl.store(indptr_ptr + b + 1, end, mask=valid & (b == batch_size - 1))
    for n in tl.range(0, tl.max(count, 0)):
        tl.store(requests_ptr + begin + n, b, mask=valid & (count > n))


def plan_decode(batch: DecodeBatch, config: KVarNConfig) -> None:
    """Write the plan of a step to its workspace; before the first layer, outside of CUDA graphs."""
    workspace = batch.workspace
    assert workspace is not None, "the Triton form needs a DecodeWorkspace"
    batch_size = batch.num_tokens
    _plan_kernel[(1,)](
        batch.seq_lens,
        batch.exact_starts,
        workspace.split_requests,
        workspace.split_indptr,
        batch_size,
        workspace.wanted_splits[batch_size - 1],
        WINDOW=config.window_pages,
        G=config.tile_size,
        SPLIT_UNITS=split_units(config),
        MIN_UNITS=MIN_SPLIT_UNITS,
        BLOCK=triton.next_power_of_2(batch_size),
        num_warps=4,
    )
