# SPDX-License-Identifier: Apache-2.0
"""What the decode and the prefill benchmark share: random pages, exact attention, the providers' common form."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

PAGE = TILE_SIZE
# times need a GPU; the tests make problems and check candidates without one
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = torch.bfloat16


def heads(args: argparse.Namespace) -> AttentionShape:
    """Return the heads that --heads and --head-dim name, 32/8 of 128."""
    num_qo_heads, num_kv_heads = (int(n) for n in args.heads.split("/"))
    return AttentionShape(num_qo_heads, num_kv_heads, args.head_dim, DTYPE)


def shape_settings(shape: AttentionShape) -> dict[str, Any]:
    """Return what a row says of the heads."""
    names = ("num_qo_heads", "num_kv_heads", "head_dim")
    return {name: getattr(shape, name) for name in names} | {"dtype": str(shape.dtype).removeprefix("torch.")}


def generator() -> torch.Generator:
    """Return the generator of a problem's inputs, the same for all providers."""
    return torch.Generator(DEVICE).manual_seed(0)


def draw(source: torch.Generator, *size: int) -> torch.Tensor:
    """Return normal random numbers in the model's dtype."""
    return torch.randn(size, generator=source, device=DEVICE).to(DTYPE)


def distinct_pages(source: torch.Generator, count: int, shape: AttentionShape) -> tuple[torch.Tensor, torch.Tensor]:
    """Return keys and values of a few pages that a context repeats, [U, G, Hk, D] each."""
    size = (count, PAGE, shape.num_kv_heads, shape.head_dim)
    return draw(source, *size), draw(source, *size)


def encoded(pages: tuple[torch.Tensor, torch.Tensor], config: KVarNConfig) -> torch.Tensor:
    """Return the records of pages [U, G, Hk, D], not rotated: uint8 [U, Hk, record_bytes]."""
    rotated = [reference.rotate(x).to(x.dtype).transpose(1, 2) for x in pages]
    parts = zip(*(x.split(16) for x in rotated), strict=True)
    return torch.cat([reference.encode_tile(k, v, config) for k, v in parts])


def write_ring(cache: LayerCache, ring_pages: torch.Tensor, start: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Write rotated tokens [n, Hk, D] of the positions from start on to a ring, which must hold all of them.

    Args:
        ring_pages: int32 [N], the pages of the ring.
    """
    width = 2 * cache.head_dim
    tokens = cache.exact.shape[2] // width
    assert len(k) <= tokens * len(ring_pages), "more tokens than the ring holds"
    positions = torch.arange(start, start + len(k), device=k.device)
    pages = ring_pages[positions // tokens % len(ring_pages)].long()
    places = cache.exact[..., : tokens * width].unflatten(2, (tokens, width))
    places[pages, :, positions % tokens] = torch.cat([k, v], -1)


def attend_exactly(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Return float32 attention of one query [Hq, D] to keys and values [N, Hk, D]: [Hq, D]."""
    grouped = q.float().unflatten(0, (k.shape[1], -1))
    scores = torch.einsum("hgd,thd->hgt", grouped, k.float()) * q.shape[-1] ** -0.5
    return torch.einsum("hgt,thd->hgd", scores.softmax(-1), v.float()).flatten(0, 1)


@dataclass
class Candidate:
    """A provider made ready.

    Attributes:
        run: writes the output of a layer; layers: how many there are, each with memory of its own.
        out: [N, Hq, D]; samples: rows of it that a check computes.
        expected: row -> [Hq, D] float32; None for a part of a layer, which has no result of its own.
        tolerance: relative RMS error up to which the times of a candidate count.
        bytes: of the context that a layer must read; 0: not counted.
        plan: prepares a step.
        timed: context manager in which parts of a layer are measured; it yields name -> list of event pairs.
    """

    run: Callable[[int], None]
    out: torch.Tensor
    samples: list[int]
    expected: Callable[[int], torch.Tensor] | None
    tolerance: float = 1e-2
    layers: int = 1
    bytes: int = 0
    plan: Callable[[], None] = lambda: None
    timed: Callable[[], AbstractContextManager[dict[str, list[Any]]]] | None = field(default=None)


def check(candidate: Candidate) -> float:
    """Return the relative RMS error of the samples in layer 0."""
    assert candidate.expected is not None, "a part has no result of its own"
    candidate.out.fill_(math.nan)
    candidate.plan()
    candidate.run(0)
    expected = torch.stack([candidate.expected(row) for row in candidate.samples])
    return ((candidate.out[candidate.samples].float() - expected).norm() / expected.norm()).item()
