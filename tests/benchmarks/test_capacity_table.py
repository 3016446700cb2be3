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
    # 65 rows of 256 exact tokens
    assert kvarn["ring_mib"] * 2**20 == 65 * 256 * 147_456
    spent = kvarn["pool_tokens"] * 32_256 + (kvarn["ring_mib"] + kvarn["workspace_mib"]) * 2**20
    assert 0 <= 40 * 2**30 - spent < 128 * 32_256 + 2**20
