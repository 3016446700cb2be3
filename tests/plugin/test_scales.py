# SPDX-License-Identifier: Apache-2.0
"""Scales for a cache in another format are named once, by where the user gave them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import compat, scales

SCHEME = {"kv_cache_scheme": {"num_bits": 8, "type": "float"}}


class Configuration:
    """What transformers makes of a quantization_config."""

    def to_dict(self):
        return SCHEME

    def __repr__(self):
        return "an object"


def runner(path=None, config=None, **layer):
    """Return what is read of SGLang's ModelRunner, with one attention layer."""
    attention = compat.RadixAttention(num_heads=4, head_dim=64, scaling=0.125, num_kv_heads=2, layer_id=0)
    for name, value in layer.items():
        setattr(attention, name, value)
    return SimpleNamespace(
        server_args=SimpleNamespace(quantization_param_path=path),
        model_config=SimpleNamespace(hf_config=SimpleNamespace(quantization_config=config)),
        model=torch.nn.ModuleList([attention]),
    )


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ({}, []),
        ({"config": {"quant_method": "fp8"}}, []),
        # what SGLang sets where an fp8 checkpoint has no scales
        ({"k_scale_float": 1.0, "v_scale_float": 1.0}, []),
        ({"path": "scales.json"}, ["--quantization-param-path"]),
        ({"config": SCHEME}, ["kv_cache_scheme in quantization_config"]),
        ({"config": Configuration()}, ["kv_cache_scheme in quantization_config"]),
        ({"config": {"kv_cache_quant_algo": "FP8"}}, ["kv_cache_quant_algo in quantization_config"]),
        ({"k_scale_float": 1.0, "v_scale_float": 0.5}, ["k_scale and v_scale of its layers"]),
    ],
    ids=str,
)
def test_unused_scales_are_found(given, found):
    assert scales.unused_scales(runner(**given)) == found


@pytest.mark.parametrize(("tp_rank", "lines"), [(0, 1), (1, 0)])
def test_log_unused_says_so_in_one_line_on_the_first_rank(monkeypatch, tp_rank, lines):
    monkeypatch.setattr(compat, "get_parallel", lambda: SimpleNamespace(tp_rank=tp_rank), raising=False)
    logged: list[str] = []
    monkeypatch.setattr(scales.logger, "info", lambda text, *args: logged.append(text % args))
    scales.log_unused(runner())
    assert logged == []
    scales.log_unused(runner(path="scales.json", config=SCHEME))
    assert len(logged) == lines
    assert all("(--quantization-param-path, kv_cache_scheme in quantization_config)" in line for line in logged)


def test_layers_of_sglang_carry_the_attributes_that_are_read():
    layer = runner().model[0]
    assert layer.k_scale_float is None and layer.v_scale_float is None
