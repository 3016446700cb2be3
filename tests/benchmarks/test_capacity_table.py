# SPDX-License-Identifier: Apache-2.0
"""bench_capacity computes from bytes what a pool holds."""

from __future__ import annotations

from benchmarks.engine import bench_capacity


def test_capacity_of_qwen3_8b_is_that_of_its_bytes():
    bench_capacity.check_record_sizes()
    rows = {(row["cache"], row["requests"]): row for row in bench_capacity.measure("Qwen3-8B", 40.0, [64], 32768)}
    bf16, kvarn = rows["bf16", ""], rows["kvarn_k4v2_g128", 64]
    assert bf16["bytes_per_token"] == 36 * 8 * 512 and kvarn["bytes_per_token"] == 36 * 8 * 112
    assert bf16["pool_tokens"] == 40 * 2**30 // 147_456
    # 256 exact tokens, 28 of them a page, take 10 pages of 128 tokens
    assert kvarn["ring_tokens"] == 10 * 128 and round(1280 * 32_256 / 2**20, 1) == kvarn["ring_mib"]
    spent = kvarn["pool_tokens"] * 32_256 + kvarn["workspace_mib"] * 2**20
    assert 0 <= 40 * 2**30 - spent < 128 * 32_256 + 2**20
    # 64 requests that run leave the rest of the pool for text
    assert kvarn["running"] == 64 and kvarn["context_tokens"] == kvarn["pool_tokens"] - 64 * 1280
    assert kvarn["to_bf16"] == round(kvarn["context_tokens"] / bf16["pool_tokens"], 3)
    assert kvarn["requests_of_8k"] == 64 and bf16["requests_of_8k"] == bf16["pool_tokens"] // 8192
