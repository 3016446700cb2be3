# SPDX-License-Identifier: Apache-2.0
"""What a prefix cache that never evicts would find: the hit rate to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def common_prefix(a: Sequence[int] | np.ndarray, b: Sequence[int] | np.ndarray) -> int:
    """Return how many leading tokens two sequences share."""
    length = min(len(a), len(b))
    differs = np.asarray(a[:length]) != np.asarray(b[:length])
    return int(differs.argmax()) if differs.any() else length


def theoretical_hit(prompt: Sequence[int], computed: Sequence[np.ndarray], page_size: int) -> int:
    """Return the cached tokens of a prompt if nothing was ever evicted.

    Full pages of the longest common prefix with a sequence that was computed before; at least the last token
    of a prompt is computed again, because its logits are needed. With pages of 128: a prompt of 400 tokens
    over 300 computed ones hits 256; the same 256 tokens sent twice hit 128.

    Args:
        prompt: token ids to send.
        computed: token ids of what was sent and answered before, see `workload.History`.
        page_size: tokens in a page.
    """
    array = np.asarray(prompt[:-1])
    longest = max((common_prefix(array, other) for other in computed), default=0)
    return longest // page_size * page_size
