# SPDX-License-Identifier: Apache-2.0
"""`Attention` decides once which kernels serve a model on a device, owns their workspaces and runs its steps.

A serving engine makes one per model and device. For each step it describes a batch and calls `plan`, then, in every
layer, `attend`, which stores the new tokens, encodes the pages that they fill, and attends.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from types import ModuleType

import torch

from kvarn_kernels import extend_choice, torch_form, warm_up
from kvarn_kernels.batch import QKV, DecodeBatch, ExtendBatch, Limits
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import extend_dense, paged_calls
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import Gpu, gpu_of
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.read import (
    columns_sm90,
    decode,
    decode_plan,
    decode_sm90,
    extend,
    extend_sm90,
    finish_short,
    merge,
    verify_sm90,
)
from kvarn_kernels.shape import AttentionShape
from kvarn_kernels.write import chunk_cuda, encode, encode_cuda, rotate, store

logger = logging.getLogger(__name__)

CPU_FORM_ENV = "KVARN_CPU_FORM"
# tokens of an extend step up to which layers share the memory of what they rotate. Short steps wait for the host, which
# allocates for as long as it launches; what long ones keep would be missing elsewhere
REUSED_TOKENS = 1024


@dataclass(frozen=True)
class Kernels:
    """Name what runs each part of a step: "cuda" (CUDA C++), "triton" or "torch".

    Attributes:
        encode: as named, with the rotation and the ring store of extend steps; decode: as named; extend: of few tokens.
        dense: who attends long extend steps, one of `extend_dense.LIBRARIES`; empty where the same kernel does.
        dequantise: of what those steps read.
        short: of steps of few tokens on a long prefix, CUDA C++ that reads records; empty where `extend` or `dense` do.
    """

    encode: str
    decode: str
    extend: str
    dense: str = ""
    dequantise: str = "triton"
    short: str = ""


ExtendSteps = extend.ExtendPlan | extend_dense.DensePlan | extend_sm90.ShortPlan
TORCH = Kernels("torch", "torch", "torch")
TRITON = Kernels("triton", "triton", "triton")


@dataclass(frozen=True)
class Step:
    """A step that is ready to run in every layer.

    Attributes:
        batch: what the step is; plan: how it runs, where that depends on the step and is not kept in a workspace.
        sliding_plans: the same for layers with a sliding window, by its tokens.
        rotated: the new tokens of a short extend step in the layer that runs, with q and without, once a layer has run.
    """

    batch: DecodeBatch | ExtendBatch
    plan: ExtendSteps | None = None
    sliding_plans: dict[int, ExtendSteps] = field(default_factory=dict)
    rotated: dict[bool, QKV] = field(default_factory=dict)


def choose_kernels(
    shape: AttentionShape, config: KVarNConfig, device: torch.device, gpu: Gpu | None = None
) -> Kernels:
    """Return what serves a model on a device, or on a GPU that is described; nothing else asks what GPU it is.

    NVIDIA GPUs run the Triton kernels or, where they can, CUDA C++ with the same results: the encoder from compute
    capability 8.0 on, decode on Hopper and newer. A library attends long extend steps at the speed of a 16-bit cache,
    after what they read was written out in 16 bits: on Hopper the FlashAttention 3 of sgl_kernel, elsewhere FlashInfer,
    both of which SGLang brings; not where sums have a fixed order (only the Triton kernel has one that depends on the
    position alone).

    A CPU runs batched torch (same record bytes, same rule), because interpreted kernels are hundreds of times slower;
    tests set KVARN_CPU_FORM=triton to interpret them all the same.

    Raises:
        ValueError: KVARN_CPU_FORM is neither torch nor triton.
    """
    if device.type != "cuda":
        form = os.environ.get(CPU_FORM_ENV, "torch")
        if form not in ("torch", "triton"):
            raise ValueError(f"expected {CPU_FORM_ENV} to be torch or triton, got {form!r}: unset it")
        return TORCH if form == "torch" else TRITON
    gpu = gpu_of(device) if gpu is None else gpu
    if shape.dtype not in (torch.float16, torch.bfloat16):
        return TRITON
    compiled = gpu.capability >= (8, 0) and nvrtc.is_available()
    return Kernels(
        encode="cuda" if compiled else "triton",
        decode="cuda" if compiled and decode_sm90.runs_on(gpu) else "triton",
        extend="triton",
        dense="" if config.fixed_order else _dense_library(gpu),
        dequantise="cuda" if compiled else "triton",
        short="cuda" if compiled and not config.fixed_order and extend_sm90.serves(shape.head_dim, gpu) else "",
    )


def _dense_library(gpu: Gpu) -> str:
    if gpu.capability[0] == 9 and paged_calls.has_fa3():
        return paged_calls.FA3
    return paged_calls.FLASHINFER if importlib.util.find_spec("flashinfer") else ""


class Attention:
    """Run the attention of a model in a KVarN cache.

    Attributes:
        shape, config, device: of the model, the preset and where it runs.
        kernels: what runs each part.
        sliding_windows: that layers may have, in tokens.
    """

    def __init__(
        self,
        shape: AttentionShape,
        config: KVarNConfig,
        device: torch.device,
        limits: Limits,
        kernels: Kernels | None = None,
        gpu: Gpu | None = None,
        sliding_windows: Iterable[int] = (),
    ) -> None:
        """Choose the kernels and allocate their workspaces.

        Args:
            limits: of the steps.
            kernels: instead of `choose_kernels`; with the device "meta", what another device would take.
            gpu: the GPU to plan for, the device itself by default.
            sliding_windows: of the model's layers, in tokens, a query's own among them; layers that read all tokens
                need not be named.
        """
        self.shape, self.config, self.device, self._limits = shape, config, device, limits
        self._gpu = gpu_of(device) if gpu is None else gpu
        self.kernels = choose_kernels(shape, config, device, gpu) if kernels is None else kernels
        self.sliding_windows = tuple(sorted(set(sliding_windows) - {0}))
        compiled = self.kernels.encode == "cuda"
        self._encode: ModuleType = encode_cuda if compiled else encode
        self._rotate: ModuleType = chunk_cuda if compiled else rotate
        self._store: ModuleType = chunk_cuda if compiled else store
        self._decode_cuda = self._choose_decode_cuda()
        self._sliding_workspaces: dict[int, decode_plan.DecodeWorkspace] = {}
        self._decode_workspace = self._make_decode_workspace(limits.decode_batch)
        self._dense_workspace = self._make_dense_workspace()

    def _choose_decode_cuda(self) -> ModuleType:
        """Return which kernel of CUDA C++ attends decode steps, by the number of its columns."""
        # only decode_sm90 knows sliding windows, and the layers of a step share its partial results
        for module in () if self.sliding_windows else (verify_sm90, columns_sm90):
            if module.serves(self.shape.head_dim, self.shape.group, self._drafts_of_split, self._gpu):
                return module
        return decode_sm90

    def _make_decode_workspace(self, max_batch: int) -> decode_plan.DecodeWorkspace | None:
        if self.kernels.decode == "torch":
            return None
        pages, each = self._limits.request_pages, self._drafts_of_split
        if self.kernels.decode == "cuda":
            head_dim = self.shape.head_dim
            columns = self._decode_cuda.columns(head_dim, self.shape.group, each)
            resident = self._decode_cuda.resident_programs(head_dim, columns, self._gpu)
        else:
            resident, columns = decode.resident_programs(self._gpu), decode.columns(self.shape.group)
        requests = -(-max_batch // each)
        made = decode_plan.make_workspace(
            self.shape, self.config, self.device, requests, pages, resident, each, columns
        )
        self._sliding_workspaces = {tokens: made.with_plan(tokens) for tokens in self.sliding_windows}
        return made

    @property
    def _drafts_of_split(self) -> int:
        """Drafts of a request that are attended together: all of them, where sums may take any order.

        A step whose drafts end a page is cut elsewhere than the decode steps of the same tokens.
        """
        return 1 if self.config.fixed_order else self._limits.draft_tokens

    def _make_dense_workspace(self) -> extend_dense.DenseWorkspace | None:
        """Return the workspace of the first library that is to be had; where it is another one, name that."""
        if not self.kernels.dense or self.device.type == "meta":
            return None
        pages, compiled = self._limits.extend_pages, self.kernels.dequantise == "cuda"
        for library in dict.fromkeys((self.kernels.dense, paged_calls.FLASHINFER)):
            try:
                made = extend_dense.make_workspace(
                    self.shape, pages, self.device, library, compiled=compiled, sliding_windows=self.sliding_windows
                )
            except (ImportError, RuntimeError, OSError) as error:
                # FlashInfer builds its kernels with nvcc where they are not installed ready-made
                name = extend_dense.LIBRARIES[library].name
                logger.warning("%s's prefill kernels are not to be had, others run instead (slower): %s", name, error)
            else:
                self.kernels = replace(self.kernels, dense=library)
                return made
        self.kernels = replace(self.kernels, dense="")
        return None

    @property
    def num_bytes(self) -> int:
        """Bytes of the workspaces, with what a library allocates for them while the server runs."""
        total = 0 if self._decode_workspace is None else self._decode_workspace.num_bytes
        total += sum(workspace.plan_bytes for workspace in self._sliding_workspaces.values())
        if self.kernels.dense:
            # the pages of a chunk and of its window count twice: exact, and as records for the pages after them
            request_pages = self._limits.request_pages + self._limits.chunk_pages + 2
            pages, library, chunk = self._limits.extend_pages, self.kernels.dense, self._limits.chunk_pages
            windows = self.sliding_windows
            total += extend_dense.workspace_bytes(
                self.shape, pages, request_pages, library, self._gpu, windows, chunk
            )
        return total

    def describe(self) -> str:
        """Return in words what encodes and attends, e.g. "encode by Triton, decode by Triton, extends by Triton"."""
        if self.kernels == TORCH:
            return "encode, decode and extends by torch"
        encoder = f"CUDA C++ ({encode_cuda.SOURCE.name})" if self.kernels.encode == "cuda" else "Triton"
        decoder = f"CUDA C++ ({self._decode_cuda.SOURCE.name})" if self.kernels.decode == "cuda" else "Triton"
        short = f"CUDA C++ ({extend_sm90.SOURCE.name})" if self.kernels.short else "Triton"
        extends = f"short extends by {short}, others by Triton" if self.kernels.short else "extends by Triton"
        if self.kernels.dense:
            extends = f"short extends by {short}, long extends by {extend_dense.LIBRARIES[self.kernels.dense].name}"
        return f"encode by {encoder}, decode by {decoder}, {extends}"

    def reserve(self, decode_batch: int) -> None:
        """Make room for decode or verify steps of more rows, before any CUDA graph is captured."""
        if self._decode_workspace is not None and decode_batch > len(self._decode_workspace.rotated_q):
            self._decode_workspace = self._make_decode_workspace(decode_batch)

    def warm_up(self, cache: LayerCache, ring_pages: int, sinks: torch.Tensor | None = None) -> None:
        """Build every kernel of extend steps, by steps of zeros on page 0, which is padding.

        Args:
            cache: of any layer; page 0 is written. ring_pages: of the ring of a request.
            sinks: of any layer, None for a model without.
        """
        batches = warm_up.batches(self.shape, self.config, ring_pages, self.device)
        page = warm_up.page_on_records(self.config, ring_pages, self.device)
        for tokens in (0, *self.sliding_windows):
            plans: list[tuple[ExtendBatch, ExtendSteps]] = []
            plans += [(batch, self._plan_sparse(batch, tokens)) for batch in batches]
            if self.kernels.short and not tokens:
                plans.append((page, extend_sm90.plan_short(page, self.shape, self.config, self._gpu)))
            if self._dense_workspace is not None:
                dense = extend_dense.plan_dense(page, self._dense_workspace, self.config, self._gpu, tokens)
                plans.append((page, dense))
            self._run_zeros([Step(batch, plan, {tokens: plan}) for batch, plan in plans], cache, sinks, tokens)

    def _run_zeros(
        self, steps: list[Step], cache: LayerCache, sinks: torch.Tensor | None, sliding_window: int
    ) -> None:
        for step in steps:
            tokens, dtype = step.batch.num_tokens, self.shape.dtype
            q = torch.zeros(tokens, self.shape.num_qo_heads, self.shape.head_dim, dtype=dtype, device=self.device)
            k = q.new_zeros(tokens, self.shape.num_kv_heads, self.shape.head_dim)
            new = QKV(q, k, torch.zeros_like(k))
            self.attend(new, torch.empty_like(q), cache, step, 1.0, sinks, sliding_window)

    def plan(self, batch: DecodeBatch | ExtendBatch) -> Step:
        """Plan a step: before its first layer, outside of CUDA graphs, without waiting for the device.

        Raises:
            ValueError: the drafts of a step are attended together, and it has another number of them than the limits.
        """
        if isinstance(batch, DecodeBatch):
            if self._drafts_of_split not in (1, batch.drafts):
                raise ValueError(
                    f"expected a step with {self._limits.draft_tokens} drafts of each request, as its limits say, "
                    f"got {batch.drafts}"
                )
            if self._decode_workspace is not None:
                for workspace in (self._decode_workspace, *self._sliding_workspaces.values()):
                    decode_plan.plan_decode(batch, workspace, self.config)
            return Step(batch)
        if self.kernels.extend == "torch" or batch.num_tokens == 0:
            return Step(batch)
        plans: dict[int, ExtendSteps] = {}
        for tokens in (0, *self.sliding_windows):
            # calls of a library that were planned for this step already
            calls = sum(len(p.segments) for p in plans.values() if isinstance(p, extend_dense.DensePlan))
            plans[tokens] = self._plan_extend(batch, tokens, calls)
        return Step(batch, plans.pop(0), plans)

    def _plan_extend(self, batch: ExtendBatch, sliding_window: int, first_call: int) -> ExtendSteps:
        form = self._extend_form(batch, sliding_window)
        if form == extend_choice.DENSE:
            workspace, config = self._dense_workspace, self.config
            assert workspace is not None, "who attends densely has a workspace"
            return extend_dense.plan_dense(batch, workspace, config, self._gpu, sliding_window, first_call)
        if form == extend_choice.SHORT:
            return extend_sm90.plan_short(batch, self.shape, self.config, self._gpu)
        return self._plan_sparse(batch, sliding_window)

    def _plan_sparse(self, batch: ExtendBatch, sliding_window: int = 0) -> extend.ExtendPlan:
        return extend.plan_extend(batch, self.shape, self.config, self._gpu, sliding_window)

    def _extend_form(self, batch: ExtendBatch, sliding_window: int = 0) -> str:
        library, has_short = self.kernels.dense, bool(self.kernels.short)
        if self._dense_workspace is None:
            library = ""
        return extend_choice.extend_form(
            batch, self.shape, self.config, self._gpu, library, sliding_window, has_short=has_short
        )

    def attend(
        self,
        new: QKV,
        out: torch.Tensor,
        cache: LayerCache,
        step: Step,
        sm_scale: float,
        sinks: torch.Tensor | None = None,
        sliding_window: int = 0,
    ) -> None:
        """Store the new tokens of a step in one layer, encode the pages that they fill, and attend.

        Args:
            new: the tokens after RoPE, not rotated, model dtype; those of request b of an extend step are the rows
                qo_indptr[b] .. qo_indptr[b + 1] - 1, further rows are padding.
            out: [T, Hq, D] model dtype, contiguous, written.
            cache: memory of this layer; rings are written, and the records of full pages.
            step: from `plan`; sm_scale: factor of the scores.
            sinks: [Hq] any float dtype, attention sinks of the layer (see `reference.attention`), None without.
            sliding_window: of the layer, one of `sliding_windows`: the newest tokens that a query reads; 0 for all.
        """
        assert sliding_window in (0, *self.sliding_windows), "steps are planned for the windows of the model"
        if isinstance(step.batch, DecodeBatch):
            self._attend_decode(new, out, cache, step.batch, sm_scale, sinks, sliding_window)
        else:
            self._attend_extend(new, out, cache, step, sm_scale, sinks, sliding_window)

    def _attend_decode(
        self,
        new: QKV,
        out: torch.Tensor,
        cache: LayerCache,
        batch: DecodeBatch,
        sm_scale: float,
        sinks: torch.Tensor | None,
        sliding_window: int,
    ) -> None:
        workspace, config = self._decode_workspace, self.config
        if workspace is None:
            torch_form.attend_decode(new, out, cache, batch, config, sm_scale, sinks, sliding_window)
            return
        workspace = self._sliding_workspaces.get(sliding_window, workspace)
        rotate.rotate_to_rings(new, workspace.rotated_q, cache, batch, config)
        self._encode.encode_from_ring(cache, batch, config)
        if self.kernels.decode == "cuda":
            self._decode_cuda.decode(cache, batch, workspace, config, sm_scale)
        else:
            block = decode.exact_block(self.shape.head_dim, self._gpu)
            decode.decode(cache, batch, workspace, config, sm_scale, block)
        # drafts that share their splits are heads of one request
        merged = out.view(-1, workspace.drafts * self.shape.num_qo_heads, self.shape.head_dim)
        partial = (workspace.partial_out, workspace.partial_lse)
        merge.merge_splits(merged, *partial, workspace.split_indptr, config, sinks)

    def _attend_extend(
        self,
        new: QKV,
        out: torch.Tensor,
        cache: LayerCache,
        step: Step,
        sm_scale: float,
        sinks: torch.Tensor | None,
        sliding_window: int,
    ) -> None:
        batch, config = step.batch, self.config
        plan = step.sliding_plans.get(sliding_window, step.plan)
        assert isinstance(batch, ExtendBatch)
        if self.kernels.extend == "torch":
            torch_form.attend_extend(new, out, cache, batch, config, sm_scale, sinks, sliding_window)
            return
        if plan is None:
            return
        # long steps are attended in the model's frame
        with_q = not isinstance(plan, extend_dense.DensePlan)
        rotated = self._rotate.rotate_chunk(new, with_q=with_q, out=step.rotated.get(with_q))
        if len(new.k) <= REUSED_TOKENS:
            step.rotated[with_q] = rotated
        # the encoder and the attention read the ring as it was before this chunk, so the ring is written last
        if isinstance(plan, extend_sm90.ShortPlan):
            self._attend_short(rotated, out, cache, batch, plan, sm_scale, sinks)
            return
        self._encode.encode_from_chunk(rotated, cache, batch, config)
        if isinstance(plan, extend_dense.DensePlan):
            extend_dense.extend_dense(new, out, cache, batch, plan, config, sm_scale, sinks)
        else:
            extend.extend(rotated, out, cache, batch, plan, config, sm_scale, sinks)
        self._store.store_chunk(rotated, cache, batch, config)

    def _attend_short(
        self,
        rotated: QKV,
        out: torch.Tensor,
        cache: LayerCache,
        batch: ExtendBatch,
        plan: extend_sm90.ShortPlan,
        sm_scale: float,
        sinks: torch.Tensor | None,
    ) -> None:
        partial_out, partial_lse = extend_sm90.attend(rotated, cache, batch, plan, self.config, sm_scale)
        # beside the attention, which reads nothing that this step encodes
        self._encode.encode_from_chunk(rotated, cache, batch, self.config, early_start=True)
        finish_short.finish(out, partial_out, partial_lse, rotated, cache, batch, self.config, sinks)
