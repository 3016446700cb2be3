# SPDX-License-Identifier: Apache-2.0
"""Figures of a shape, from an engine whose clock is known."""

import time
from types import SimpleNamespace

import pytest

from benchmarks.engine import bench_engine

# seconds of a miss and of a hit, of a token, and of a step that verifies drafts
MISS, HIT, TOKEN, STEP = 2.0, 0.5, 0.01, 0.03


@pytest.fixture
def figures(monkeypatch):
    """Return a function: the figures of a shape, by name, of an engine with or without drafts."""

    def of(evicted: tuple[int, ...] = (), accepted: int = 0) -> dict[str, float]:
        clock = SimpleNamespace(now=0.0, calls=0)

        def generate(input_ids, sampling_params):
            tokens = sampling_params["max_new_tokens"]
            steps = -(-(tokens - 1) // accepted) if accepted else tokens - 1
            # states of a hybrid model that are evicted in between
            clock.now += MISS if clock.calls == 0 or clock.calls in evicted else HIT
            clock.now += steps * (STEP if accepted else TOKEN)
            clock.calls += 1
            facts = {"cached_tokens": 128} | ({"spec_verify_ct": steps} if accepted else {})
            return [{"meta_info": facts} for _ in input_ids]

        monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
        ((settings, found),) = bench_engine.measure_shape(SimpleNamespace(generate=generate), 2, 150, 0, 100)
        assert settings == {"batch": 2, "context": 150}
        return {figure.metric: figure.value for figure in found}

    return of


def test_time_per_token_is_that_of_more_tokens(figures):
    found = figures()
    assert found["time_to_first_tokens"] == MISS and found["time_to_first_tokens_cached"] == HIT
    assert found["time_per_token"] == pytest.approx(1e3 * TOKEN)
    assert found["throughput"] == pytest.approx(2 / TOKEN)
    assert "verify_steps" not in found


def test_hits_that_are_misses_once_do_not_reach_the_time_per_token(figures):
    # all hits to the first token, and one of three longer requests
    found = figures(evicted=(1, 2, 3, 5))
    assert found["time_to_first_tokens_cached"] == MISS
    assert found["time_per_token"] == pytest.approx(1e3 * TOKEN)


def test_steps_that_verify_drafts_have_a_time_of_their_own(figures):
    found = figures(accepted=4)
    assert found["time_per_verify_step"] == pytest.approx(1e3 * STEP)
    assert found["verify_steps"] == bench_engine.DECODED / 4
    assert found["time_per_token"] == pytest.approx(1e3 * STEP / 4)
