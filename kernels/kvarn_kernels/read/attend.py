# SPDX-License-Identifier: Apache-2.0
"""Device code of attention in the rotated frame: one block of keys folded into a running softmax.

The state of M query rows is (m, l, acc): the base-2 maximum of the scaled scores, the sum of 2^(score - m + SHIFT) and
the weighted values times 2^SHIFT, as a tuple of channel blocks [M, D / CB]. A block whose keys are all masked leaves
the state of a row unchanged bit for bit.

The query is float32, each row divided by a power of two so that its elements are at most 1; `row_scale` holds that
power times sm_scale * log2(e).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvarn_kernels.device.numerics import cast, dot
from kvarn_kernels.record import tile
from kvarn_kernels.record.unpack import load_key_words, load_value_words, unpack_pair

# weights up to 2^4 keep small ones above the subnormals of fp16; times a value scale below 2^9 and its 2^b they stay
# below 65,504
SHIFT = tl.constexpr(4.0)
LOG2_E = 1.4426950408889634
_LOG2_E = tl.constexpr(LOG2_E)


@triton.jit
def replace(items, INDEX: tl.constexpr, item):
    """Return the tuple with one element replaced."""
    out = ()
    for n in tl.static_range(len(items)):
        if n == INDEX:
            out = out + (item,)
        else:
            out = out + (items[n],)
    return out


@triton.jit
def zero_blocks(COUNT: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return a tuple of COUNT float32 zeros [ROWS, COLS]."""
    out = ()
    for _ in tl.static_range(COUNT):
        out = out + (tl.zeros([ROWS, COLS], tl.float32),)
    return out


@triton.jit
def normalise_query(x, sm_scale_log2):
    """Return (query [M, D], row_scale [M]) for rows x [M, D] of a rotated float32 query."""
    exponent = ((tl.max(tl.abs(x), 1).to(tl.int32, bitcast=True) >> 23) & 0xFF) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    down = ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    up = ((127 + exponent) << 23).to(tl.float32, bitcast=True)
    return x * down[:, None], up * sm_scale_log2


@triton.jit
def load_query_blocks(q_ptrs, mask, row_scale, sm_scale_log2, D: tl.constexpr, BLOCKS: tl.constexpr):
    """Load the normalised query once more as a tuple of BLOCKS tensors [M, D / BLOCKS].

    Element c of block j is channel BLOCKS * c + j, the order of the key words.

    Args:
        q_ptrs: pointers [M] to channel 0 of each row; mask: bool [M]; row_scale: from `normalise_query`.
    """
    W: tl.constexpr = D // BLOCKS
    w = tl.arange(0, W)
    down = sm_scale_log2 / row_scale  # a power of two
    blocks = ()
    for j in tl.static_range(BLOCKS):
        x = tl.load(q_ptrs[:, None] + (BLOCKS * w + j)[None, :], mask=mask[:, None], other=0.0)
        blocks = blocks + (x * down[:, None],)
    return blocks


@triton.jit
def weigh(s, m, l):
    """Fold scores [M, N] (base 2, -inf where masked) into the state; return weights, correction of acc, m, l."""
    m_new = tl.maximum(m, tl.max(s, 1))
    # a row that has seen no key yet keeps m = -inf; 0 stands in so that no difference of infinities arises
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    p = tl.exp2(s - (m_safe - SHIFT)[:, None])
    return p, alpha, m_new, l * alpha + tl.sum(p, 1)


@triton.jit
def sink_weight(sink, m):
    """Return what an attention sink adds to a sum of weights exp2(score - m), where it is added once for a query.

    Args:
        sink: any float dtype, natural logarithm, not scaled; m: float32, finite, of base 2.
    """
    return tl.exp2(sink.to(tl.float32) * _LOG2_E - m)


