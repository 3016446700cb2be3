# SPDX-License-Identifier: Apache-2.0
"""The token pool: pages of tile records, some of them rings of running requests."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.memory import LayerCache
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn import budget, capacity, compat, hook, refusals, report, settings
from sglang_kvarn.capacity import MIB, ModelShape
from sglang_kvarn.rings import ATTRIBUTE, Rings
from sglang_kvarn.settings import PAGE_SIZE

logger = logging.getLogger(__name__)


class KVarNTokenToKVPool(compat.MHATokenToKVPool):
    """Hold the records of every layer. A subclass, because SGLang recognises multi-head caches by class.

    A slot is page * 128 + offset as in any SGLang pool, but has no row: a page of a layer is Hk records.

    Attributes:
        config: the preset; shape: of the attention of every layer.
        records: per layer uint8 [pages + 1, Hk, record_bytes]; page 0 is for padded CUDA-graph rows.
        rings: which pages hold the exact tokens of which request.
    """

    def __init__(
        self, *args: Any, config: KVarNConfig, rows: int, shape: AttentionShape, **kwargs: Any
    ) -> None:
        hook.verify_hooks()
        self.config, self._rows, self.shape = config, rows, shape
        super().__init__(*args, **kwargs)

    def _create_buffers(self) -> None:
        if self.page_size != PAGE_SIZE or self.size % self.page_size:
            raise ValueError(
                f"expected whole pages of {PAGE_SIZE} tokens, got {self.size} tokens in pages of "
                f"{self.page_size}: drop --page-size"
            )
        pages = self.size // self.page_size + 1
        size = (pages, self.head_num, self.config.record_bytes(self.head_dim))
        self.records = [torch.zeros(size, dtype=torch.uint8, device=self.device) for _ in range(self.layer_num)]
        self._layer_caches = [LayerCache(records, self.head_dim, self.shape.dtype) for records in self.records]
        hit_reads_as_miss = self.config.window_pages == 0
        ring_pages = capacity.ring_pages(self.shape, self.config)
        self.rings = Rings(self._rows, ring_pages, self.device, hit_reads_as_miss=hit_reads_as_miss)
        setattr(self, ATTRIBUTE, self.rings)
        # SGLang's transfer code walks these lists. They stay empty: a slot has no row of its own to transfer
        self.k_buffer: list[torch.Tensor] = []
        self.v_buffer: list[torch.Tensor] = []

    def layer_cache(self, layer_id: int) -> LayerCache:
        """Return the memory of a layer."""
        return self._layer_caches[layer_id - self.start_layer]

    def get_kv_size_bytes(self) -> int:
        """Return the bytes of all pages."""
        return sum(r.nbytes for r in self.records)

    def facts(self) -> dict[str, Any]:
        """Return preset and sizes, JSON types."""
        return {
            "preset": self.config.name,
            "bytes_per_token": sum(records[0].nbytes for records in self.records) // PAGE_SIZE,
            "pool_tokens": self.size,
            "max_requests": self.rings.max_requests,
            "ring_tokens": self.rings.tokens_per_ring,
        }

    def _clear_buffers(self) -> None:
        del self.records, self.rings, self._layer_caches

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
        """Refuse: quantised tokens cannot move between pages."""
        raise ValueError("expected no slot to move, got move_kv_cache: drop --speculative-algorithm")


def build(configurator: Any, *, max_total_num_tokens: int, req_to_token_pool: Any) -> KVarNTokenToKVPool:
    """Build the pool of a kvarn target model.

    Args:
        configurator: SGLang's KVCacheConfigurator; max_total_num_tokens: of the pool, whole pages.
        req_to_token_pool: SGLang's ReqToTokenPool, which gets the rings.

    Raises:
        Refused: the pool does not hold a ring and a request.
    """
    config = settings.target_preset(configurator)
    assert config is not None, "another cache is SGLang's to build"
    refusals.check_model(configurator.model_config)
    shape, rows = budget.model_shape(configurator), req_to_token_pool.req_to_token.shape[0]
    capacity.check_pool(max_total_num_tokens, shape, config)
    pool_class = partial(KVarNTokenToKVPool, config=config, rows=rows, shape=shape.attention)
    pool = configurator._build_mha_kv_pool(max_total_num_tokens=max_total_num_tokens, mha_pool_class=pool_class)
    setattr(req_to_token_pool, ATTRIBUTE, pool.rings)
    if compat.get_parallel().tp_rank == 0:
        _log(pool, shape)
        if configurator.server_args.enable_metrics:
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
