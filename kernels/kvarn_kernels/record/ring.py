# SPDX-License-Identifier: Apache-2.0
"""The ring of a request: its newest tokens, exact and rotated, in pages of the pool; `tile` says where in a page.

The token at position i is in page number i // T mod N of the ring, T exact tokens a page, N pages. So a ring is N * T
tokens long, and a page that is full of old tokens is written again from its start.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.record import tile


@triton.jit
def ring_ptrs(
    exact_ptr, ring_pages_ptr, position, head, HK: tl.constexpr, D: tl.constexpr,
    K_BITS: tl.constexpr, V_BITS: tl.constexpr, RING_PAGES: tl.constexpr
):  # fmt: skip
    """Return pointers to channel 0 of the keys of exact tokens; their values are D elements later.

    Args:
        exact_ptr: pointer to the pages in the model's dtype.
        ring_pages_ptr: int32 pointer(s) to the RING_PAGES pages of the request's ring.
        position: int32, not negative, any shape.
    """
    ITEM: tl.constexpr = exact_ptr.dtype.element_ty.primitive_bitwidth // 8
    TOKENS: tl.constexpr = tile.exact_tokens(D, K_BITS, V_BITS, ITEM)
    ELEMENTS: tl.constexpr = tile.record_bytes(D, K_BITS, V_BITS) // ITEM
    page = tl.load(ring_pages_ptr + position // TOKENS % RING_PAGES).to(tl.int64)
    return exact_ptr + (page * HK + head) * ELEMENTS + position % TOKENS * (2 * D)
