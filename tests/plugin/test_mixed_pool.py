# SPDX-License-Identifier: Apache-2.0
"""The pool of a model with sliding windows: what its part in 16 bits holds, and what SGLang may do to it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.shape import AttentionShape
from sglang_kvarn import budget, compat, plugin, settings
from sglang_kvarn import pool as records_pool
from sglang_kvarn.mixed_pool import MixedPool

HEADS, HEAD_DIM, TOKENS = 4, 64, 512


@pytest.fixture
def records() -> records_pool.KVarNTokenToKVPool:
    """Return the records of layer 0."""
    shape = AttentionShape(num_qo_heads=4, num_kv_heads=2, head_dim=HEAD_DIM, dtype=torch.float32)
    config = KVarNConfig.from_preset("kvarn")
    return records_pool.KVarNTokenToKVPool(1024, shape, [0], config=config, rows=2, device="cpu")


def test_no_accepted_draft_is_moved(records):
    mixed = MixedPool(records, TOKENS, [1], (HEADS, HEAD_DIM, HEAD_DIM))
    mixed.register_mapping(torch.arange(TOKENS))
    before = mixed.swa_kv_pool.k_buffer[0].normal_().clone(), records.records[0].clone()
    mixed.move_kv_cache(torch.tensor([130, 131]), torch.tensor([130, 132]))
    assert torch.equal(mixed.swa_kv_pool.k_buffer[0], before[0]) and torch.equal(records.records[0], before[1])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_rank_has_the_sliding_windows_of_its_heads(records, monkeypatch, ranks):
    monkeypatch.setattr(settings, "target_preset", lambda configurator: records.config)
    monkeypatch.setattr(records_pool, "build", lambda *args, **kwargs: records)
    monkeypatch.setattr(budget, "sliding_layer_ids", lambda configurator: [1])
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(attn_tp_size=ranks), raising=False)
    model = SimpleNamespace(
        get_swa_num_kv_heads=lambda size: HEADS // size, swa_head_dim=HEAD_DIM, swa_v_head_dim=HEAD_DIM
    )
    sizes = SimpleNamespace(max_total_num_tokens=1024, swa_max_total_num_tokens=TOKENS)
    found = plugin._build_pool(
        lambda *args: None, SimpleNamespace(model_config=model), sizes=sizes, req_to_token_pool=None
    )
    assert found.full_kv_pool is records
    assert found.swa_kv_pool.k_buffer[0].shape[1:] == (HEADS // ranks, HEAD_DIM)
