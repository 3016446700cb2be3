# SPDX-License-Identifier: Apache-2.0
"""The benchmarks that run on a CPU: their checks pass, and what they compare with is the published method."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import bench_capacity
import bench_quality
import compare_isolation
import plot_decode
import plot_prefill
import rows
from quality import caches, code_error, published, scores, texts


@pytest.fixture
def tile() -> torch.Tensor:
    """Return a tile [64, 128] whose rows and columns differ in magnitude, stds between 3 and 300."""
    torch.manual_seed(0)
    return 30 * torch.randn(64, 128) * torch.rand(64, 1).exp2() * (4 * torch.rand(1, 128)).exp()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


def test_capacity_of_qwen3_8b_is_that_of_its_bytes():
    bench_capacity.check_record_sizes()
    rows = {
        (row["cache"], row["requests"]): row for row in bench_capacity.measure("Qwen3-8B", 40.0, [64], 32768)
    }
    bf16, kvarn = rows["bf16", ""], rows["kvarn_k4v2_g128", 64]
    assert bf16["bytes_per_token"] == 36 * 8 * 512 and kvarn["bytes_per_token"] == 36 * 8 * 112
    assert bf16["pool_tokens"] == 40 * 2**30 // 147_456
    # 65 rows of 256 exact tokens
    assert kvarn["ring_mib"] * 2**20 == 65 * 256 * 147_456
    spent = kvarn["pool_tokens"] * 32_256 + (kvarn["ring_mib"] + kvarn["workspace_mib"]) * 2**20
    assert 0 <= 40 * 2**30 - spent < 128 * 32_256 + 2**20


def test_quality_check_passes_for_every_cache():
    windows = [caches.kvarn("kvarn_k2v2_g128", window_pages) for window_pages in (0, 2)]
    bench_quality.check([*caches.all_caches(0).values(), *windows], torch.device("cpu"))


def test_code_error_of_gaussian_keys_is_that_of_a_scalar_quantiser():
    class Gaussian:
        def logits(self, tokens, attend):
            attend(*(torch.randn(512, heads, 64) for heads in (4, 2, 2)), 0.125)

    found = code_error.shares(Gaussian(), [SimpleNamespace(tokens=[])])
    # 127 keys or 64 channels share a scale and a zero that fit them; codes that do not shrink cost 1 / (1 - error)
    for bits, best in ((2, 0.1175), (3, 0.0345), (4, 0.0095)):
        for side in ("keys", "values"):
            assert 0.7 * best < found[side, "kvarn", bits] < 1.2 * best
            assert found[side, "min / max", bits] > found[side, "kvarn", bits]


def test_simulated_widths_of_a_preset_read_what_the_preset_reads():
    torch.manual_seed(0)
    q, k, v = (torch.randn(500, heads, 64).half() for heads in (6, 2, 2))
    preset, simulated = caches.kvarn("kvarn"), caches.simulated(4, 2)
    assert simulated.bytes_per_token(64) == preset.bytes_per_token(64) == 59
    # 4e-4 is the rounding of an fp16 output
    assert relative_error(simulated.attend(q, k, v, 0.125), preset.attend(q, k, v, 0.125)) < 1e-3


def test_quality_check_refuses_a_wrong_attention():
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float) -> torch.Tensor:
        return caches.kvarn("kvarn").attend(q, k, v, sm_scale * 1.01)

    wrong = dataclasses.replace(caches.kvarn("kvarn"), attend=attend)
    with pytest.raises(SystemExit, match="to agree with the oracle"):
        bench_quality.check([wrong], torch.device("cpu"))


def test_published_scales_balance_rows_and_columns(tile):
    row, column = published.variance_normalise(tile)
    balanced = tile / row / column
    for dim in (0, 1):
        spread, before = (x.std(dim).max() / x.std(dim).min() for x in (balanced, tile))
        assert spread < 1.1 < before


def test_published_scales_do_nothing_on_a_small_tile(tile):
    # the lower clamp of the logarithm is reached everywhere, so that all scales are equal
    small = 1e-4 * tile
    plain = published.quantise(small, 4, 1.0, torch.ones(1, 128))
    assert relative_error(published.round_trip(small, 4), small) == pytest.approx(
        relative_error(plain, small), rel=0.01
    )
    assert relative_error(published.round_trip(tile, 4), tile) < 0.8 * relative_error(plain, small)


def test_published_cache_reads_the_prompt_exactly_and_pages_after_it_from_codes():
    torch.manual_seed(0)
    q, k, v = (torch.randn(600, heads, 64).half() for heads in (3, 1, 1))
    expected = caches.unquantised().attend(q, k, v, 0.125)
    got = caches.published_kvarn(4, 2, prompt=256).attend(q, k, v, 0.125)
    assert relative_error(got[:256], expected[:256]) < 1e-3
    assert relative_error(got[256:], expected[256:]) > 0.02


def test_fp8_cache_reads_every_token_rounded():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 64).half() for heads in (3, 1, 1))
    got = caches.fp8().attend(q, k, v, 0.125)
    assert torch.equal(got[0], v[0].to(torch.float8_e4m3fn).float().expand(3, 64))


def test_scores_of_equal_predictions_are_zero_and_of_a_swap_are_not():
    torch.manual_seed(0)
    exact, tokens = torch.randn(8, 50), torch.randint(50, (8,))
    swapped = exact.clone()
    swapped[3, [exact[3].argmax(), exact[3].argmin()]] = exact[3, [exact[3].argmin(), exact[3].argmax()]]
    same, other = scores.Scores(), scores.Scores()
    same.add(exact, exact, tokens)
    other.add(exact, swapped, tokens)
    assert same.summary(0, 8)["kl_mean"] == 0 and same.summary(0, 8)["flips"] == 0
    assert other.summary(0, 8)["flips"] == pytest.approx(1 / 8)
    assert other.summary(3, 4)["kl_mean"] > 0 and other.summary(4, 8)["kl_mean"] == 0


def test_text_is_chosen_by_the_seed(tmp_path):
    def tokenizer(text, add_special_tokens):
        return SimpleNamespace(input_ids=[ord(character) for character in text])

    path = tmp_path / "text.txt"
    path.write_text("".join(f"line {n}\n" for n in range(4000)))
    pieces = [texts.load(str(path), 64, seed, tokenizer) for seed in (0, 0, 1)]
    assert pieces[0] == pieces[1] != pieces[2]
    assert len(pieces[0].tokens) == 64 and bytes(pieces[0].tokens[:5]) == b"line "
    with pytest.raises(ValueError, match="lower --context"):
        texts.load(str(path), 100_000, 0, tokenizer)


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


def test_compare_isolation_loads_both_caches_alike(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["compare_isolation.py", str(tmp_path), "--one-by-one"])
    args = compare_isolation.arguments()
    kvarn, stock = (compare_isolation.command(args, cache) for cache in (args.kvarn, compare_isolation.STOCK))
    different = [(one, other) for one, other in zip(kvarn, stock, strict=True) if one != other]
    assert [one for one, _ in different[:2]] == ["kvarn", str(tmp_path / "kvarn.json")]
    assert len(different) == 3 and "--page-size 128" in different[2][1]


def test_the_decode_plot_draws_the_published_rows(tmp_path):
    gpu, figures = plot_decode.read(Path(__file__).parent.parent / "benchmarks/results/decode.csv")
    assert "NVIDIA" in gpu and figures["kvarn"].keys() == figures["flashinfer_bf16"].keys()
    # rows of other heads stand in the same file
    assert figures["kvarn"]["64 x 16,320"]["median_us"] > 350
    plot_decode.draw(gpu, figures, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").stat().st_size > 10_000
    (tmp_path / "empty.csv").write_text("gpu,provider\n")
    with pytest.raises(ValueError, match="expected rows"):
        plot_decode.read(tmp_path / "empty.csv")


def test_the_prefill_plot_draws_the_published_rows(tmp_path):
    title, times = plot_prefill.read(Path(__file__).parent.parent / "benchmarks/results/engine_fa3_8b.csv")
    assert "H100" in title and list(times) == ["bf16", "kvarn"] and "2048+32768" in times["kvarn"]
    plot_prefill.draw(title, times, tmp_path / "prefill.png")
    assert (tmp_path / "prefill.png").stat().st_size > 10_000


def test_the_prefill_plot_refuses_a_cache_without_a_baseline(tmp_path):
    rows = ["device,model,cache,quantity,value", "H100,8b,kvarn,2048+0 time to first token,60.5"]
    (tmp_path / "one.csv").write_text("\n".join(rows))
    with pytest.raises(ValueError, match="expected the same shapes of bf16"):
        plot_prefill.read(tmp_path / "one.csv")


def test_rows_are_appended_under_their_own_columns_only(tmp_path):
    path, columns = tmp_path / "figures.csv", ["gpu", "value"]
    rows.check_columns(None, columns)
    for value in (1, 2):
        rows.check_columns(path, columns)
        rows.append(path, columns, [{"gpu": "H100", "value": value}])
    assert path.read_text().splitlines() == ["gpu,value", "H100,1", "H100,2"]
    with pytest.raises(SystemExit, match=r"expected .*figures.csv to have the columns gpu,commit, got gpu,value"):
        rows.check_columns(path, ["gpu", "commit"])


def test_the_commit_of_a_row_is_that_of_the_checkout():
    name = rows.commit()
    assert name == "" or len(name.rstrip("+")) >= 7
