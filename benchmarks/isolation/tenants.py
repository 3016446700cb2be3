# SPDX-License-Identifier: Apache-2.0
"""Tenants whose prompts carry secrets and share prefixes in a tree."""

from __future__ import annotations

import random
from dataclasses import dataclass

# tokens of the random model that only secrets use, and how many a secret has
SECRET_TOKENS, SECRET_LENGTH = range(384, 512), 8
_WORDS = (
    *("amber", "birch", "cedar", "delta", "ember", "flint", "grove", "heron"),
    *("inlet", "juniper", "kelp", "larch", "maple", "north", "olive", "pine"),
)
_TOPIC = (
    "A library is a place where books are kept for people to read and to borrow. The first libraries held "
    "clay tablets; later ones held scrolls of papyrus and parchment, and then printed books. "
)


@dataclass(frozen=True)
class Prompt:
    """One prompt of one tenant.

    Attributes:
        tenant: its number; payload: the field of /generate, {"text": ...} or {"input_ids": [...]}.
        secret: text or token ids that no other tenant's answer may contain.
    """

    tenant: int
    payload: dict
    secret: str | tuple[int, ...]


def _segment(length: int, seed: str) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(SECRET_TOKENS.start) for _ in range(length)]


def token_prompts(tenants: int, per_tenant: int) -> list[Prompt]:
    """Return prompts of token ids: two levels of shared prefixes, then secret and question of the tenant.

    4 roots of 129 to 300 tokens, 2 branches each, so that hits end on, before and behind a page of 128.
    """
    prompts = []
    for tenant in range(tenants):
        root, branch = tenant % 4, tenant // 4 % 2
        shared = _segment((129, 256, 200, 300)[root], f"root {root}")
        shared += _segment((127, 60)[branch], f"branch {root} {branch}")
        generator = random.Random(f"secret {tenant}")
        secret = tuple(generator.choice(SECRET_TOKENS) for _ in range(SECRET_LENGTH))
        for n in range(per_tenant):
            own = _segment((5, 70, 131)[n % 3], f"own {tenant} {n}")
            prompts.append(Prompt(tenant, {"input_ids": [*shared, *secret, *own, *secret]}, secret))
    return prompts


def text_prompts(tenants: int, per_tenant: int) -> list[Prompt]:
    """Return the same as text that a language model continues, with a code word as the secret."""
    prompts = []
    for tenant in range(tenants):
        generator = random.Random(f"secret {tenant}")
        code = "-".join([*generator.sample(_WORDS, 2), str(generator.randrange(1000, 10000))])
        shared = f"Guide number {tenant % 4}. " + _TOPIC * (2 + tenant % 4) + f"Part {tenant // 4 % 2}. " + _TOPIC
        for n in range(per_tenant):
            own = f"Reader {tenant}, visit {n}. The code of reader {tenant} is {code}. " + _TOPIC * (n % 3)
            prompts.append(Prompt(tenant, {"text": f"{shared}{own}The code of reader {tenant} is"}, code))
    return prompts


def contains(answer: dict, secret: str | tuple[int, ...]) -> bool:
    """Return whether an answer of /generate holds the secret; of a token secret, half of it in a row."""
    if isinstance(secret, str):
        return secret in answer["text"]
    ids, half = tuple(answer["output_ids"]), len(secret) // 2
    parts = {secret[n : n + half] for n in range(len(secret) - half + 1)}
    return any(ids[n : n + half] in parts for n in range(len(ids) - half + 1))
