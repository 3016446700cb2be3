# SPDX-License-Identifier: Apache-2.0
"""The results of a sweep on disk: one JSON per cache and number of clients, so that a broken sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

SETTINGS = "settings.json"


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
                "give the same ones or another --folder"
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
