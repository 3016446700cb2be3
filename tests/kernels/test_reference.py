# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: rotation, code order, quantiser, record and the position rule."""

import pytest
import torch
from builders import PAGE, make_request, relative_rms
from hypothesis import given, settings
from hypothesis import strategies as st
from kvarn_kernels import reference
from kvarn_kernels.config import KVarNConfig

KVARN = KVarNConfig.from_preset("kvarn")
PRESETS = ["kvarn", "kvarn_k4v3_g128", "kvarn_k4v4_g128", "kvarn_k3v2_g128", "kvarn_k2v2_g128"]


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rotate_is_orthonormal_symmetric_and_its_own_inverse(head_dim):
    h = reference.hadamard(head_dim)
    assert torch.equal(h, h.T)
    assert torch.allclose(h @ h, torch.eye(head_dim), atol=1e-6)
    x = torch.randn(5, head_dim)
    assert torch.allclose(reference.rotate(x), x @ h, atol=1e-5)
    assert torch.allclose(reference.rotate(reference.rotate(x)), x, atol=1e-5)


def test_hadamard_refuses_a_head_dim_that_is_no_power_of_two():
    with pytest.raises(ValueError, match="power of two"):
        reference.hadamard(80)


def documented_place(side: str, bits: int, head_dim: int, token: int, channel: int) -> tuple[int, int]:
    """Return (word, bit) of a code, written from the docstring of `tile` alone."""
    fields = 32 // bits
    if side == "k":
        cb = min(fields, head_dim // 16)
        tb = fields // cb
        (r, i), (c, inner) = divmod(token, tb), divmod(channel, cb)
        j, h = divmod(inner, 2)
        return r * head_dim // cb + c, bits * (h * fields // 2 + i * cb // 2 + j)
    cb = fields // 4
    (r, t), (j, c) = divmod(token, 4), divmod(channel, head_dim // cb)
    i, h = divmod(t, 2)
    block = (r // 4) * (head_dim // cb // 4) + c // 4
    return block * 16 + r % 4 * 4 + c % 4, bits * (h * fields // 2 + i * cb + j)


@pytest.mark.parametrize("side", ["k", "v"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_pack_codes_puts_every_code_where_the_layout_says(head_dim, bits, side):
    codes = torch.randint(0, 2**bits, (PAGE, head_dim), dtype=torch.int32)
    packed = reference.pack_codes(codes, side, bits)
    assert packed.shape == (PAGE * head_dim * bits // 8,)
    words = [w & 0xFFFFFFFF for w in packed.view(torch.int32).tolist()]
    places = set()
    for token in range(PAGE):
        for channel in range(head_dim):
            word, bit = documented_place(side, bits, head_dim, token, channel)
            places.add((word, bit))
            assert words[word] >> bit & (2**bits - 1) == codes[token, channel]
    assert len(places) == PAGE * head_dim


@given(seed=st.integers(0, 2**32 - 1), bits=st.sampled_from([2, 3, 4]), head_dim=st.sampled_from([64, 128, 256]))
@settings(max_examples=30, deadline=None)
def test_unpack_codes_returns_what_was_packed(seed, bits, head_dim):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (2, 3, PAGE, head_dim), dtype=torch.int32, generator=generator)
    for side in "kv":
        packed = reference.pack_codes(codes, side, bits)
        assert torch.equal(reference.unpack_codes(packed, side, bits, head_dim), codes)


@pytest.mark.parametrize(("head_dim", "per_token"), [(64, 59), (128, 112), (256, 218)])
def test_encode_tile_takes_the_bytes_that_the_preset_promises(head_dim, per_token):
    record = reference.encode_tile(*torch.randn(2, PAGE, head_dim), KVARN)
    assert record.shape == (KVARN.record_bytes(head_dim),)
    assert record.dtype == torch.uint8
    assert KVARN.bytes_per_token(head_dim) == per_token


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_decode_tile_is_close_to_what_was_encoded(preset, head_dim):
    config = KVarNConfig.from_preset(preset)
    k, v = torch.randn(2, 4, PAGE, head_dim) * torch.rand(2, 4, 1, head_dim).mul(3).exp()
    decoded = reference.decode_tile(reference.encode_tile(k, v, config), config, head_dim)
    # uniform quantiser of Gaussian rows: a step of about 4.6 deviations / 15 (4 bits), or the MSE-optimal
    # 0.59 (3 bits) or 1 (2 bits)
    for x, y, bits in zip((k, v), decoded, (config.k_bits, config.v_bits), strict=True):
        assert relative_rms(y, x) < {4: 0.11, 3: 0.22, 2: 0.42}[bits]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_decode_tile_returns_token_zero_exactly(dtype):
    k, v = (torch.randn(2, 3, PAGE, 64) * 50).half().to(dtype)
    decoded = reference.decode_tile(reference.encode_tile(k, v, KVARN), KVARN, 64)
    for x, y in zip((k, v), decoded, strict=True):
        assert torch.equal(y[:, 0], x[:, 0].float())


def test_encode_tile_leaves_token_zero_out_of_every_statistic():
    k, v = torch.randn(2, PAGE, 64)
    other_k, other_v = k.clone(), v.clone()
    other_k[0], other_v[0] = 1e4, -1e4
    record, other = reference.encode_tile(k, v, KVARN), reference.encode_tile(other_k, other_v, KVARN)
    firsts = 2 * 2 * 64
    assert torch.equal(record[:-firsts], other[:-firsts])
    assert not torch.equal(record[-firsts:], other[-firsts:])


@pytest.mark.parametrize(("dtype", "header"), [(torch.float16, 0x2), (torch.bfloat16, 0x3)])
def test_encode_tile_writes_a_header_that_names_the_dtype_of_the_first_rows(dtype, header):
    record = reference.encode_tile(*torch.randn(2, 3, PAGE, 64).to(dtype), KVARN)
    assert (record[:, 0] & 0xF == header).all()


def test_encode_tile_gives_each_tile_the_bytes_it_has_alone():
    k, v = torch.randn(2, 5, PAGE, 64)
    together = reference.encode_tile(k, v, KVARN)
    assert all(torch.equal(together[n], reference.encode_tile(k[n], v[n], KVARN)) for n in range(5))


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("exponent", [-20, -9, 9])
def test_decode_tile_scales_with_its_input(preset, exponent):
    config = KVarNConfig.from_preset(preset)
    k, v = torch.randn(2, PAGE, 64)
    plain = reference.decode_tile(reference.encode_tile(k, v, config), config, 64)
    factor = 2.0**exponent
    scaled = reference.decode_tile(reference.encode_tile(k * factor, v * factor, config), config, 64)
    # without the first row, which is fp16 here; 1e-3: scales below 2^-14 lose bits as fp16 subnormals
    for x, y in zip(plain, scaled, strict=True):
        assert relative_rms(y[1:] / factor, x[1:]) < 1e-3


def test_decode_tile_is_finite_whatever_was_encoded():
    k, v = torch.randn(2, PAGE, 64)
    k[3], k[5, 7], k[9, 1] = float("nan"), float("inf"), -3e38
    v[3, 3], v[4] = float("nan"), float("-inf")
    for x in reference.decode_tile(reference.encode_tile(k, v, KVARN), KVARN, 64):
        assert x.isfinite().all()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("value", [0.0, 1.5, -3.0])
def test_decode_tile_keeps_a_constant_tile(preset, value):
    config = KVarNConfig.from_preset(preset)
    k, v = torch.full((2, PAGE, 64), value)
    for x in reference.decode_tile(reference.encode_tile(k, v, config), config, 64):
        # the fp16 scales of the record
        assert torch.allclose(x, torch.full_like(x, value), rtol=2e-3)


def test_quantise_side_with_two_bits_keeps_the_projection_of_a_row():
    t = torch.randn(200, 64)
    q = reference.quantise_side(t, 2)
    approx = (q.codes * q.scale[:, None] + q.zero[:, None]) * q.cross[None, :]
    ratio = (approx * t).sum(-1) / (t * t).sum(-1)
    # 2e-3: the fp16 rounding of scale and zero
    assert (ratio - 1).abs().max() < 2e-3


@pytest.mark.parametrize("bits", [2, 4])
def test_quantise_side_bounds_what_a_matrix_instruction_reads(bits):
    t = torch.randn(4, 64, 127) * torch.tensor([1e-6, 1.0, 1e3, 6e4])[:, None, None]
    q = reference.quantise_side(t, bits)
    top = q.scale * (2**bits - 1) + q.zero
    assert q.zero.abs().max() <= 2**9
    assert top.abs().max() <= 2**9
    assert q.zero[:2].abs().max() <= 2
    assert q.codes.min() == 0
    assert q.codes.max() == 2**bits - 1


def test_encode_tile_refuses_what_is_not_whole_pages():
    with pytest.raises(ValueError, match="whole pages"):
        reference.encode_tile(*torch.randn(2, PAGE - 1, 64), KVARN)
    with pytest.raises(ValueError, match="head_dim"):
        reference.encode_tile(*torch.randn(2, PAGE, 96), KVARN)


def test_decode_tile_refuses_the_record_of_another_preset():
    record = reference.encode_tile(*torch.randn(2, PAGE, 64), KVARN)
    with pytest.raises(ValueError, match="another preset"):
        reference.decode_tile(record, KVarNConfig.from_preset("kvarn_k4v4_g128"), 64)


def plain_attention(request, k, v):
    """Return softmax attention of every position over rotated k, v [T, Hk, D], token by token."""
    tokens, qo_heads, head_dim = request.q.shape
    q = reference.rotate(request.q).double()
    out = torch.empty(tokens, qo_heads, head_dim, dtype=torch.float64)
    for i in range(tokens):
        for h in range(qo_heads):
            head = h // (qo_heads // k(i).shape[1])
            weights = (k(i)[: i + 1, head] @ q[i, h] * head_dim**-0.5).softmax(0)
            out[i, h] = weights @ v(i)[: i + 1, head]
    return reference.rotate(out.float())


@pytest.mark.parametrize("name", ["kvarn", "kvarn_canonical"])
@pytest.mark.parametrize("exact_start", [0, 2 * PAGE])
def test_attention_reads_each_key_as_the_position_rule_says(name, exact_start):
    config = KVarNConfig.from_preset(name)
    request = make_request(2 * PAGE + 30, (2, 1), 64, torch.float16)
    exact = [reference.rotate(x).half() for x in (request.k, request.v)]
    pages = [x[: 2 * PAGE].unflatten(0, (2, PAGE)).transpose(1, 2) for x in exact]
    decoded = reference.decode_tile(reference.encode_tile(*pages, config), config, 64)
    mixed = []
    for x, y in zip(exact, decoded, strict=True):
        records = torch.cat([y.transpose(1, 2).flatten(0, 1), x[2 * PAGE :].float()])

        def keys(i, x=x, records=records):
            first_exact = max((i // PAGE - config.window_pages) * PAGE, exact_start, 0)
            return torch.cat([records[:first_exact], x[first_exact:].float()]).double()

        mixed.append(keys)
    expected = plain_attention(request, *mixed)[exact_start:]
    got = reference.attention(request.q[exact_start:], request.k, request.v, config, exact_start=exact_start)
    assert relative_rms(got, expected) < 1e-6


def test_attention_within_the_window_is_exact():
    request = make_request(2 * PAGE, (4, 2), 64, torch.float32)
    group = [x.repeat_interleave(2, 1).transpose(0, 1) for x in (request.k, request.v)]
    stock = torch.nn.functional.scaled_dot_product_attention(
        request.q.transpose(0, 1), *group, is_causal=True
    )
    got = reference.attention(request.q, request.k, request.v, KVARN)
    assert relative_rms(got, stock.transpose(0, 1)) < 1e-5


def test_attention_of_a_suffix_is_the_suffix_of_the_attention():
    request = make_request(3 * PAGE + 5, (2, 1), 64, torch.float16)
    whole = reference.attention(request.q, request.k, request.v, KVARN)
    part = reference.attention(request.q[-40:], request.k, request.v, KVARN)
    assert relative_rms(part, whole[-40:]) < 1e-6
