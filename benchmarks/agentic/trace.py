# SPDX-License-Identifier: Apache-2.0
"""Read a trace: one JSON object per line, one line per turn, sessions in any order.

Three kinds of lines, told apart by their keys:

    {"session": "a", "new_tokens": 2048, "output_tokens": 200, "think_seconds": 5.2}      synthetic tokens
    {"session": "a", "input_ids": [17, 4, ...], "output_tokens": 200}                     real tokens
    {"timestamp": 27482, "input_length": 6955, "output_length": 52, "hash_ids": [46, ...]}   Mooncake

The first two add to the history of their session. A Mooncake line is a whole prompt of blocks of 512 tokens;
equal hash ids give equal tokens. Without "session_id" or "chat_id" it continues the session whose last prompt
shares most blocks with it, the very first block left aside, since that is mostly a common system prompt.
"""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.agentic.workload import Shape, Turn, Workload

BLOCK = 512


def _value(line: dict, key: str, number: int):
    if key not in line:
        raise ValueError(f"expected {key!r} in line {number} of the trace, got {sorted(line)}: see agentic/trace.py")
    return line[key]


def _shared_blocks(a: list[int], b: list[int]) -> int:
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _mooncake_session(line: dict, last: dict[str, list[int]]) -> str:
    for key in ("session_id", "chat_id"):
        if key in line:
            return str(line[key])
    hashes = line["hash_ids"]
    best = max(last, key=lambda name: _shared_blocks(hashes, last[name]), default=None)
    if best is None or _shared_blocks(hashes, last[best]) < 2:
        return f"line-{len(last)}"
    return best


def _mooncake_turn(line: dict, number: int, shape: Shape) -> Turn:
    length = int(_value(line, "input_length", number))
    ids = [token for h in line["hash_ids"] for token in shape.tokens(BLOCK, 3, int(h))][:length]
    if len(ids) < length:
        # the trace may leave out the hash of a last, partial block
        ids += shape.tokens(length - len(ids), 4, number)
    return Turn(ids, int(_value(line, "output_length", number)), shape.think_seconds, whole=True)


def _own_turn(line: dict, number: int, position: tuple[int, int], shape: Shape) -> Turn:
    if "input_ids" in line:
        ids = [int(token) for token in line["input_ids"]]
    else:
        ids = shape.tokens(int(_value(line, "new_tokens", number)), 5, *position)
    think = float(line.get("think_seconds", shape.think_seconds))
    return Turn(ids, int(_value(line, "output_tokens", number)), think)


def load(path: Path, shape: Shape) -> Workload:
    """Return the sessions of a trace, in the order of their first lines.

    Args:
        path: the file.
        shape: seed, vocabulary, default think time, and the length of the shared prompt in front of lines
            that add to a history (Mooncake prompts are whole and get none).

    Raises:
        ValueError: a line lacks a key, or the file has no lines.
    """
    sessions: dict[str, list[Turn]] = {}
    last: dict[str, list[int]] = {}
    for number, text in enumerate(path.read_text().splitlines(), 1):
        if not text.strip():
            continue
        line = json.loads(text)
        if "hash_ids" in line:
            name = _mooncake_session(line, last)
            last[name] = line["hash_ids"]
            turn = _mooncake_turn(line, number, shape)
        else:
            name = str(_value(line, "session", number))
            order = list(sessions).index(name) if name in sessions else len(sessions)
            turn = _own_turn(line, number, (order, len(sessions.get(name, []))), shape)
        sessions.setdefault(name, []).append(turn)
    if not sessions:
        raise ValueError(f"expected turns in {path}, got no lines: see agentic/trace.py")
    return Workload([] if last else shape.tokens(shape.system_tokens, 0), list(sessions.values()))
