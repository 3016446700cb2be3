# SPDX-License-Identifier: Apache-2.0
"""The caches of bench_quality: presets pass their check, the others are what they are called."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from benchmarks.quality import bench_quality, caches, code_error, published


@pytest.fixture
def tile() -> torch.Tensor:
    """Return a tile [64, 128] whose rows and columns differ in magnitude, stds between 3 and 300."""
    torch.manual_seed(0)
    return 30 * torch.randn(64, 128) * torch.rand(64, 1).exp2() * (4 * torch.rand(1, 128)).exp()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return ((got - expected).norm() / expected.norm()).item()


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
    def attend(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sm_scale: float, sliding_window: int
    ) -> torch.Tensor:
        return caches.kvarn("kvarn").attend(q, k, v, sm_scale * 1.01, sliding_window)

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


@pytest.mark.parametrize("cache", [caches.unquantised(), caches.fp8(), caches.kvarn("kvarn")], ids=lambda c: c.name)
def test_caches_read_the_tokens_of_a_sliding_window_alone(cache):
    torch.manual_seed(0)
    q, k, v = (torch.randn(300, heads, 64).half() for heads in (3, 1, 1))
    whole = cache.attend(q, k, v, 0.125, 0)
    # tokens that have left the window, and share no page with it, change nothing
    changed = [torch.cat([100 + x[:128], x[128:]]) for x in (k, v)]
    found, other = (cache.attend(q, *pair, 0.125, 140) for pair in ((k, v), changed))
    assert torch.equal(found[268:], other[268:]) and not torch.equal(found[266], other[266])
    # the window is not longer than the text up to here
    assert relative_error(found[:140], whole[:140]) < 1e-5 < relative_error(found[141:], whole[141:])


def test_fp8_cache_reads_every_token_rounded():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, heads, 64).half() for heads in (3, 1, 1))
    got = caches.fp8().attend(q, k, v, 0.125)
    assert torch.equal(got[0], v[0].to(torch.float8_e4m3fn).float().expand(3, 64))
