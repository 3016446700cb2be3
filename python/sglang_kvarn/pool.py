# SPDX-License-Identifier: Apache-2.0
"""The token pool: pages of tile records, some of them rings of running requests."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn import budget, capacity, compat, hook, refusals, report, settings
from sglang_kvarn.capacity import MIB, ModelShape, States
from sglang_kvarn.rings import ATTRIBUTE, Rings
from sglang_kvarn.settings import PAGE_SIZE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostSource:
    """Name the pool for which host memory is to be made, among the facts that SGLang asks of a pool of slots.

    A slot has no row here; rows of one byte are too short for the buffer through which SGLang copies rows.
    """

    pool: KVarNTokenToKVPool
    device: Any
    head_num: int = 1
    head_dim: int = 1
    v_head_dim: int = 1
    dtype: torch.dtype = torch.uint8
    scales: None = None


class Retracted(NamedTuple):
    """Hold what a request has on the device, on the host.

    Attributes:
        records: uint8 [layers, P, Hk, record_bytes], of its full pages, and ring, of the pages of exact tokens that its
            next token reads.
        exact_start: as in `Rings`.
    """

    records: torch.Tensor
    ring: torch.Tensor
    exact_start: int


class KVarNTokenToKVPool(compat.MHATokenToKVPool):
    """Hold the records of every layer. A subclass, because SGLang recognises multi-head caches by class.

    A slot is page * 128 + offset as in any SGLang pool, but has no row: a page of a layer is Hk records.

    Attributes:
        config: the preset; shape: of the attention of every layer.
        layer_ids: of the layers with attention, as the whole model counts them; the others keep no tokens.
        slab: uint8 [layers, pages + 1, Hk, record_bytes]; page 0 is for padded CUDA-graph rows.
        records: the slab by layer.
        forward_stream: on which the pool is read and written, None on a CPU.
        balance_tag: returns what stands for the balance of channels in keys and values; those ask who send pages.
        layout: what the bytes of pages mean to other servers (`transfer.layout`), None without PD disaggregation.
        host: the host pool beside it, None without a hierarchical cache.
        exports_facts: whether its sizes are among the metrics of the server.
        rings: which pages hold the exact tokens of which request.
        states: that SGLang keeps for the other layers, None where there are none.
        sliding_tokens: of SGLang's pool for the layers with a sliding window, 0 where there are none.
        draft_tokens: new tokens of a request in a verify step, 1 without speculative decoding.
        draft_token_bytes: of a token in the cache of a draft model, which is SGLang's; 0 without one.
    """

    def __init__(
        self,
        tokens: int,
        shape: AttentionShape,
        layer_ids: list[int],
        *,
        config: KVarNConfig,
        rows: int,
        device: str,
        states: States | None = None,
        sliding_tokens: int = 0,
        draft_tokens: int = 1,
        draft_token_bytes: int = 0,
    ) -> None:
        """Allocate everything.

        Args:
            tokens: of the pool, whole pages; rows: of SGLang's ReqToTokenPool, the padding row included.
            states: that SGLang keeps for the other layers; sliding_tokens: that it keeps for them.
            draft_tokens: new tokens of a request in a verify step, 1 without speculative decoding.
            draft_token_bytes: of a token in the cache of a draft model, 0 without one.

        Raises:
            ValueError: the tokens are no whole pages.
        """
        hook.verify_hooks()
        self.config, self._rows, self.shape, self.layer_ids = config, rows, shape, layer_ids
        self.states, self.sliding_tokens = states, sliding_tokens
        self.draft_tokens, self.draft_token_bytes = draft_tokens, draft_token_bytes
        super().__init__(
            tokens,
            page_size=PAGE_SIZE,
            # bytes: models write fused into a pool of their own dtype
            dtype=torch.uint8,
            head_num=shape.num_kv_heads,
            head_dim=shape.head_dim,
            layer_num=len(layer_ids),
            device=device,
            enable_memory_saver=False,
        )

    def _create_buffers(self) -> None:
        if self.size % PAGE_SIZE:
            raise ValueError(f"expected whole pages of {PAGE_SIZE} tokens, got {self.size} tokens")
        pages = self.size // PAGE_SIZE + 1
        size = (self.layer_num, pages, self.head_num, self.config.record_bytes(self.head_dim))
        self.slab = torch.zeros(size, dtype=torch.uint8, device=self.device)
        self.records = list(self.slab.unbind())
        self.forward_stream: Any = None
        self.balance_tag: Callable[[], str] = str
        self.layout: dict[str, Any] | None = None
        self.host: Any = None
        self.exports_facts = False
        caches = [LayerCache(records, self.head_dim, self.shape.dtype) for records in self.records]
        self._layer_caches = dict(zip(self.layer_ids, caches, strict=True))
        # by SGLang's names, for host memory that takes states too
        self.full_attention_layer_id_mapping = {layer: n for n, layer in enumerate(self.layer_ids)}
        self.use_mla = False
        hit_reads_as_miss = self.config.window_pages == 0
        ring_pages = capacity.ring_pages(self.shape, self.config, self.draft_tokens)
        self.rings = Rings(self._rows, ring_pages, self.device, hit_reads_as_miss=hit_reads_as_miss)
        setattr(self, ATTRIBUTE, self.rings)
        # SGLang's transfer code walks these lists. They stay empty: a slot has no row of its own to transfer
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []

    def layer_cache(self, layer_id: int) -> LayerCache:
        """Return the memory of a layer with attention, by its id in the whole model.

        What is queued from now on finds the pages of the layer that a load from host memory brings, if one runs.
        """
        if self.layer_transfer_counter is not None:
            # beside others SGLang loads all layers of the model one after the other, else those of the pool
            alone = self.states is None and not self.sliding_tokens
            number = self.full_attention_layer_id_mapping[layer_id] if alone else layer_id
            self.layer_transfer_counter.wait_until(number)
        return self._layer_caches[layer_id]

    def attach_host(self, host: Any) -> None:
        """Note the host pool that was made for this one."""
        self.host = host
        logger.info(
            "KVarN: host memory for %s tokens in %.1f MiB, %.2f for each token of the pool%s",
            f"{host.size:,}",
            host.kv_buffer.nbytes / MIB,
            host.size / self.size,
            "" if self.states is None else ", and as many times the states, which SGLang keeps there",
        )
        if self.exports_facts:
            report.export(self.facts())

    def get_kv_size_bytes(self) -> int:
        """Return the bytes of all pages."""
        return sum(r.nbytes for r in self.records)

    def get_device_pool_infos(self) -> tuple[Any, ...]:
        """Return what SGLang from 0.5.23 on hands to the maker of a host pool."""
        return (SimpleNamespace(buffer_info=HostSource(self, device=self.device)),)

    def get_contiguous_buf_infos(self) -> tuple[list[int], list[int], list[int]]:
        """Return the address of the records of each layer, their bytes, and those of a page."""
        return (
            [records.data_ptr() for records in self.records],
            [records.nbytes for records in self.records],
            [records[0].nbytes for records in self.records],
        )

    def request_state_transfer_indices(self, row: int, tokens: int) -> list[int]:
        """Return the pages of a ring with the exact tokens that the next token reads, in the order of their tokens.

        SGLang sends them as a state of the request, from one server's pages to those of another.

        Args:
            tokens: of the request so far.
        """
        held = self.rings.held(row).pages.tolist()
        each = self.config.exact_tokens(self.head_dim, self.shape.dtype.itemsize)
        first = max(tokens // PAGE_SIZE - self.config.window_pages, 0) * PAGE_SIZE
        if first == tokens:
            return []
        # the oldest and the newest tokens may share a page of the ring
        return list(dict.fromkeys(held[n % len(held)] for n in range(first // each, -(-tokens // each))))

    def get_cpu_copy(
        self, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: int | None = None
    ) -> Retracted:
        """Copy a request to the host: a decode server keeps it there, and its prompt is on another server.

        Args:
            indices: int64 [T], the slots of its tokens; req_pool_index: its row.
        """
        assert req_pool_index is not None, "exact tokens are found by the row"
        self._wait_for_all()
        ring = self.request_state_transfer_indices(req_pool_index, len(indices))
        records = self.slab[:, self._full_pages(indices)].cpu()
        return Retracted(records, self.slab[:, ring].cpu(), self.rings.held(req_pool_index).exact_start)

    def load_cpu_copy(
        self, saved: Retracted, indices: torch.Tensor, mamba_indices: Any = None, req_pool_index: int | None = None
    ) -> None:
        """Copy a request back, to the slots and the row that it has now; as `get_cpu_copy`."""
        assert req_pool_index is not None, "exact tokens are found by the row"
        self._wait_for_all()
        ring = self.request_state_transfer_indices(req_pool_index, len(indices))
        self.slab[:, self._full_pages(indices)] = saved.records.to(self.slab.device)
        self.slab[:, ring] = saved.ring.to(self.slab.device)
        self.rings.set_exact_start(req_pool_index, saved.exact_start)
        self._wait_for_all()

    def _full_pages(self, indices: torch.Tensor) -> torch.Tensor:
        return indices[: len(indices) // PAGE_SIZE * PAGE_SIZE : PAGE_SIZE].long() // PAGE_SIZE

    def _wait_for_all(self) -> None:
        # steps run on another stream than the scheduler's copies
        if self.slab.is_cuda:
            torch.cuda.synchronize(self.slab.device)

    def facts(self) -> dict[str, Any]:
        """Return preset and sizes, JSON types."""
        return {
            "preset": self.config.name,
            "bytes_per_token": sum(records[0].nbytes for records in self.records) // PAGE_SIZE,
            "pool_tokens": self.size,
            "max_requests": self.rings.max_requests,
            "ring_tokens": self.rings.tokens_per_ring,
            "host_tokens": 0 if self.host is None else self.host.size,
            **({} if self.states is None else self._state_facts(self.states)),
            **({"sliding_tokens": self.sliding_tokens} if self.sliding_tokens else {}),
        }

    def _state_facts(self, states: States) -> dict[str, Any]:
        lengths = capacity.SESSIONS if states.per_session else ()
        sessions = {tokens: states.sessions(self.size, tokens) for tokens in lengths}
        return {
            "states": states.number,
            "bytes_per_state": states.nbytes,
            "states_per_request": states.per_request,
            "states_per_session": states.per_session,
            "cached_sessions": {str(n): {"sessions": s, "runs_out": what} for n, (s, what) in sessions.items()},
        }

    def _init_kv_copy_and_warmup(self) -> None:
        """Prepare nothing: no slot is ever copied."""

    def _clear_buffers(self) -> None:
        del self.records, self.slab, self.rings, self._layer_caches

    def set_kv_buffer(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: only the kvarn attention backend writes, it knows the request rows."""
        raise ValueError(
            "expected the kvarn attention backend to write the cache, got set_kv_buffer: use a 16-bit cache"
        )

    def get_key_buffer(self, layer_id: int) -> torch.Tensor:
        """Refuse: a record holds keys and values of a page, there is no key buffer."""
        raise ValueError(
            "expected the kvarn attention backend to read the cache, got get_key_buffer: use a 16-bit cache"
        )

    def get_value_buffer(self, layer_id: int) -> torch.Tensor:
        """Refuse, as `get_key_buffer`."""
        raise ValueError(
            "expected the kvarn attention backend to read the cache, got get_value_buffer: use a 16-bit cache"
        )

    def get_kv_buffer(self, layer_id: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Refuse, as `get_key_buffer`."""
        raise ValueError(
            "expected the kvarn attention backend to read the cache, got get_kv_buffer: use a 16-bit cache"
        )

    def move_kv_cache(self, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
        """Move nothing: the accepted drafts of a chain are where they belong already, and trees are refused."""


def build(
    configurator: Any, *, max_total_num_tokens: int, req_to_token_pool: Any, sliding_tokens: int = 0
) -> KVarNTokenToKVPool:
    """Build the pool of a kvarn target model.

    Args:
        configurator: SGLang's KVCacheConfigurator; max_total_num_tokens: of the pool, whole pages.
        sliding_tokens: of the pool beside it, for layers with a sliding window.
        req_to_token_pool: SGLang's ReqToTokenPool, which gets the rings.

    Raises:
        Refused: the pool does not hold a ring and a request.
    """
    config = settings.target_preset(configurator)
    assert config is not None, "another cache is SGLang's to build"
    refusals.check_model(configurator.model_config)
    shape, rows = budget.model_shape(configurator), req_to_token_pool.req_to_token.shape[0]
    draft_tokens = compat.draft_tokens(configurator.server_args)
    capacity.check_pool(max_total_num_tokens, shape, config, draft_tokens)
    pool = KVarNTokenToKVPool(
        max_total_num_tokens,
        shape.attention,
        budget.layer_ids(configurator),
        config=config,
        rows=rows,
        device=configurator.device,
        states=budget.states(configurator, compat.states_made(req_to_token_pool)),
        sliding_tokens=sliding_tokens,
        draft_tokens=draft_tokens,
        draft_token_bytes=budget.draft_token_bytes(configurator),
    )
    setattr(req_to_token_pool, ATTRIBUTE, pool.rings)
    if compat.get_parallel().tp_rank == 0:
        _log(pool, shape)
        if pool.draft_token_bytes:
            _log_draft(pool.draft_token_bytes, shape.token_bytes(config), configurator)
        if pool.states is not None:
            _log_states(pool, pool.states, configurator)
        if sliding_tokens:
            _log_sliding(pool, sliding_tokens, configurator)
        if configurator.server_args.enable_metrics:
            pool.exports_facts = True
            report.export(pool.facts())
    return pool


def _log(pool: KVarNTokenToKVPool, shape: ModelShape) -> None:
    token, full = shape.token_bytes(pool.config), shape.full_token_bytes(2)
    logger.info(
        "KVarN %s: %s bytes per token against %s in 16 bit (%.2fx), pool %s tokens in %.1f MiB; a running request "
        "takes the place of %s tokens more for its newest ones, so that %s",
        pool.config.name,
        f"{token:,}",
        f"{full:,}",
        full / token,
        f"{pool.size:,}",
        sum(r.nbytes for r in pool.records) / MIB,
        f"{pool.rings.tokens_per_ring:,}",
        capacity.describe_requests(pool.size, pool.rings.tokens_per_ring, pool.rings.max_requests),
    )


def _log_draft(drafted: int, token: int, configurator: Any) -> None:
    logger.info(
        "KVarN: the draft model keeps %s bytes of a token in a cache of SGLang's own, beside %s here, attended by %s",
        f"{drafted:,}",
        f"{token:,}",
        compat.resolved_arguments(configurator.server_args).speculative_draft_attention_backend,
    )


def _log_states(pool: KVarNTokenToKVPool, states: States, configurator: Any) -> None:
    logger.info(
        "KVarN: of %d layers %d keep tokens and %d states: %s of %.1f MiB, %d for a running request%s%s. A higher "
        "--mamba-full-memory-ratio than %s gives memory of tokens to states, --mamba-ssm-dtype bfloat16 halves most of "
        "a state",
        configurator.model_config.num_hidden_layers,
        len(pool.layer_ids),
        compat.state_layers(compat.hybrid_config(configurator.model_config)),
        f"{states.number:,}",
        states.nbytes / MIB,
        states.per_request,
        f" (and in a verify step one after each of {pool.draft_tokens} drafts)" if pool.draft_tokens > 1 else "",
        capacity.describe_sessions(states, pool.size),
        compat.scheduler_argument(configurator.server_args, "mamba_full_memory_ratio"),
    )


def _log_sliding(pool: KVarNTokenToKVPool, tokens: int, configurator: Any) -> None:
    share = budget.sliding_share(configurator)
    logger.info(
        "KVarN: of %d layers %d keep records and %d a sliding window of %d tokens, attended by %s in 16 bits, %s bytes "
        "per token: a pool of %s tokens for them in %.1f MiB, %s",
        configurator.model_config.num_hidden_layers,
        len(pool.layer_ids),
        len(budget.sliding_layer_ids(configurator)),
        compat.window_of_layers(configurator.model),
        compat.resolved_arguments(configurator.server_args).attention_backend,
        f"{share.sliding_token:,}",
        f"{tokens:,}",
        tokens * share.sliding_token / MIB,
        "as --swa-full-tokens-ratio says" if share.is_chosen else "as many as beside a 16-bit cache",
    )
