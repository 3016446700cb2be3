# SPDX-License-Identifier: Apache-2.0
"""compare_isolation treats both caches alike and allows what chance allows."""

from __future__ import annotations

from pathlib import Path

from benchmarks.isolation import compare_isolation, stress_isolation


def isolation_result(differing: int, requests: int = 1000, **counts: int) -> dict:
    counts = {"leaked secrets": 0, "failed": 0} | counts
    return {"requests": requests, "differing": differing, "differing at a near tie": 0} | counts


def test_compare_isolation_allows_what_chance_allows():
    stock = isolation_result(50)
    assert compare_isolation.verdict(isolation_result(0), stock)[0]
    # the difference of two shares of 5 % in 1,000 has a standard error of 1 %
    assert compare_isolation.verdict(isolation_result(65), stock)[0]
    assert not compare_isolation.verdict(isolation_result(80), stock)[0]
    assert not compare_isolation.verdict(isolation_result(0, **{"leaked secrets": 1}), stock)[0]
    assert not compare_isolation.verdict(isolation_result(0, failed=1), stock)[0]


def test_compare_isolation_does_not_pass_a_tier_that_nothing_hit():
    stock, tiers = isolation_result(50), ["hits in host memory", "hits in files"]
    for hits, missing in (((0, 7), tiers[0]), ((7, 0), tiers[1]), ((7, 7), "")):
        kvarn = isolation_result(0, **dict(zip(tiers, hits, strict=True)))
        passed, said = compare_isolation.verdict(kvarn, stock, tiers)
        assert passed == (not missing) and (passed or f"some {missing}, got none" in said)


def test_compare_isolation_loads_both_caches_alike(tmp_path):
    tiers = ["--hicache", "4", "--hicache-files", "f"]
    args = compare_isolation.parse(["--folder", str(tmp_path), "--one-by-one", *tiers])
    kvarn, stock = (compare_isolation.command(args, cache) for cache in (args.preset, compare_isolation.STOCK))
    # what it starts understands them
    assert stress_isolation.parse(kvarn[3:]).cache == "kvarn" and stress_isolation.parse(stock[3:]).requests == 5000
    different = [(one, other) for one, other in zip(kvarn, stock, strict=True) if one != other]
    assert [one for one, _ in different[:2]] == ["kvarn", str(tmp_path / "kvarn.json")]
    assert len(different) == 3 and "--page-size 128" in different[2][1]
    # the loaded server only: a stock server without a prefix cache, which answers alone, refuses it
    assert all(stress_isolation.parse(command[3:]).hicache == 4 for command in (kvarn, stock))
    assert all(stress_isolation.parse(command[3:]).hicache_files == Path("f") for command in (kvarn, stock))
    assert not any("hicache" in command for command in different[2])
