# SPDX-License-Identifier: Apache-2.0
"""Steps that launch every kernel of extend steps, so that no request waits seconds for a compiler.

Kernels of decode steps are built when their CUDA graphs are captured.
"""

from __future__ import annotations

import torch

from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.read import extend, merge
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape


def full_page(ring_pages: int, device: torch.device) -> ExtendBatch:
    """Return a step of one full page with nothing cached."""
    return _step(0, TILE_SIZE, ring_pages, device)


def page_on_records(config: KVarNConfig, ring_pages: int, device: torch.device) -> ExtendBatch:
    """Return a step of one full page after its window and a page that is read as a record."""
    return _step((config.window_pages + 1) * TILE_SIZE, TILE_SIZE, ring_pages, device)


def batches(
    shape: AttentionShape, config: KVarNConfig, ring_pages: int, device: torch.device
) -> list[ExtendBatch]:
    """Return steps for every kernel that reads records: a full page; splits, with a merge of few and of many rows."""
    steps = [full_page(ring_pages, device)]
    if not config.fixed_order:
        cached = (2 * extend.MIN_SPLIT_PAGES + 1) * TILE_SIZE
        steps += [_step(cached, new, ring_pages, device) for new in (1, -(-merge.FEW_ROWS // shape.num_qo_heads))]
    return steps


def _step(cached: int, new: int, ring_pages: int, device: torch.device) -> ExtendBatch:
    """Return a step of one request with `new` tokens after `cached` ones; all its pages are page 0."""
    length = cached + new

    def int32(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return ExtendBatch(
        ring_pages=torch.zeros(1, ring_pages, dtype=torch.int32, device=device),
        prefix_lens=int32(cached),
        seq_lens=int32(length),
        qo_indptr=int32(0, new),
        page_table=torch.zeros(1, -(-length // TILE_SIZE), dtype=torch.int32, device=device),
        exact_starts=int32(0),
        prefix_lens_host=[cached],
        seq_lens_host=[length],
    )
