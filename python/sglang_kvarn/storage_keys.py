# SPDX-License-Identifier: Apache-2.0
"""What the keys of a storage behind host memory say besides the tokens, and how long the names of its files are.

SGLang's storage `file` names a file by the key of a page, what is kept of it (a state, say), the name of the model, a
tag of the cache, and the ranks: {SHA-256}.{kept}_{model}-{tag}_{ranks}.bin. A file whose name is too long is not
written, and SGLang goes on without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from kvarn_kernels.record import tile

# of a name, in file systems of today
NAME_BYTES = 255
# of a name: the key; what is kept; ranks; the rest
_OTHER_BYTES = 64 + 16 + 16 + len("._-.bin")


def tag(preset: str, parts: Iterable[str]) -> str:
    """Return what tells pages of this cache from those of others: its preset, the format's version, and a hash.

    Args:
        preset: its full name, `KVarNConfig.name`.
        parts: what else the bytes of a page, or of what is kept with it, depend on.
    """
    return f"{preset}-v{tile.VERSION}-{hashlib.sha256(repr(list(parts)).encode()).hexdigest()[:16]}"


def longest_model_name(preset: str) -> int:
    """Return the bytes that the name of a model may have, so that files can be named by it; preset: its full name."""
    return NAME_BYTES - _OTHER_BYTES - len(tag(preset, ()))
