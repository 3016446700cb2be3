# SPDX-License-Identifier: Apache-2.0
"""Channel balance: what it computes stays, the channels of a head become alike, and a plain model stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
from kvarn_kernels import balance

HEADS, KV_HEADS, HIDDEN = 6, 2, 96
# of a head of 64 channels, a RoPE pair each as neox and as GPT-J pairs them
OUTLIERS = {True: [3, 35, 10, 42], False: [6, 7, 20, 21]}
DTYPES = [torch.float32, torch.bfloat16]


class Layer:
    """Projections of an attention module with 6 query heads and 2 KV heads.

    Norms are of each head with one weight for all; of "all heads" at once; or of each head in "Gemma's form".
    """

    def __init__(self, head_dim=64, *, dtype=torch.float32, bias=False, norms=False, inputs=None) -> None:
        self.head_dim, self.over_all, self.offset = head_dim, norms == "all heads", int(norms == "Gemma's form")
        rows = [n * head_dim for n in (HEADS, KV_HEADS, KV_HEADS)]
        self.weights = [(torch.randn(n, HIDDEN) / HIDDEN**0.5).to(dtype) for n in rows]
        self.biases = [torch.randn(n).to(dtype) if bias else None for n in rows]
        self.output = torch.randn(HIDDEN, rows[0]).to(dtype)
        sizes = rows[:2] if self.over_all else [head_dim] * 2
        self.norms = [1 + 0.1 * torch.rand(n).to(dtype) - self.offset for n in sizes] if norms else []
        self.inputs = inputs

    def views(self, rotary_dim=None, neox=True) -> balance.AttentionWeights:
        projections = zip(self.weights, self.biases, strict=True)
        return balance.attention_weights(
            [tuple(x if x is None else x.unflatten(0, (-1, self.head_dim)) for x in pair) for pair in projections],
            self.output,
            balance.rope_partners(self.head_dim, rotary_dim or self.head_dim, neox),
            inputs=self.inputs,
            norms=balance.Norms(*self.norms, self.offset) if self.norms else None,
        )

    def scale_keys(self, channels, factor) -> None:
        """Multiply channels of the keys and divide those of the queries."""
        targets = list(zip(self.weights[:2], (1 / factor, factor), strict=True))
        targets += [(b, f) for b, f in zip(self.biases[:2], (1 / factor, factor), strict=True) if b is not None]
        for weight, f in targets:
            weight.unflatten(0, (-1, self.head_dim))[:, channels] *= f

    def scale_values(self, channels, factor) -> None:
        """Multiply channels of the values and divide the columns of o_proj."""
        self.weights[2].unflatten(0, (-1, self.head_dim))[:, channels] *= factor
        self.output.unflatten(1, (-1, self.head_dim))[:, :, channels] /= factor

    def tensors(self) -> list[torch.Tensor]:
        return [*self.weights, *(b for b in self.biases if b is not None), self.output, *self.norms]

    def attend(self, x, neox=True, rotary_dim=None, extra=None, multiplied=None) -> torch.Tensor:
        """Return what the module makes of x [T, n], causally.

        Args:
            extra: [Hk, D], added before o_proj.
            multiplied: [Hq, D] and [Hk, D], by which queries and keys are multiplied behind RoPE.
        """
        q, k, v = (
            torch.nn.functional.linear(x, w, b).unflatten(-1, (-1, self.head_dim)).transpose(0, 1)
            for w, b in zip(self.weights, self.biases, strict=True)
        )
        if self.norms:
            dims = (0, -1) if self.over_all else -1
            unit = (a * torch.rsqrt(a.square().mean(dims, keepdim=True)) for a in (q, k))
            by_head = (weight.view(-1, 1, self.head_dim) + self.offset for weight in self.norms)
            q, k = (a * weight for a, weight in zip(unit, by_head, strict=True))
        q, k = (rope(a, rotary_dim or self.head_dim, neox) for a in (q, k))
        if multiplied is not None:
            q, k = (a * factors[:, None] for a, factors in zip((q, k), multiplied, strict=True))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        if extra is not None:
            out = out + extra.repeat_interleave(HEADS // KV_HEADS, 0)[:, None]
        return out.transpose(0, 1).flatten(1) @ self.output.T


def rope(x, rotary_dim, neox) -> torch.Tensor:
    """Turn the channels of x [H, T, D]."""
    half = rotary_dim // 2
    angles = torch.arange(x.shape[1])[:, None] * 100.0 ** (-torch.arange(half) / half)
    pairs = (slice(0, half), slice(half, rotary_dim)) if neox else (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
    a, b = (x[..., pair] for pair in pairs)
    turned = x.clone()
    cos, sin = angles.cos().to(x), angles.sin().to(x)
    turned[..., pairs[0]], turned[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin
    return turned


def same(a: Layer, b: Layer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.tensors(), b.tensors(), strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
def test_balance_takes_outlier_channels_back_to_the_bit(dtype, neox):
    layer = Layer(dtype=dtype, bias=False)
    plain = copy.deepcopy(layer)
    layer.scale_keys(OUTLIERS[neox], 32)
    layer.scale_values([0, 5, 9], 16)
    chosen = balance.choose(layer.views(neox=neox))
    assert chosen.heads == KV_HEADS and chosen.largest == 32
    chosen.put_in(layer.views(neox=neox))
    # random rows of 96 inputs differ by less than a factor of four in k / q, so that the others keep a factor of one
    assert same(layer, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_balanced_weights_give_the_same_output_to_the_bit(dtype):
    layer = Layer(dtype=dtype, bias=True)
    layer.scale_keys(OUTLIERS[True], 32)
    layer.scale_values([0, 5, 9], 16)
    layer.biases[2].zero_()
    x = torch.randn(40, HIDDEN).to(dtype)
    expected = layer.attend(x)
    chosen = balance.choose(layer.views())
    before = copy.deepcopy(layer)
    chosen.put_in(layer.views())
    assert not same(layer, before) and torch.equal(layer.attend(x), expected)


@pytest.mark.parametrize(("rotary_dim", "neox"), [(64, True), (64, False), (32, True), (32, False)])
def test_factors_are_powers_of_two_and_equal_for_a_rope_pair(rotary_dim, neox):
    layer = Layer()
    layer.weights[1] *= torch.logspace(-2, 2, KV_HEADS * 64)[torch.randperm(KV_HEADS * 64), None]
    views = layer.views(rotary_dim, neox)
    exponents = views.keys.exponents()
    pairs = balance.rope_partners(64, rotary_dim, neox)
    assert torch.equal(exponents, exponents.round()) and exponents.abs().max() > 1
    assert torch.equal(exponents, exponents[:, pairs])
    # channels that RoPE does not turn are free
    assert (pairs == torch.arange(64)).sum() == 64 - rotary_dim
    x = torch.randn(40, HIDDEN)
    expected = layer.attend(x, neox, rotary_dim)
    balance.choose(views).put_in(views)
    assert torch.equal(layer.attend(x, neox, rotary_dim), expected)


def test_gain_is_what_the_error_of_a_product_falls_by():
    layer = Layer(head_dim=64)
    layer.scale_keys(OUTLIERS[True], 8)
    q, k = (w.unflatten(0, (KV_HEADS, -1, 64)).square().sum((1, -1)) for w in layer.weights[:2])
    noise = torch.stack([q.sum(-1), k.sum(-1)]).prod(0)
    views = layer.views()
    exponents = views.keys.exponents()
    expected = balance.gain(k, q, exponents)[:, 0]
    views.keys.scale(exponents)
    q, k = (w.unflatten(0, (KV_HEADS, -1, 64)).square().sum((1, -1)) for w in layer.weights[:2])
    torch.testing.assert_close(expected, noise / torch.stack([q.sum(-1), k.sum(-1)]).prod(0))
    # (60 + 4 * 64) (60 + 4 / 64) / 64^2, for rows of one length
    assert expected.tolist() == pytest.approx([4.63] * KV_HEADS, rel=0.15)


@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_model_stays_as_it_is(bias):
    layer = Layer(bias=bias)
    if bias:
        layer.biases[1].mul_(0.01)
        layer.biases[2].mul_(0.01)
    # the predicted gain of one channel of 64 times two is 1.01
    layer.scale_keys([3], 2)
    assert balance.choose(layer.views()) is None


def test_channels_of_twice_the_size_stay_beside_outliers():
    layer = Layer()
    layer.scale_keys(OUTLIERS[True], 32)
    layer.scale_keys([1, 33], 2)
    assert balance.choose(layer.views()).keys[0].nonzero().flatten().tolist() == sorted(OUTLIERS[True])


def test_magnitudes_of_a_whole_head_are_left_alone():
    layer = Layer()
    layer.scale_keys(list(range(64)), 2.0**15)
    layer.scale_values(list(range(64)), 2.0**15)
    assert balance.choose(layer.views()) is None


def test_balance_twice_changes_nothing():
    layer = Layer(bias=True)
    layer.weights[1] *= torch.logspace(-2, 2, KV_HEADS * 64)[torch.randperm(KV_HEADS * 64), None]
    balance.choose(layer.views()).put_in(layer.views())
    assert balance.choose(layer.views()) is None


def test_balance_can_be_taken_out_and_put_in_again():
    layer = Layer(bias=True)
    layer.scale_keys(OUTLIERS[True], 32)
    layer.scale_values([0, 5, 9], 16)
    before = copy.deepcopy(layer)
    chosen = balance.choose(layer.views())
    chosen.put_in(layer.views())
    balanced, bias = copy.deepcopy(layer), chosen.output_bias
    chosen.put_in(layer.views())
    assert same(layer, balanced)
    for _ in range(2):
        chosen.take_out(layer.views())
        assert same(layer, before)
    chosen.put_in(layer.views())
    assert same(layer, balanced) and chosen.output_bias is bias


def test_half_precision_loses_no_more_than_subnormals_do():
    layer = Layer(dtype=torch.float16)
    layer.scale_keys(OUTLIERS[True], 32)
    # small rows get smaller yet: half a step of fp16's subnormals is 2^-25
    layer.weights[1][5] *= 2.0**-10
    layer.weights[1][37] *= 2.0**-10
    before = [w.double() for w in layer.weights[:2]]
    views = layer.views()
    exponents = views.keys.exponents()
    views.keys.scale(exponents)
    assert exponents.min() < 0 < exponents.max()
    factors = exponents.double().exp2()
    for got, old, f in zip(layer.weights, before, (factors.repeat_interleave(3, 0), 1 / factors), strict=False):
        assert (got.double() - old * f.reshape(-1, 1)).abs().max() <= 2.0**-25


@pytest.mark.parametrize(("dtype", "fits"), [(torch.float32, False), (torch.float16, True)])
def test_no_weight_grows_beyond_its_dtype(dtype, fits):
    layer = Layer(dtype=dtype)
    channels = OUTLIERS[True][:2]
    queries, keys = (w.unflatten(0, (-1, 64)) for w in layer.weights[:2])
    queries.mul_(1024), keys.mul_(1 / 1024)
    queries[:, channels], queries[:, channels[0], 0], keys[:, channels] = 0, 4096, 64
    views = layer.views()
    exponents = views.keys.exponents()
    # fp16 ends below 2^16; the other channel of the pair has room, and the same factor
    assert (exponents[:, channels] == 3).all() if fits else (exponents[:, channels] > 3).all()
    views.keys.scale(exponents)
    assert all(w.isfinite().all() for w in layer.weights)


def test_channels_without_weights_stay_as_they_are():
    layer = Layer()
    layer.scale_keys(OUTLIERS[True], 32)
    layer.weights[1][[7, 39]] = 0
    layer.weights[2][64:] = 0
    chosen = balance.choose(layer.views())
    assert chosen.keys[0, 7] == 0 and chosen.keys[0, 3] == 5 and not chosen.values.any()
    chosen.put_in(layer.views())
    assert all(w.isfinite().all() for w in layer.tensors())


def test_norms_between_projection_and_rope_have_the_factors_of_the_keys():
    layer = Layer(norms=True)
    for norm, factor in zip(layer.norms, (1 / 16, 16), strict=True):
        norm[OUTLIERS[True]] *= factor
    # what a projection makes large is large behind the norm too
    layer.scale_keys([1, 33], 64)
    before = copy.deepcopy(layer)
    x = torch.randn(40, HIDDEN)
    expected = layer.attend(x)
    chosen = balance.choose(layer.views())
    chosen.put_in(layer.views())
    assert chosen.keys.shape == (1, 64)
    assert {c: n for c, n in enumerate(chosen.keys[0].tolist()) if n} == dict.fromkeys(OUTLIERS[True], 4) | {
        1: 6,
        33: 6,
    }
    assert all(torch.equal(a, b) for a, b in zip(layer.weights, before.weights, strict=True))
    assert torch.equal(layer.attend(x), expected)


def test_a_norm_over_all_heads_has_the_factors_of_each_head():
    layer = Layer(norms="all heads")
    # of the first KV head and its three query heads
    for norm, factor in zip(layer.norms, (1 / 16, 16), strict=True):
        norm[: len(norm) // KV_HEADS].view(-1, 64)[:, OUTLIERS[True]] *= factor
    layer.scale_keys([1, 33], 64)
    before = copy.deepcopy(layer)
    x = torch.randn(40, HIDDEN)
    expected = layer.attend(x)
    chosen = balance.choose(layer.views())
    chosen.put_in(layer.views())
    both = {1: 6, 33: 6}
    for keys, factors in zip(chosen.keys, (dict.fromkeys(OUTLIERS[True], 4) | both, both), strict=True):
        assert {c: n for c, n in enumerate(keys.tolist()) if n} == factors
    assert all(torch.equal(a, b) for a, b in zip(layer.weights, before.weights, strict=True))
    assert not same(layer, before) and torch.equal(layer.attend(x), expected)
    chosen.take_out(layer.views())
    assert same(layer, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_behind_a_norm_of_gemmas_form_queries_and_keys_are_multiplied(dtype):
    layer = Layer(norms="Gemma's form", dtype=dtype)
    for norm, factor in zip(layer.norms, (1 / 16, 16), strict=True):
        norm[OUTLIERS[True]] = factor - 1
    # in the first KV head, whatever the weights of the norm are
    layer.weights[1][[1, 33]] *= 64
    before = copy.deepcopy(layer)
    x = torch.randn(40, HIDDEN).to(dtype)
    expected = layer.attend(x)
    chosen = balance.choose(layer.views())
    chosen.put_in(layer.views())
    assert same(layer, before)
    of_queries, of_keys = chosen.queries_and_keys
    assert of_queries.dtype == of_keys.dtype == dtype
    assert torch.equal(of_keys, (-chosen.keys).exp2()) and of_queries.shape == (HEADS, 64)
    large = [set((of_keys[head] < 1).nonzero().flatten().tolist()) for head in range(KV_HEADS)]
    assert large == [{1, 33, *OUTLIERS[True]}, set(OUTLIERS[True])]
    assert torch.equal(layer.attend(x, multiplied=chosen.queries_and_keys), expected)


def test_no_factor_is_larger_than_fp16_holds_it_and_its_inverse():
    layer = Layer(norms="Gemma's form")
    for norm, factor in zip(layer.norms, (2.0**-20, 2.0**20), strict=True):
        norm[OUTLIERS[True]] = factor - 1
    chosen = balance.choose(layer.views())
    assert chosen.largest == 2.0**balance.MOST
    for factors in chosen.queries_and_keys:
        assert torch.equal(factors.half().float(), factors) and (factors >= torch.finfo(torch.float16).tiny).all()


def test_a_bias_of_the_values_is_added_to_the_output_instead():
    layer = Layer(bias=True)
    layer.scale_values([0, 5, 9], 16)
    x = torch.randn(40, HIDDEN)
    expected = layer.attend(x)
    chosen = balance.choose(layer.views())
    chosen.put_in(layer.views())
    assert not layer.biases[2].any() and chosen.values.any()
    torch.testing.assert_close(layer.attend(x, extra=chosen.output_bias), expected, rtol=1e-4, atol=1e-4)
    assert (layer.attend(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize(("share", "leaves"), [(1 / 80, False), (1 / 50, True)])
def test_a_small_bias_of_the_values_stays(share, leaves):
    inputs = torch.full((HIDDEN,), 0.25)
    layer = Layer(bias=True, inputs=inputs)
    energy = (layer.weights[2] * inputs).square().view(KV_HEADS, -1).sum(-1)
    bias = layer.biases[2].view(KV_HEADS, 64)
    bias.mul_((share * energy / bias.square().sum(-1)).sqrt()[:, None])
    layer.biases[1].zero_()
    chosen = balance.choose(layer.views())
    assert (chosen is not None and chosen.output_bias is not None) == leaves


def test_inputs_count_by_the_norm_before_the_projections():
    # the first input is large in the keys' weights and hardly there behind the norm
    inputs = torch.ones(HIDDEN)
    inputs[0] = 1e-4
    layer = Layer(inputs=inputs)
    layer.weights[1][::7, 0] = 50.0
    assert balance.choose(layer.views()) is None
    layer.inputs = None
    assert balance.choose(layer.views()) is not None
