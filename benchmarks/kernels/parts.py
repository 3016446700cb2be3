# SPDX-License-Identifier: Apache-2.0
"""The parts of a layer, as the functions of `kvarn_kernels` that `Attention.attend` calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from kvarn_kernels.dense import extend_dense
from kvarn_kernels.read import columns_sm90, decode, decode_sm90, extend_sm90, finish_short, merge, verify_sm90
from kvarn_kernels.write import chunk_cuda, encode, encode_cuda, rotate, store

Places = dict[str, list[tuple[Any, str]]]

# rotate + store + encode-if-full, attention over records and ring, merge + rotate back
DECODE: Places = {
    "store": [(rotate, "rotate_to_rings"), (encode, "encode_from_ring"), (encode_cuda, "encode_from_ring")],
    "attend": [(module, "decode") for module in (decode, decode_sm90, columns_sm90, verify_sm90)],
    "merge": [(merge, "merge_splits")],
}
# of an extend step; "attention" is that of FlashInfer, FlashAttention 3 or extend_sm90.cu
PREFILL: Places = {
    "rotate": [(rotate, "rotate_chunk"), (chunk_cuda, "rotate_chunk")],
    "encode": [(encode, "encode_from_chunk"), (encode_cuda, "encode_from_chunk")],
    "dequantise": [(extend_dense, "dequantise"), (extend_dense, "dequantise_by_cuda")],
    "attention": [(extend_dense, "run_call"), (extend_sm90, "attend")],
    # `finish` stores, too
    "merge": [(extend_dense, "merge_parts"), (merge, "merge_splits"), (finish_short, "finish")],
    "store": [(store, "store_chunk"), (chunk_cuda, "store_chunk")],
}


@contextmanager
def replaced(places: Places, replace: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """Put `replace(part, function)` in the place of the functions of all parts within a with statement."""
    saved = [(place, name, getattr(place, name)) for functions in places.values() for place, name in functions]
    try:
        for part, functions in places.items():
            for place, name in functions:
                setattr(place, name, replace(part, getattr(place, name)))
        yield
    finally:
        for place, name, function in saved:
            setattr(place, name, function)


def only(part: str) -> Any:
    """Return a context manager in which a decode layer runs one part and leaves the others out."""
    return replaced(DECODE, lambda own, function: function if own == part else lambda *_args, **_kwargs: None)


@contextmanager
def timed() -> Iterator[dict[str, list[Any]]]:
    """Measure the parts of the extend steps that run inside: part -> pairs of CUDA events."""
    events: dict[str, list[Any]] = {part: [] for part in PREFILL}

    def measured(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            pair[0].record()
            result = function(*args, **kwargs)
            pair[1].record()
            events[part].append(pair)
            return result

        return call

    with replaced(PREFILL, measured):
        yield events
