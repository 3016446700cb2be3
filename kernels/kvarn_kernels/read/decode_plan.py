# SPDX-License-Identifier: Apache-2.0
"""How a decode step is split among programs: planned on the device from the lengths of the step, once for all layers.

The work of a request is counted in units: one for each page that it reads as a record, RING_UNITS for each chunk of
RING_CHUNK tokens of its ring. A split is a run of units of one request; it serves all KV heads, one program each.

    default     Every request is cut evenly into splits of at most `share` units, the smallest share that needs no more
                splits than `wanted_splits` of the step: whole waves of programs, long requests in more splits than
                short ones, none cut where a request is as short as what a split costs besides.
    fixed order A split is FIXED_SPLIT_UNITS units, counted from the first page that is read: the plan of a request
                depends on its position only, never on the other requests.

Splits of a request follow each other; split_requests and split_indptr of `DecodeWorkspace` hold the plan. Nothing is
read by the host and grids are sized by max_splits, so that one CUDA graph serves any lengths.

Layers with a sliding window read the pages that it touches, and have a plan of their own: one for each window of a
model, however many layers have it.

The rows of a verify step can be planned as if each were a request, or a request at a time (`DecodeWorkspace.drafts`):
then a split serves all its drafts, which read the same records.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

from kvarn_kernels.batch import DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

# units of a split where sums have a fixed order
FIXED_SPLIT_UNITS = 16
# a split shorter than this costs more in the merge than it hides
MIN_SPLIT_UNITS = 2
# the ring is planned in chunks of this many tokens (4 warps of decode_sm90.cu attend one at once), each of RING_UNITS
RING_CHUNK = tl.constexpr(64)
RING_UNITS = tl.constexpr(2)
# what wanted_splits plans with: units of time that a split takes besides its own, and the most waves
SPLIT_OVERHEAD = tl.constexpr(4)
MAX_WAVES = tl.constexpr(16)
# units of a request for which the workspace is made; longer ones get as many splits
TYPICAL_UNITS = 64
# columns, query heads of a KV head for each draft, that are the narrow side of one matrix instruction
TILE_COLUMNS = 8


@dataclass(frozen=True)
class DecodeWorkspace:
    """Hold what the decode kernels of all layers share; made once by `make_workspace`, so that CUDA graphs see fixed
    addresses.

    A step of B requests has S splits, at most max_splits[B - 1].

    Attributes:
        rotated_q: float32 [B_max * drafts, Hq, D], the rotated query.
        partial_out: float32 [S_max, drafts * Hq, D], the normalised output of each split.
        partial_lse: float32 [S_max, drafts * Hq], base-2 log sum of exp; -inf where a split holds no key.
        split_requests: int32 [S_max], the request of each split.
        split_indptr: int32 [B_max + 1], the first split of each request.
        max_splits: for each batch size from 1 to B_max.
        programs, resident: programs of a split; programs that the GPU runs at once.
        drafts: rows of a request that a split serves together; 1 where every row is planned as a request.
        sliding_window: tokens that a query of the planned layers reads, 0 for all.
    """

    rotated_q: torch.Tensor
    partial_out: torch.Tensor
    partial_lse: torch.Tensor
    split_requests: torch.Tensor
    split_indptr: torch.Tensor
    max_splits: tuple[int, ...]
    programs: int
    resident: int
    drafts: int
    sliding_window: int = 0

    @property
    def plan_bytes(self) -> int:
        """Bytes of the plan."""
        return self.split_requests.nbytes + self.split_indptr.nbytes

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.rotated_q.nbytes + self.partial_out.nbytes + self.partial_lse.nbytes + self.plan_bytes

    def with_plan(self, sliding_window: int) -> DecodeWorkspace:
        """Return the same memory with a plan of its own, for the layers of a step that have a sliding window."""
        requests, indptr = torch.zeros_like(self.split_requests), torch.zeros_like(self.split_indptr)
        return replace(self, split_requests=requests, split_indptr=indptr, sliding_window=sliding_window)


def make_workspace(
    shape: AttentionShape,
    config: KVarNConfig,
    device: torch.device,
    max_batch: int,
    max_pages: int,
    resident: int,
    drafts: int = 1,
    columns: int = TILE_COLUMNS,
) -> DecodeWorkspace:
    """Allocate the workspace for every batch size up to max_batch and requests of up to max_pages pages.

    Args:
        resident: programs of the decode kernel that the GPU runs at once.
        drafts: rows of a request that a split is to serve together.
        columns: query heads of a KV head for each draft that a program serves.
    """
    programs = programs_per_split(shape, drafts, columns)
    most = tuple(max_splits(b, programs, resident, max_pages, config) for b in range(1, max_batch + 1))
    splits, heads, head_dim = max(most), shape.num_qo_heads, shape.head_dim
    return DecodeWorkspace(
        rotated_q=torch.empty(max_batch * drafts, heads, head_dim, dtype=torch.float32, device=device),
        partial_out=torch.empty(splits, drafts * heads, head_dim, dtype=torch.float32, device=device),
        partial_lse=torch.empty(splits, drafts * heads, dtype=torch.float32, device=device),
        split_requests=torch.empty(splits, dtype=torch.int32, device=device),
        split_indptr=torch.zeros(max_batch + 1, dtype=torch.int32, device=device),
        max_splits=most,
        programs=programs,
        resident=resident,
        drafts=drafts,
    )


def programs_per_split(shape: AttentionShape, drafts: int = 1, columns: int = TILE_COLUMNS) -> int:
    """Return the programs that a split takes, one for each KV head and so many of its query heads for each draft."""
    return shape.num_kv_heads * -(-drafts * shape.group // columns)


def split_units(config: KVarNConfig) -> int:
    """Return the units of a split, 0 where they depend on the step."""
    return FIXED_SPLIT_UNITS if config.fixed_order else 0


def max_units(max_pages: int, config: KVarNConfig) -> int:
    """Return the most units of a request of up to max_pages pages."""
    return max_pages + RING_UNITS.value * (config.ring_len // RING_CHUNK.value)


def wanted_splits(batch_size: int, programs_per_split: int, resident: int, units: float = TYPICAL_UNITS) -> int:
    """Return the most splits of a step without a fixed order: what fills a whole number of waves of programs.

    More waves cut the work finer, but every split costs something. Estimated for requests of equal length, which fill
    the waves the worst, plus half a split for the uneven end of requests of different lengths. `_wanted_splits` does
    the same on the device, with the step's own mean.

    Args:
        programs_per_split: from the function of that name; resident: programs that the GPU runs at once.
        units: of a request, the mean of the step.
    """

    def cost(waves: int) -> float:
        per_request = waves * resident // programs_per_split // batch_size
        if not per_request:
            return float("inf")
        split = units / per_request
        return waves * (split + SPLIT_OVERHEAD.value) + split / 2

    waves = min(range(1, MAX_WAVES.value + 1), key=cost)
    return max(batch_size, waves * resident // programs_per_split)


def max_splits(batch_size: int, programs_per_split: int, resident: int, max_pages: int, config: KVarNConfig) -> int:
    """Return the most splits of a step, whatever its lengths."""
    if config.fixed_order:
        return batch_size * triton.cdiv(max_units(max_pages, config), FIXED_SPLIT_UNITS)
    return wanted_splits(batch_size, programs_per_split, resident)


@triton.jit
def _wanted_splits(units, batch_size, PROGRAMS: tl.constexpr, RESIDENT: tl.constexpr):
    """Return `wanted_splits` of a step of so many units in all."""
    waves = 1 + tl.arange(0, MAX_WAVES)
    splits = waves * RESIDENT // PROGRAMS
    per_request = splits // batch_size
    split = units.to(tl.float32) / tl.maximum(batch_size * per_request, 1)
    cost = tl.where(per_request > 0, waves * (split + SPLIT_OVERHEAD) + split / 2, float("inf"))
    best = tl.min(tl.where(cost == tl.min(cost, 0), waves, MAX_WAVES), 0)
    return tl.maximum(batch_size, best * RESIDENT // PROGRAMS)


@triton.jit
def first_page_of(position, SLIDING: tl.constexpr, G: tl.constexpr):
    """Return the page of the first key that a position reads; SLIDING: tokens of the sliding window, 0 for none."""
    return tl.maximum(position - (SLIDING - 1), 0) // G if SLIDING > 0 else 0


@triton.jit
def exact_page_of(position, exact_start, WINDOW: tl.constexpr, G: tl.constexpr, SLIDING: tl.constexpr = 0):
    """Return the page of the first key that a position reads exactly; pages before it are read as records."""
    page = position // G
    exact_page = tl.minimum(tl.maximum(page - WINDOW, exact_start // G), page)
    if SLIDING > 0:
        exact_page = tl.maximum(exact_page, first_page_of(position, SLIDING, G))
    return exact_page


@triton.jit
def work_of(
    seq_len, exact_start, WINDOW: tl.constexpr, G: tl.constexpr, DRAFTS: tl.constexpr = 1, SLIDING: tl.constexpr = 0
):
    """Return (first page that is read, page that ends what is read as records, units) of a request.

    Args:
        seq_len: tokens with the first draft. The last draft reads the most records, the first the most tokens exactly.
    """
    last = seq_len - 1 + (DRAFTS - 1)
    first_page = first_page_of(seq_len - 1, SLIDING, G)
    exact_page = exact_page_of(last, exact_start, WINDOW, G, SLIDING)
    first_exact = exact_page_of(seq_len - 1, exact_start, WINDOW, G, SLIDING)
    ring_units = (last - first_exact * G) // RING_CHUNK * RING_UNITS + RING_UNITS
    return first_page, exact_page, exact_page - first_page + ring_units


@triton.jit
def ring_start(unit, record_units, first_exact, G: tl.constexpr):
    """Return the first ring position of a split that begins with a unit; the end of one that ends before it.

    Args:
        record_units: units of the request that are records.
        first_exact: the page of the first key that the first draft reads exactly.
    """
    return first_exact * G + (tl.maximum(unit - record_units, 0) + RING_UNITS - 1) // RING_UNITS * RING_CHUNK


@triton.jit(do_not_specialize=["batch_size", "most"])
def _plan_kernel(
    seq_lens_ptr,  # [B * DRAFTS] int32
    exact_starts_ptr,  # [B * DRAFTS] int32
    requests_ptr,  # [S] int32, written: request of each split
    indptr_ptr,  # [B + 1] int32, written: first split of each request
    batch_size,
    most,  # splits that the workspace holds for this batch size
    PROGRAMS: tl.constexpr,
    RESIDENT: tl.constexpr,
    WINDOW: tl.constexpr,
    G: tl.constexpr,
    DRAFTS: tl.constexpr,
    SLIDING: tl.constexpr,  # tokens of the sliding window, 0 for none
    SPLIT_UNITS: tl.constexpr,  # 0: an equal share of the step
    MIN_UNITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.arange(0, BLOCK)
    valid = b < batch_size
    seq_lens = tl.load(seq_lens_ptr + b * DRAFTS, mask=valid, other=1)
    exact_starts = tl.load(exact_starts_ptr + b * DRAFTS, mask=valid, other=0)
    _, _, units = work_of(seq_lens, exact_starts, WINDOW, G, DRAFTS, SLIDING)
    units = tl.where(valid, units, 0)
    share = tl.full([], SPLIT_UNITS, tl.int32)
    if SPLIT_UNITS == 0:
        wanted = tl.minimum(_wanted_splits(tl.sum(units, 0), batch_size, PROGRAMS, RESIDENT), most)
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


def plan_decode(batch: DecodeBatch, workspace: DecodeWorkspace, config: KVarNConfig) -> None:
    """Write the plan of a step to the workspace; before the first layer, outside of CUDA graphs."""
    batch_size = batch.num_tokens // workspace.drafts
    _plan_kernel[(1,)](
        seq_lens_ptr=batch.seq_lens,
        exact_starts_ptr=batch.exact_starts,
        requests_ptr=workspace.split_requests,
        indptr_ptr=workspace.split_indptr,
        batch_size=batch_size,
        most=workspace.max_splits[batch_size - 1],
        PROGRAMS=workspace.programs,
        RESIDENT=workspace.resident,
        WINDOW=config.window_pages,
        G=TILE_SIZE,
        DRAFTS=workspace.drafts,
        SLIDING=workspace.sliding_window,
        SPLIT_UNITS=split_units(config),
        MIN_UNITS=MIN_SPLIT_UNITS,
        BLOCK=triton.next_power_of_2(batch_size),
        num_warps=4,
    )
