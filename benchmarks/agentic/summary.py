# SPDX-License-Identifier: Apache-2.0
"""From the turns of a run to the figures of a point, and from the points of a cache to its cliff."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

# a cache still holds what it should while it finds this share of the theoretical hits
CLIFF_SHARE = 0.9
# what users accept: TTFT p95 in seconds, TPOT p95 in seconds
GOAL_TTFT, GOAL_TPOT = 2.0, 0.05


def percentile(values: Iterable[float | None], share: float) -> float | None:
    """Return a percentile, linear between neighbours, of the values that are not None; None of none."""
    known = [value for value in values if value is not None]
    return float(np.percentile(known, share)) if known else None


def _times(rows: list[dict]) -> dict[str, float | None]:
    return {
        f"{name}_{label}": percentile((row[name] for row in rows), share)
        for name in ("ttft", "tpot")
        for label, share in (("p50", 50), ("p95", 95))
    }


def _hits(rows: list[dict]) -> dict[str, float | int | None]:
    prompt, cached, theory = (
        sum(row[key] for row in rows) for key in ("prompt_tokens", "cached_tokens", "theory_tokens")
    )
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "theory_tokens": theory,
        "hit_rate": cached / prompt if prompt else None,
        "theory_rate": theory / prompt if prompt else None,
        "hit_share": cached / theory if theory else None,
    }


def by_turn(rows: list[dict]) -> list[dict]:
    """Return times and hits of every turn index over all sessions."""
    found = []
    for turn in sorted({row["turn"] for row in rows}):
        same = [row for row in rows if row["turn"] == turn]
        found.append({"turn": turn, "requests": len(same), **_hits(same), **_times(same)})
    return found


def point(rows: list[dict], seconds: float, pool_tokens: int) -> dict:
    """Return the figures of one cache at one number of sessions.

    Args:
        rows: finished turns, see `replay`.
        seconds: wall clock of the run.
        pool_tokens: size of the cache.

    Returns:
        Times in seconds, lengths in tokens, rates per second. `hit_rate` and `theory_rate` are shares of the
        prompt tokens, `hit_share` is their quotient. `sessions_resident` is the pool over the mean prompt;
        `later_ttft` leaves out the first turns, which compute a whole task.
    """
    output = sum(row["output_tokens"] for row in rows)
    hits, times = _hits(rows), _times(rows)
    later = [row["ttft"] for row in rows if row["turn"] > 0]
    mean_prompt = hits["prompt_tokens"] / len(rows) if rows else None
    met = bool(rows) and times["ttft_p95"] <= GOAL_TTFT and (times["tpot_p95"] or 0) <= GOAL_TPOT
    return {
        "requests": len(rows),
        "seconds": seconds,
        **hits,
        **times,
        "later_ttft_p50": percentile(later, 50),
        "later_ttft_p95": percentile(later, 95),
        "output_tokens": output,
        "requests_per_second": len(rows) / seconds,
        "output_tokens_per_second": output / seconds,
        "prompt_tokens_per_second": hits["prompt_tokens"] / seconds,
        "computed_tokens_per_second": (hits["prompt_tokens"] - hits["cached_tokens"]) / seconds,
        "mean_prompt_tokens": mean_prompt,
        "sessions_resident": pool_tokens / mean_prompt if mean_prompt else None,
        "retractions": sum(row["retractions"] for row in rows),
        "meets_goal": met,
    }


def cliff(shares: Mapping[int, float | None]) -> int | None:
    """Return the largest number of sessions up to which every measured one keeps CLIFF_SHARE of the theory.

    Args:
        shares: `hit_share` of each number of sessions; None where no turn had a theoretical hit.
    """
    held = None
    for sessions in sorted(shares):
        share = shares[sessions]
        if share is None or share < CLIFF_SHARE:
            break
        held = sessions
    return held


def between(shares: Mapping[int, float | None]) -> int | None:
    """Return the number of sessions between the cliff and the next one measured; None if there is none."""
    held = cliff(shares)
    above = [sessions for sessions in sorted(shares) if held is not None and sessions > held]
    if not above or above[0] - held < 2:
        return None
    return (held + above[0]) // 2


def against(points: list[dict], base: str) -> dict[str, dict[str, float]]:
    """Return what every other cache gains over a base cache, as far as both were measured.

    Returns:
        Per cache: `cliff`, quotient of the cliffs; `ttft_p95_at_cliff`, TTFT p95 at the cliff of the base
        over that of the base; `output_at_4_cliffs`, tokens per second at four times that number of sessions
        over those of the base. With the base's cliff at 8 and a cache's at 32, `cliff` is 4.
    """
    table = {(point["cache"], point["sessions"]): point for point in points}
    cliffs = {
        cache: cliff({n: point["hit_share"] for (other, n), point in table.items() if other == cache})
        for cache in dict.fromkeys(point["cache"] for point in points)
    }
    held = cliffs.get(base)
    if not held:
        return {}

    def quotient(cache: str, sessions: int, key: str) -> float | None:
        one, other = table.get((cache, sessions)), table.get((base, sessions))
        return one[key] / other[key] if one and other and one[key] and other[key] else None

    found = {}
    for cache in [cache for cache in cliffs if cache != base]:
        figures = {
            "cliff": cliffs[cache] / held if cliffs[cache] else None,
            "ttft_p95_at_cliff": quotient(cache, held, "ttft_p95"),
            "output_at_4_cliffs": quotient(cache, 4 * held, "output_tokens_per_second"),
        }
        found[cache] = {name: value for name, value in figures.items() if value is not None}
    return found