@triton.jit
def exact_scores(q, k):
    """Return q k^T for q float32 [M, D] and exact keys [N, D] of a 16-bit dtype, float32 [M, N]."""
    high = cast(q, k.dtype)
    s = dot(high, tl.trans(k), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    if k.dtype == tl.bfloat16:
        # 8 bits of the rotated query are fewer than the model's own query had
        s = dot(cast(q - high.to(tl.float32), tl.bfloat16), tl.trans(k), s)
    return s


@triton.jit
def attend_exact(
    q, row_scale, k_ptrs, v_ptrs, exists, seen, m, l, acc, D: tl.constexpr, V_BLOCKS: tl.constexpr
):
    """Fold N exact keys and values into the state.

    Args:
        q: float32 [M, D], normalised; row_scale: [M].
        k_ptrs, v_ptrs: pointers [N] to channel 0 of rotated keys and values, any float dtype.
        exists: bool [N], keys that exist; the others are not loaded.
        seen: bool [M, N] or [1, N], keys that a row sees.
    """
    VW: tl.constexpr = D // V_BLOCKS
    d, vw = tl.arange(0, D), tl.arange(0, VW)
    k = tl.load(k_ptrs[:, None] + d[None, :], mask=exists[:, None], other=0.0)  # [N, D]
    s = tl.where(seen & exists[None, :], exact_scores(q, k) * row_scale[:, None], float("-inf"))
    p, alpha, m, l = weigh(s, m, l)
    out = ()
    for j in tl.static_range(V_BLOCKS):
        v = tl.load(v_ptrs[:, None] + (j * VW + vw)[None, :], mask=exists[:, None], other=0.0)  # [N, VW]
        out = out + (dot(cast(p, v.dtype), v, acc[j] * alpha[:, None]),)
    return m, l, out


@triton.jit
def _add_scores(s, folded, codes, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    return replace(s, TOKENS, dot(folded[CHANNELS], codes, s[TOKENS]))


@triton.jit
def attend_record(
    q,
    row_scale,
    record,
    row_mask,
    m,
    l,
    acc,
    D: tl.constexpr,
    K_BITS: tl.constexpr,
    V_BITS: tl.constexpr,
    oldest,
    SLIDES: tl.constexpr,
):
    """Fold the tokens 1 .. G - 1 of one record into the state, without dequantising an element.

        score[t] = k_token_scale[t] * ( sum_d (q_d k_channel_scale[d]) c[t,d] + sum_d q_d k_channel_zero[d] )
        out[d]  += v_channel_scale[d] * ( sum_t (p_t v_token_scale[t]) c[t,d] + sum_t p_t v_token_zero[t] )

    with c = 2^b (x - 1) for the unpacked operand x = 1 + c / 2^b.

    Args:
        q: from `load_query_blocks`; row_scale: [M].
        record: pointer to the uint8 record; row_mask: bool [M], rows that see it.
        oldest: int32 [M], the first token of the page that a row sees, read if SLIDES.
    """
    M: tl.constexpr = row_scale.shape[0]
    KTB: tl.constexpr = tile.k_token_blocks(D, K_BITS)
    KCB: tl.constexpr = tile.k_channel_blocks(D, K_BITS)
    VCB: tl.constexpr = tile.v_channel_blocks(V_BITS)
    KW: tl.constexpr = D // KCB
    VW: tl.constexpr = D // VCB
    K_FIELDS: tl.constexpr = 32 // tile.low_bits(K_BITS)
    V_FIELDS: tl.constexpr = 32 // tile.low_bits(V_BITS)
    SUBS: tl.constexpr = 4 // KTB  # word rows of 4 tokens
    words_ptr = record.to(tl.pointer_type(tl.int32))
    halves = (record + tile.scales_offset(D, K_BITS, V_BITS)).to(tl.pointer_type(tl.float16))
    kw, vw, t = tl.arange(0, KW), tl.arange(0, VW), tl.arange(0, 32)

    folded = ()
    zero = tl.zeros([M, KW], tl.float32)
    for j in tl.static_range(KCB):
        channel = KCB * kw + j
        a = tl.load(halves + tile.k_channel_scale_index(D) + channel).to(tl.float32) * (1 << K_BITS)
        z = tl.load(halves + tile.k_channel_zero_index(D) + channel).to(tl.float32)
        operand = (q[j] * a[None, :]).to(tl.float16)
        # the rounded operand also cancels the 1 of 1 + c / 2^b, so that its rounding costs nothing there
        zero += q[j] * z[None, :] - operand.to(tl.float32)
        folded = folded + (operand,)
    zero = tl.sum(zero, 1)
    s = zero_blocks(4, M, 32)
    for sub in tl.static_range(SUBS):
        # block n of the scores holds the tokens 4 t + n
        words, tops = load_key_words(words_ptr, (SUBS * t + sub)[None, :], kw[:, None], D, K_BITS)  # [KW, 32]
        for n in tl.static_range(K_FIELDS // 2):
            low, high = unpack_pair(words, tops, n, K_BITS)
            s = _add_scores(s, folded, low, KTB * sub + n // (KCB // 2), 2 * (n % (KCB // 2)))
            s = _add_scores(s, folded, high, KTB * sub + n // (KCB // 2), 2 * (n % (KCB // 2)) + 1)
    scaled = ()
    largest = tl.full([M], float("-inf"), tl.float32)
    for n in tl.static_range(4):
        token_scale = tl.load(halves + tile.k_token_scale_index(D) + 4 * t + n).to(tl.float32)
        x = (s[n] + zero[:, None]) * token_scale[None, :]
        x = tl.where(row_mask[:, None], x, float("-inf"))
        if SLIDES:
            x = tl.where((4 * t + n)[None, :] >= oldest[:, None], x, float("-inf"))
        if n == 0:
            # token 0 is attended exactly, with the other first tokens
            x = tl.where((t > 0)[None, :], x, float("-inf"))
        largest = tl.maximum(largest, tl.max(x, 1))
        scaled = scaled + (x,)
    m_new = tl.maximum(m, largest * row_scale)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2(m - m_safe)
    weights = ()
    total = tl.zeros([M, 32], tl.float32)
    zero = tl.zeros([M, 32], tl.float32)
    for n in tl.static_range(4):
        p = tl.exp2(scaled[n] * row_scale[:, None] - (m_safe - SHIFT)[:, None])
        a = tl.load(halves + tile.v_token_scale_index(D) + 4 * t + n).to(tl.float32) * (1 << V_BITS)
        z = tl.load(halves + tile.v_token_zero_index(D) + 4 * t + n).to(tl.float32)
        operand = (p * a[None, :]).to(tl.float16)
        total += p
        zero += p * z[None, :] - operand.to(tl.float32)
        weights = weights + (operand,)
    zero = tl.sum(zero, 1)
    values = words_ptr + tile.v_codes_offset(D, K_BITS) // 4
    words, tops = load_value_words(values, t[:, None], vw[None, :], D, V_BITS)  # [32, VW]
    partial = zero_blocks(VCB, M, VW)
    for n in tl.static_range(V_FIELDS // 2):
        low, high = unpack_pair(words, tops, n, V_BITS)
        block = dot(weights[2 * (n // VCB)], low, partial[n % VCB])
        block = dot(weights[2 * (n // VCB) + 1], high, block)
        partial = replace(partial, n % VCB, block)
    out = ()
    for j in tl.static_range(VCB):
        channel_scale = tl.load(halves + tile.v_channel_scale_index(D) + j * VW + vw).to(tl.float32)
        out = out + (acc[j] * alpha[:, None] + (partial[j] + zero[:, None]) * channel_scale[None, :],)
    return m_new, l * alpha + tl.sum(total, 1), out
