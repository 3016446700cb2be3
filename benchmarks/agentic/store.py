# SPDX-License-Identifier: Apache-2.0
"""Results on disk: one JSON per cache and number of sessions, so that a broken sweep goes on."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

SETTINGS = "settings.json"
HIDDEN = ("turns", "by_turn", "server_command", "error_messages")


class Store:
    """Keep the points of one sweep in a folder.

    Raises:
        ValueError: the folder holds points that were measured with other settings.
    """

    def __init__(self, folder: Path, settings: dict) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        # through JSON, so that a tuple equals the list it becomes
        settings = json.loads(json.dumps(settings))
        path = folder / SETTINGS
        if path.exists() and (old := json.loads(path.read_text())) != settings:
            differing = sorted(k for k in old.keys() | settings.keys() if old.get(k) != settings.get(k))
            raise ValueError(
                f"expected the settings that {folder} was begun with, got another {', '.join(differing)}: "
                "give the same ones or another --output"
            )
        _write(path, settings)

    def path(self, cache: str, sessions: int) -> Path:
        """Return the file of a point."""
        return self.folder / f"{cache}-n{sessions}.json"

    def has(self, cache: str, sessions: int) -> bool:
        """Return whether a point is finished."""
        return self.path(cache, sessions).exists()

    def save(self, result: dict) -> None:
        """Write a finished point, whole or not at all."""
        _write(self.path(result["cache"], result["sessions"]), result)

    def load(self, caches: Iterable[str]) -> list[dict]:
        """Return the finished points of these caches, by cache and number of sessions."""
        found = []
        for cache in caches:
            points = [json.loads(path.read_text()) for path in self.folder.glob(f"{cache}-n*.json")]
            found += sorted(points, key=lambda point: point["sessions"])
        return found

    def shares(self, cache: str) -> dict[int, float | None]:
        """Return the share of the theoretical hits at each finished number of sessions."""
        return {point["sessions"]: point["hit_share"] for point in self.load([cache])}


def _write(path: Path, value: dict) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(value, indent=1))
    partial.replace(path)


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write rows with the union of their columns, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def point_rows(points: list[dict]) -> list[dict]:
    """Return one flat row per point."""
    return [{key: value for key, value in point.items() if key not in HIDDEN} for point in points]


def turn_rows(points: list[dict]) -> list[dict]:
    """Return one flat row per point and turn index."""
    return [
        {"cache": point["cache"], "sessions": point["sessions"], **turn}
        for point in points
        for turn in point["by_turn"]
    ]
