# SPDX-License-Identifier: Apache-2.0
"""What a preset means: bit widths, the exact window, and the order of sums."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from kvarn_kernels.record import tile

SUPPORTED_HEAD_DIMS = (64, 128, 256)
_BIT_WIDTHS = {"k4v2": (4, 2), "k4v3": (4, 3), "k4v4": (4, 4), "k3v2": (3, 2), "k2v2": (2, 2)}
_CANONICAL = "_canonical"
_ALIASES = {"kvarn": "kvarn_k4v2_g128", "kvarn" + _CANONICAL: "kvarn_k4v2_g128" + _CANONICAL}


@dataclass(frozen=True)
class KVarNConfig:
    """Describe one cache format, in tiles of `tile.TILE_SIZE` tokens.

    Example: ``KVarNConfig.from_preset("kvarn")`` has 4-bit keys, 2-bit values and a window of one page; its record
    takes 14,336 bytes at head_dim 128, so 112 bytes per token and KV head against 512 in 16 bit.

    Attributes:
        name: full preset name, e.g. ``kvarn_k4v2_g128``.
        k_bits, v_bits: bits per key / value code, 2, 3 or 4.
        window_pages: pages before the query's own page that are read exactly (position rule, `reference.attention`).
            Without one, a prefix-cache hit reads the same values as a miss.
        fixed_order: whether the sums of a position are taken in an order that depends on the position alone, so that
            its output has the same bits whatever the chunks and the other requests of a step.
    """

    name: str
    k_bits: int
    v_bits: int
    window_pages: int = 1
    fixed_order: bool = False

    @classmethod
    def from_preset(cls, name: str) -> KVarNConfig:
        """Return the configuration of a preset; ``_canonical`` is no window and a fixed order.

        Raises:
            ValueError: the name is not one of `preset_names`.
        """
        full = _ALIASES.get(name, name)
        for bits, (k_bits, v_bits) in _BIT_WIDTHS.items():
            if full == f"kvarn_{bits}_g{tile.TILE_SIZE}":
                return cls(full, k_bits, v_bits)
            if full == f"kvarn_{bits}_g{tile.TILE_SIZE}{_CANONICAL}":
                return cls(full, k_bits, v_bits, window_pages=0, fixed_order=True)
        raise ValueError(f"expected a KVarN preset, one of {', '.join(preset_names())}, got {name!r}")

    @property
    def ring_len(self) -> int:
        """Tokens that a query reads exactly at most: the window and its own page."""
        return (self.window_pages + 1) * tile.TILE_SIZE

    def ring_pages(self, head_dim: int, itemsize: int, draft_tokens: int = 1) -> int:
        """Return the pages that the ring of a request takes; 10 for ``kvarn`` at head_dim 128 in 16 bit.

        A verify step stores its drafts before it attends. The first may be all that is accepted, so the others must not
        overwrite what the next step still reads.

        Args:
            draft_tokens: new tokens of a request in a step that decodes, more than 1 with speculative decoding.
        """
        return -(-(self.ring_len + draft_tokens - 1) // self.exact_tokens(head_dim, itemsize))

    @lru_cache(maxsize=32)  # noqa: B019  (a frozen key; a call of `tile` in each layer costs the host microseconds)
    def exact_tokens(self, head_dim: int, itemsize: int) -> int:
        """Return how many exact tokens a page of a ring holds."""
        return tile.exact_tokens(head_dim, self.k_bits, self.v_bits, itemsize)

    def record_bytes(self, head_dim: int) -> int:
        """Return the bytes of one record (one page of one KV head, keys and values).

        Raises:
            ValueError: head_dim is not one of `SUPPORTED_HEAD_DIMS`.
        """
        if head_dim not in SUPPORTED_HEAD_DIMS:
            raise ValueError(f"expected head_dim in {SUPPORTED_HEAD_DIMS}, got {head_dim}: use a 16-bit or fp8 cache")
        return tile.record_bytes(head_dim, self.k_bits, self.v_bits)

    def bytes_per_token(self, head_dim: int) -> int:
        """Return the record bytes per token and KV head; 112 for ``kvarn`` at head_dim 128 (16-bit: 512)."""
        total = self.record_bytes(head_dim)
        assert total % tile.TILE_SIZE == 0, "a record is a whole number of bytes per token"
        return total // tile.TILE_SIZE


def preset_names() -> list[str]:
    """Return every accepted preset name, the alias first."""
    full = [f"kvarn_{bits}_g{tile.TILE_SIZE}{suffix}" for suffix in ("", _CANONICAL) for bits in _BIT_WIDTHS]
    return [*_ALIASES, *full]
