# SPDX-License-Identifier: Apache-2.0
"""The agent benchmark: its accounting by hand-made numbers, and once against a real server on the CPU."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks.agentic import bench_agentic, counters, plots, report, summary, trace
from benchmarks.agentic.theory import common_prefix, theoretical_hit
from benchmarks.agentic.workload import History, Shape
from benchmarks.common import launch, rows, store
from benchmarks.engine import bench_serving

SMALL = Shape(system_tokens=130, task_tokens=50, turns=2, turn_tokens=40, output_tokens=6, vocabulary=500)


def row(**values) -> dict:
    """Return a finished turn."""
    base = {
        "session": 0, "turn": 0, "sent": 0.0, "prompt_tokens": 100, "output_tokens": 10, "cached_tokens": 64,
        "theory_tokens": 64, "ttft": 0.1, "tpot": 0.01, "seconds": 0.2, "retractions": 0,
    }  # fmt: skip
    return base | values


def result(cache: str, sessions: int, share: float | None, **values) -> dict:
    """Return a finished point with two turns."""
    turns = [row(), row(turn=1, ttft=0.3)]
    point = summary.point(turns, 2.0, 1000) | {"cache": cache, "sessions": sessions, "hit_share": share}
    point |= {"model": "m", "device": "d", "sglang": "s"}
    return point | {"by_turn": summary.by_turn(turns), "turns": turns, "server_command": ["x"]} | values


@pytest.mark.parametrize(
    "length, computed, page, expected",
    [
        (400, 300, 128, 256),
        (400, 300, 1, 300),
        (256, 256, 128, 128),  # the last token is computed again
        (257, 257, 128, 256),
        (256, 256, 1, 255),
        (1, 300, 1, 0),
        (400, 127, 128, 0),
        (400, 0, 128, 0),
    ],
)
def test_theoretical_hit_is_full_pages_before_the_last_token(length, computed, page, expected):
    tokens = list(range(1000))
    assert theoretical_hit(tokens[:length], [np.arange(computed)], page) == expected


def test_theoretical_hit_takes_the_longest_of_all_sequences():
    prompt = list(range(400))
    other = prompt[:200] + [9999] * 300
    assert theoretical_hit(prompt, [np.asarray(other), np.asarray(prompt[:130])], 64) == 192
    assert common_prefix(prompt, other) == 200 and common_prefix([], [1]) == 0


def test_history_keeps_what_a_rewritten_context_left_behind():
    history = History([1, 2, 3])
    history.add([1, 2, 3, 4, 5], [6])
    assert history.tokens == [1, 2, 3, 4, 5, 6] and len(history.computed) == 1
    history.add([1, 2, 9], [9])
    assert theoretical_hit([1, 2, 3, 4, 5, 6, 7], history.computed, 1) == 6
    assert theoretical_hit([1, 2, 9, 9, 7], history.computed, 1) == 4


def test_sessions_are_equal_for_every_number_of_them_and_differ_from_each_other():
    few, many = SMALL.workload(1), SMALL.workload(3)
    assert few.shared == many.shared and few.sessions == many.sessions[:1]
    assert [len(turn.token_ids) for turn in few.sessions[0]] == [50, 40, 40]
    assert len({tuple(session[0].token_ids) for session in many.sessions}) == 3
    assert SMALL.workload(1) != Shape(**{**SMALL.as_dict(), "seed": 1}).workload(1)


def test_percentiles_lie_between_neighbours_and_leave_out_what_is_unknown():
    assert summary.percentile([4.0, 1.0, None, 3.0, 2.0], 50) == 2.5
    assert summary.percentile(range(101), 95) == 95
    assert summary.percentile([None], 50) is None


def test_point_sums_up_and_divides_by_the_clock():
    rows = [row(), row(session=1, prompt_tokens=300, cached_tokens=36, theory_tokens=136, retractions=2)]
    point = summary.point(rows, 4.0, 1000)
    assert (point["prompt_tokens"], point["cached_tokens"], point["theory_tokens"]) == (400, 100, 200)
    assert (point["hit_rate"], point["theory_rate"], point["hit_share"]) == (0.25, 0.5, 0.5)
    assert (point["output_tokens_per_second"], point["computed_tokens_per_second"]) == (5.0, 75.0)
    assert (point["sessions_resident"], point["retractions"], point["meets_goal"]) == (5.0, 2, True)
    assert summary.point([row(ttft=9.0), row(turn=1, ttft=1.0)], 4.0, 1000)["later_ttft_p95"] == 1.0
    assert not summary.point([row(ttft=2.5)], 4.0, 1000)["meets_goal"]
    assert summary.point([], 4.0, 1000)["hit_share"] is None


def test_turns_add_up_to_the_point():
    rows = [row(turn=t, cached_tokens=8 * t, ttft=t + s) for t in range(3) for s in range(4)]
    turns = summary.by_turn(rows)
    assert [t["turn"] for t in turns] == [0, 1, 2] and [t["ttft_p50"] for t in turns] == [1.5, 2.5, 3.5]
    for key in ("prompt_tokens", "cached_tokens", "theory_tokens"):
        assert sum(t[key] for t in turns) == summary.point(rows, 1.0, 1)[key]


def test_cliff_is_the_last_number_before_the_first_miss():
    assert summary.cliff({32: 0.95, 8: 1.0, 16: 0.9, 4: 1.0}) == 32
    assert summary.cliff({4: 1.0, 8: 0.89, 16: 0.95}) == 4
    assert summary.cliff({4: 0.5}) is None and summary.cliff({4: None}) is None and summary.cliff({}) is None


def test_comparison_divides_by_the_base_at_its_own_cliff():
    def at(cache, sessions, share, ttft, speed):
        return result(cache, sessions, share, ttft_p95=ttft, output_tokens_per_second=speed)

    points = [at("bf16", 2, 1.0, 4.0, 50.0), at("bf16", 8, 0.1, 90.0, 20.0)]
    points += [at("kvarn", 2, 1.0, 3.0, 40.0), at("kvarn", 8, 0.95, 6.0, 80.0)]
    gain = summary.against(points, "bf16")
    assert gain == {"kvarn": {"cliff": 4.0, "ttft_p95_at_cliff": 0.75, "output_at_4_cliffs": 4.0}}
    assert summary.against(points[:3], "bf16") == {"kvarn": {"cliff": 1.0, "ttft_p95_at_cliff": 0.75}}
    assert summary.against(points[2:], "bf16") == {}


def test_sweep_goes_on_between_the_cliff_and_the_next(tmp_path):
    results = store.Store(tmp_path, {})
    args = bench_agentic.parse(["--concurrency", "8", "2", "--refine", "2"])
    asked = []
    while (n := bench_agentic.following(args, "kvarn", results)) is not None:
        asked.append(n)
        results.save(result("kvarn", n, 1.0 if n < 4 else 0.2))
    assert asked == [2, 8, 5, 3] and summary.cliff(results.shares("kvarn")) == 3


def test_bisection_halves_the_gap_behind_the_cliff():
    assert summary.between({4: 1.0, 8: 0.5}) == 6
    assert summary.between({4: 1.0, 6: 1.0, 7: 0.2}) is None
    assert summary.between({4: 1.0}) is None and summary.between({4: 0.1}) is None


def test_metrics_are_summed_over_labels_and_counted_from_their_first_increment():
    page = (
        "# HELP sglang:prompt_tokens_total x\n# TYPE sglang:prompt_tokens_total counter\n"
        'sglang:prompt_tokens_total{model_name="a",tp="0"} 100.0\nsglang:prompt_tokens_total{a="b"} 20.0\n'
        'sglang:prompt_tokens_created{a="b"} 1.7e9\nsglang:token_usage{a="b"} 0.25\nprocess_x 3\n'
    )
    values = counters.parse(page)
    assert values["sglang:prompt_tokens_total"] == 120 and values["sglang:token_usage"] == 0.25
    grown = counters.difference(values, values | {"sglang:evicted_tokens_total": 128.0})
    assert grown["evicted_tokens"] == 128 and grown["server_prompt_tokens"] == 0


def test_store_skips_what_is_there_and_refuses_other_settings(tmp_path):
    first = store.Store(tmp_path, {"seed": 0, "lengths": (1, 2)})
    first.save(result("kvarn", 8, 0.5))
    first.save(result("kvarn", 4, 1.0))
    first.save(result("kvarn_k4v4_g128", 2, 1.0))
    again = store.Store(tmp_path, {"seed": 0, "lengths": (1, 2)})
    assert again.has("kvarn", 8) and not again.has("kvarn", 16) and not again.has("bf16", 8)
    assert [p["sessions"] for p in again.load(["kvarn"])] == [4, 8]
    assert summary.cliff(again.shares("kvarn")) == 4
    with pytest.raises(ValueError, match="another seed"):
        store.Store(tmp_path, {"seed": 1, "lengths": (1, 2)})


def test_point_that_is_half_written_is_not_finished(tmp_path, monkeypatch):
    results = store.Store(tmp_path, {})
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.save(result("kvarn", 4, 1.0))
    assert not results.has("kvarn", 4) and results.load(["kvarn"]) == []


def test_tables_have_a_row_per_point_and_per_turn(tmp_path):
    results, written = store.Store(tmp_path, {}), rows.Rows(tmp_path / "rows.csv", "agentic")
    for cache, share, more in (("bf16", 0.4, {"evicted_tokens": 7}), ("kvarn", 1.0, {})):
        point = result(cache, 2, share, **more)
        results.save(point)
        for settings, figures in report.rows(point):
            written.append(cache, settings, figures)
    points = report.write(results, ["bf16", "kvarn"])
    read = rows.read(tmp_path / "rows.csv", "agentic")
    by_point = {(r["provider"], r["metric"]): r for r in read if r["settings"] == {"sessions": "2"}}
    assert by_point["bf16", "evicted_tokens"]["value"] == "7" and ("kvarn", "evicted_tokens") not in by_point
    assert float(by_point["bf16", "ttft_p95"]["value"]) == points[0]["ttft_p95"]
    turns = [
        (r["provider"], r["settings"]["turn"]) for r in read if "turn" in r["settings"] and r["metric"] == "ttft_p50"
    ]
    assert turns == [("bf16", "0"), ("bf16", "1"), ("kvarn", "0"), ("kvarn", "1")]
    assert json.loads((tmp_path / "summary.json").read_text())["cliff"] == {"bf16": None, "kvarn": 2}


def test_picture_shows_every_cache(tmp_path):
    points = [result(cache, n, 1.0 / n) for cache in ("bf16", "kvarn") for n in (1, 2)]
    plots.draw([*points, result("bf16", 4, None, requests=0)], tmp_path / "a.png", "title")
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_sweep_starts_no_server(tmp_path, monkeypatch, capsys):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"vocab_size": 500}')
    flags = [
        "--model",
        str(model),
        "--caches",
        "kvarn",
        "--concurrency",
        "2",
        "--folder",
        str(tmp_path / "out"),
    ]
    args = bench_agentic.parse(flags)
    results = store.Store(args.folder, bench_agentic.settings(args, bench_agentic.shape_of(args, model)))
    results.save(result("kvarn", 2, 1.0, evicted_tokens=0, failed=0,
                        pool_usage_peak=0.5, cut_turns=0))  # fmt: skip

    def start(*_):
        raise AssertionError("a server was started")

    monkeypatch.setattr(launch, "running", start)
    assert bench_agentic.main(flags) == 0
    assert "kvarn: cliff at N = 2" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="server was started"):
        bench_agentic.main([*flags[:-3], "3", *flags[-2:]])


def test_trace_of_deltas_keeps_sessions_apart(tmp_path):
    lines = [
        {"session": "a", "new_tokens": 10, "output_tokens": 3, "think_seconds": 1.5},
        {"session": "b", "input_ids": [7, 8], "output_tokens": 2},
        {"session": "a", "new_tokens": 5, "output_tokens": 1},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    loaded = trace.load(path, SMALL)
    assert [[(len(t.token_ids), t.output_tokens) for t in s] for s in loaded.sessions] == [
        [(10, 3), (5, 1)],
        [(2, 2)],
    ]
    assert loaded.sessions[0][0].think_seconds == 1.5 and loaded.sessions[1][0].token_ids == [7, 8]
    assert len(loaded.shared) == 130 and loaded.sessions[0][1].prompt([1, 2])[:2] == [1, 2]
    with pytest.raises(ValueError, match="at least 3 sessions, got 2"):
        loaded.take(3)
    path.write_text('{"session": "a", "new_tokens": 10}')
    with pytest.raises(ValueError, match="'output_tokens' in line 1"):
        trace.load(path, SMALL)


def test_mooncake_prompts_share_what_their_hashes_share(tmp_path):
    lines = [
        {"timestamp": 0, "input_length": 1500, "output_length": 5, "hash_ids": [0, 1, 2]},
        {"timestamp": 1, "input_length": 700, "output_length": 5, "hash_ids": [0, 9]},
        {"timestamp": 2, "input_length": 2000, "output_length": 5, "hash_ids": [0, 1, 3, 4]},
    ]
    path = tmp_path / "trace.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    loaded = trace.load(path, SMALL)
    assert [len(session) for session in loaded.sessions] == [2, 1] and loaded.shared == []
    (first, later), (other,) = loaded.sessions
    assert [len(turn.token_ids) for turn in (first, later, other)] == [1500, 2000, 700]
    assert common_prefix(first.token_ids, later.token_ids) == 1024
    assert common_prefix(first.token_ids, other.token_ids) == 512
    assert later.prompt([5] * 9) == later.token_ids


def test_scenarios_become_flags_of_bench_serving():
    flags = bench_serving.scenario_flags("random-64x8", 3)
    assert flags[flags.index("--random-input-len") + 1] == "64" and flags[flags.index("--num-prompts") + 1] == "3"
    flags = bench_serving.scenario_flags("gsp", 32)
    assert flags[flags.index("--gsp-prompts-per-group") + 1] == "4"
    with pytest.raises(ValueError, match="random-INxOUT"):
        bench_serving.scenario_flags("random-64", 3)


def test_hits_of_a_real_server_are_those_of_the_theory(tmp_path):
    import torch

    if torch.accelerator.is_available():
        pytest.skip("this test is for a machine without a GPU")
    out = tmp_path / "out"
    # prompt ends on either side of a page; no answer ends with one, see `History.add`
    flags = "--model tiny --caches kvarn --concurrency 3 --system-tokens 300 --task-tokens 70 --turns 2 "
    flags += "--turn-tokens 150 --output-tokens 8 --think-seconds 0 --stagger 0 "
    flags += "--chunked-prefill-size 256 --max-running-requests 4 --no-warmup"
    # 64 pages, of which the rings of the requests that run take their share: nothing is evicted
    more = ["--server-args", "--max-total-tokens 8192 --skip-server-warmup"]
    assert bench_agentic.main([*flags.split(), *more, "--folder", str(out)]) == 0
    point = json.loads((out / "kvarn-n3.json").read_text())
    # 370 tokens over 300 known; 528 over 378; 686 over 536
    per_turn = {0: (370, 256), 1: (528, 256), 2: (686, 512)}
    assert len(point["turns"]) == 9
    for turn in point["turns"]:
        assert (turn["prompt_tokens"], turn["cached_tokens"]) == per_turn[turn["turn"]]
        assert turn["theory_tokens"] == turn["cached_tokens"] and turn["output_tokens"] == 8
        assert 0 < turn["ttft"] < turn["seconds"]
    sums = {"prompt_tokens": 4752, "cached_tokens": 3072, "generated_tokens": 72, "requests": 9}
    assert {name: point[f"server_{name}"] for name in sums} == sums
    assert point["prompt_tokens"] == 4752 and point["cached_tokens"] == 3072 and point["output_tokens"] == 72
    assert point["hit_share"] == 1 and point["evicted_tokens"] == 0 and point["failed"] == point["cut_turns"] == 0
    assert json.loads((out / "summary.json").read_text())["cliff"] == {"kvarn": 3}
    assert (out / "agentic.png").exists()
    point_rows = [row for row in rows.read(out / "rows.csv", "agentic") if "turn" not in row["settings"]]
    assert [row["value"] for row in point_rows if row["metric"] == "prompt_tokens"] == ["4752"]


@pytest.mark.long
def test_bench_serving_of_sglang_counts_what_was_asked(tmp_path):
    out = tmp_path / "out"
    flags = "--model tiny --caches kvarn --scenarios random-64x8 gsp-2x256x32x8 --concurrency 2 --requests 4 "
    flags += "--chunked-prefill-size 256 --max-running-requests 4"
    more = ["--server-args", "--max-total-tokens 4096", "--folder", str(out)]
    assert bench_serving.main([*flags.split(), *more]) == 0
    found = rows.read(out / "rows.csv", "serving")
    fixed, shared = (
        {row["metric"]: row["value"] for row in found if row["settings"]["scenario"] == scenario}
        for scenario in ("random-64x8", "gsp-2x256x32x8")
    )
    assert [(r["completed"], r["input_tokens"], r["output_tokens"]) for r in (fixed, shared)] == [
        ("4", "256", "32"), ("4", "1152", "32"),
    ]  # fmt: skip
    # the second prompt of each of two groups finds 256 tokens, if the first one has ended by then
    assert float(fixed["hits"]) == 0 and float(shared["hits"]) in (0, 22.22, 44.44)
