# SPDX-License-Identifier: Apache-2.0
"""Copies of whole pages between the memory of a device and that of its host.

A load is a kernel that reads the memory of the host. A write is not: programs that write there fill the queues of the
GPU's own memory, and decode beside them takes 1.15 to 3.7 times as long (H200, 64 requests of 16,384 tokens, 4 to 16
programs at 52 GB/s; benchmarks/results/copy_pages.csv). So pages are gathered in device memory, from where the copy
engine takes them, page by page or several that follow each other at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from kvarn_kernels.device.launch import TritonLauncher

# programs of a load, the fewest that reach the speed of the link: 50 of 55 GB/s on an H200, where 4 reach 33; decode
# beside it takes 1.03 times as long
LOAD_PROGRAMS = 8
# programs that gather what the copy engine takes: several times as fast as the link
GATHER_PROGRAMS = 32
# bytes of device memory in which pages are gathered, if a page is not larger
STAGING_BYTES = 16 << 20
# 32-bit words that a program has in flight at once: 4 vectors of 16 bytes for each of 256 threads
BLOCK = 4096
# bytes of a vector, to which rows must be aligned
ALIGNMENT = 16


@triton.jit(do_not_specialize=["num_pages"])
def _copy_kernel(
    source_ptr,  # int32 words of [P, L, row]
    target_ptr,  # the same of another number of pages, written
    source_slots_ptr,  # [N] int64
    target_slots_ptr,  # [N] int64
    stride_source_slots,
    stride_target_slots,
    num_pages,
    num_layers,
    source_page,  # strides in words
    source_layer,
    target_page,
    target_layer,
    WORDS: tl.constexpr,  # of a row
    PAGE: tl.constexpr,  # slots of a page
    BLOCK: tl.constexpr,
):
    blocks: tl.constexpr = (WORDS + BLOCK - 1) // BLOCK
    for item in range(tl.program_id(0), num_pages * num_layers * blocks, tl.num_programs(0)):
        row = item // blocks
        page, layer = row // num_layers, (row % num_layers).to(tl.int64)
        source_id = tl.load(source_slots_ptr + page.to(tl.int64) * stride_source_slots) // PAGE
        target_id = tl.load(target_slots_ptr + page.to(tl.int64) * stride_target_slots) // PAGE
        source = source_ptr + source_id * source_page + layer * source_layer
        target = target_ptr + target_id * target_page + layer * target_layer
        words = item % blocks * BLOCK + tl.arange(0, BLOCK)
        tl.store(target + words, tl.load(source + words, mask=words < WORDS), mask=words < WORDS)


_launcher = TritonLauncher(_copy_kernel)


def copy_pages(
    source: torch.Tensor,
    target: torch.Tensor,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    page_size: int,
    programs: int = LOAD_PROGRAMS,
) -> None:
    """Copy the page of source_slots[n], all its layers, to the page of target_slots[n], on the current stream.

    A slot of a page stands for the page, slot // page_size, so that a load of many layers computes no page ids.

    Args:
        source, target: uint8 [P, L, row_bytes], rows contiguous, any strides between pages and between layers, of
            multiples of 16 bytes as row_bytes is. One of them may be page-locked memory of the host.
        source_slots, target_slots: int64 [N], any stride, no page of the target twice; on the device that copies.
        page_size: slots of a page; programs: that copy.

    Raises:
        ValueError: rows that are not of one size, or not aligned.
    """
    _check(source, target)
    if not len(source_slots):
        return
    words = [x.view(torch.int32) for x in (source, target)]
    _launcher(
        (programs, 1, 1),
        source_ptr=words[0],
        target_ptr=words[1],
        source_slots_ptr=source_slots,
        target_slots_ptr=target_slots,
        stride_source_slots=source_slots.stride(0),
        stride_target_slots=target_slots.stride(0),
        num_pages=len(source_slots),
        num_layers=source.shape[1],
        source_page=words[0].stride(0),
        source_layer=words[0].stride(1),
        target_page=words[1].stride(0),
        target_layer=words[1].stride(1),
        WORDS=words[0].shape[2],
        PAGE=page_size,
        BLOCK=BLOCK,
        num_warps=8,
    )


class StagedWrite:
    """Copies of pages of a device to page-locked memory of its host, through memory of the device."""

    def __init__(self, layers: int, row_bytes: int, device: torch.device, staging_bytes: int = STAGING_BYTES) -> None:
        """Allocate that memory: as many pages as fit staging_bytes, at least one."""
        pages = max(1, staging_bytes // (layers * row_bytes))
        self._staging = torch.empty(pages, layers, row_bytes, dtype=torch.uint8, device=device)
        self._places = torch.arange(pages, device=device)

    def __call__(
        self,
        source: torch.Tensor,
        target: torch.Tensor,
        source_slots: torch.Tensor,
        target_slots: torch.Tensor,
        page_size: int,
    ) -> None:
        """Do what `copy_pages` does, on the current stream.

        Args:
            source_slots: on the device; target_slots: on the host, which orders the copies. Pages of the target are
                contiguous.
        """
        pages, room = (target_slots // page_size).tolist(), len(self._staging)
        for start in range(0, len(pages), room):
            some = slice(start, start + room)
            own = source_slots[some]
            places = self._places[: len(own)] * page_size
            copy_pages(source, self._staging, own, places, page_size, GATHER_PROGRAMS)
            for first, end in _runs(pages[some]):
                at = pages[start + first]
                target[at : at + end - first].copy_(self._staging[first:end], non_blocking=True)


def _runs(pages: list[int]) -> Iterator[tuple[int, int]]:
    """Return (first, end) of the longest runs of pages that follow each other."""
    first = 0
    for n in range(1, len(pages) + 1):
        if n == len(pages) or pages[n] != pages[n - 1] + 1:
            yield first, n
            first = n


def copy_pages_by_torch(
    source: torch.Tensor,
    target: torch.Tensor,
    source_slots: torch.Tensor,
    target_slots: torch.Tensor,
    page_size: int,
) -> None:
    """Do the same in torch, where both are in the memory of a CPU."""
    _check(source, target)
    target[target_slots // page_size] = source[source_slots // page_size]


def _check(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.shape[1:] != target.shape[1:]:
        raise ValueError(f"expected rows of one size, got {tuple(source.shape[1:])} and {tuple(target.shape[1:])}")
    for x in (source, target):
        if x.stride(2) != 1 or any(n % ALIGNMENT for n in (x.data_ptr(), x.stride(0), x.stride(1), x.shape[2])):
            raise ValueError(
                f"expected rows of whole multiples of {ALIGNMENT} bytes, got {x.shape[2]} with strides {x.stride()}"
            )
