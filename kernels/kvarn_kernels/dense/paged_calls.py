# SPDX-License-Identifier: Apache-2.0
"""Who attends over the pages of a dense extend step: FlashInfer, or the FlashAttention 3 that SGLang ships.

Both take the calls of `segments`: pseudo-requests of at most a page of queries over pages of the workspace, causality
aligned to the right. A library plans a call once for all layers, without waiting for the device, and runs it in each.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from kvarn_kernels.dense.segments import PagedCall

FLASHINFER, FA3 = "flashinfer", "fa3"

# query [N, Hq, D], (keys, values) [M, Hk, G, D], scale of the scores, out [N, Hq, D], lse float32 [N, Hq] of base 2 or
# None; writes out and, where it is given, lse
Run = Callable[[torch.Tensor, tuple[torch.Tensor, torch.Tensor], float, torch.Tensor, torch.Tensor | None], None]


class Library(Protocol):
    """Attend over pages.

    Attributes:
        name: for people.
        call_bytes: of device memory that a planned call takes, at most.
        cuts_contexts: whether it reads a long context in parallel parts where queries are few.
    """

    name: str
    call_bytes: int
    cuts_contexts: bool

    def plan(
        self,
        number: int,
        call: PagedCall,
        pages: torch.Tensor,
        num_qo_heads: int,
        *,
        causal: bool,
        sliding_window: int = 0,
    ) -> Run:
        """Plan call `number` of a step.

        Args:
            pages: [M, Hk, G, D], of the keys or the values.
            sliding_window: tokens up to its own that a query of a causal call sees, 0 for all.
        """
        ...


def has_fa3() -> bool:
    """Whether sgl_kernel is installed with its FlashAttention 3; whether it loads shows when it is imported."""
    spec = importlib.util.find_spec("sgl_kernel")
    folders = spec.submodule_search_locations if spec else None
    return any(list(Path(folder).glob("flash_ops*.so")) for folder in folders or ())


def to_device(device: torch.device, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """Copy int32 tensors of the host in one piece, in stream order, without waiting; each begins at 16 bytes."""
    if device.type != "cuda":
        return list(tensors)
    sizes = [-(-x.numel() // 4) * 4 for x in tensors]
    pinned = torch.empty(sum(sizes), dtype=torch.int32, pin_memory=True)
    for part, x in zip(pinned.split(sizes), tensors, strict=True):
        part[: x.numel()] = x.flatten()
    copied = pinned.to(device, non_blocking=True).split(sizes)
    return [part[: x.numel()].view(x.shape) for part, x in zip(copied, tensors, strict=True)]


class FlashInfer:
    """FlashInfer's paged prefill. The first plan on a host builds its kernels, which takes a minute."""

    name, cuts_contexts = "FlashInfer", False
    # what a wrapper of FlashInfer 0.6.14 allocates on the device: schedules, and a length per pseudo-request
    call_bytes = (8 << 20) + 4 * 32768

    def __init__(self, device: torch.device, module: Any = None) -> None:
        """Import it.

        Args:
            module: stands in for flashinfer in tests.
        """
        if module is None:
            import flashinfer

            module = flashinfer
        self._module = module
        # FlashInfer wants a buffer for split contexts, which are not used here
        self._scratch = torch.empty(16, dtype=torch.uint8, device=device)
        self.wrappers: list[Any] = []

    def plan(
        self,
        number: int,
        call: PagedCall,
        pages: torch.Tensor,
        num_qo_heads: int,
        *,
        causal: bool,
        sliding_window: int = 0,
    ) -> Run:
        """Plan a call. FlashInfer reads the lengths on the host and only copies the indices, so nothing waits."""
        if number == len(self.wrappers):
            self.wrappers.append(self._module.BatchPrefillWithPagedKVCacheWrapper(self._scratch, "HND"))
        wrapper, (_, kv_heads, page, head_dim) = self.wrappers[number], pages.shape
        wrapper.plan(
            call.qo_indptr,
            call.kv_indptr,
            *to_device(pages.device, call.kv_indices),
            call.last_page_len,
            num_qo_heads,
            kv_heads,
            head_dim,
            page,
            causal=causal,
            # keys before the query's own; -1 for all
            window_left=sliding_window - 1,
            # the scale of a layer comes with its query
            sm_scale=1.0,
            q_data_type=pages.dtype,
            max_token_per_sequence=page,
            # a query page is small enough as a unit of work, and a split context needs a buffer of up to 128 MiB
            disable_split_kv=True,
        )

        def run(
            query: torch.Tensor,
            keys_values: tuple[torch.Tensor, torch.Tensor],
            sm_scale: float,
            out: torch.Tensor,
            lse: torch.Tensor | None,
        ) -> None:
            if lse is None:
                lse = torch.empty(query.shape[:2], dtype=torch.float32, device=query.device)
            wrapper.run(query, keys_values, q_scale=sm_scale, out=out, lse=lse, return_lse=True)

        return run


class FlashAttention3:
    """FlashAttention 3 of sgl_kernel, what stock SGLang attends with on Hopper; built ready-made.

    Contract of `sgl_kernel.flash_attn.flash_attn_with_kvcache` in sglang-kernel 0.4.5 and 0.4.10: page tables and
    lengths on the device, log sums of exp [Hq, N] of base e.
    """

    name, cuts_contexts = "FlashAttention 3", True
    # tables and lengths, and parts of contexts that it cuts: at most a wave of blocks of 128 rows of 256 channels
    call_bytes = 32 << 20

    def __init__(self, device: torch.device, function: Any = None) -> None:
        """Import it.

        Args:
            function: stands in for flash_attn_with_kvcache in tests.

        Raises:
            ImportError: this sgl_kernel has no FlashAttention 3 for the device.
        """
        if function is None:
            from sgl_kernel.flash_attn import flash_attn_with_kvcache

            function = flash_attn_with_kvcache
        self._function = function

    def plan(
        self,
        number: int,
        call: PagedCall,
        pages: torch.Tensor,
        num_qo_heads: int,
        *,
        causal: bool,
        sliding_window: int = 0,
    ) -> Run:
        """Plan a call: a page table with a row for each pseudo-request, and its lengths."""
        table, lengths = call.page_table()
        tables = {"page_table": table, "cache_seqlens": lengths, "cu_seqlens_q": call.qo_indptr}
        planned = dict(zip(tables, to_device(pages.device, *tables.values()), strict=True))
        most = int(call.qo_indptr.diff().max())
        # keys before and after the query's own; -1 for all
        window = (sliding_window - 1, 0 if sliding_window else -1)

        def run(
            query: torch.Tensor,
            keys_values: tuple[torch.Tensor, torch.Tensor],
            sm_scale: float,
            out: torch.Tensor,
            lse: torch.Tensor | None,
        ) -> None:
            keys, values = (x.transpose(1, 2) for x in keys_values)
            _, found, *_ = self._function(
                query, keys, values, **planned, max_seqlen_q=most, softmax_scale=sm_scale, causal=causal,
                window_size=window, out=out, return_softmax_lse=True,
            )  # fmt: skip
            if lse is not None:
                torch.mul(found.T, 1 / math.log(2), out=lse)

        return run
