# SPDX-License-Identifier: Apache-2.0
"""Versions: which are served, what an untested one is told, and that each difference is found where it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import compat


@pytest.mark.parametrize("found", [*compat.TESTED_VERSIONS, "0.5.16.post1", "0.5.23+cu130"])
def test_check_version_takes_tested_versions(monkeypatch, found):
    monkeypatch.setattr(compat, "version", lambda: found)
    compat.check_version()


@pytest.mark.parametrize("found", [*compat.BOOTED_VERSIONS, "0.5.18.post1", "0.5.20+cu130"])
def test_check_version_takes_a_version_that_was_run_by_hand_and_says_so(monkeypatch, found):
    monkeypatch.delenv(compat.UNTESTED_ENV, raising=False)
    monkeypatch.setattr(compat, "version", lambda: found)
    lines: list[str] = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *args: lines.append(text % args))
    compat.check_version()
    (line,) = lines
    assert f"SGLang {found} boots and generates" in line and "\n" not in line
    assert all(version in line for version in compat.TESTED_VERSIONS)


@pytest.mark.parametrize("found", ["0.4.9", "0.5.17", "0.5.19", "0.5.23.dev4", "0.5.24", "0.6.0", None])
def test_check_version_says_what_was_found_what_is_tested_and_how_to_override(monkeypatch, found):
    monkeypatch.delenv(compat.UNTESTED_ENV, raising=False)
    monkeypatch.setattr(compat, "version", lambda: found)
    with pytest.raises(RuntimeError) as error:
        compat.check_version()
    message = str(error.value)
    assert f"found {found or 'none'}:" in message and "\n" not in message
    assert all(version in message for version in compat.TESTED_VERSIONS)
    assert "pip install sglang==0.5.23" in message and f"set {compat.UNTESTED_ENV}=1" in message


def test_check_version_lets_the_user_try_another_version_but_not_none(monkeypatch):
    monkeypatch.setenv(compat.UNTESTED_ENV, "1")
    monkeypatch.setattr(compat, "version", lambda: "0.6.0")
    # an engine in this process may have configured logging, which would hide the record from caplog
    warnings: list[str] = []
    monkeypatch.setattr(compat.logger, "warning", lambda text, *args: warnings.append(text % args))
    compat.check_version()
    assert len(warnings) == 1 and "not tested with SGLang 0.6.0" in warnings[0]
    monkeypatch.setattr(compat, "version", lambda: None)
    with pytest.raises(RuntimeError, match="found none"):
        compat.check_version()


@pytest.mark.parametrize(
    ("found", "since"), [("0.5.19", False), ("0.5.20", True), ("0.5.20.post1", True), ("0.6.0", True), (None, False)]
)
def test_since_compares_numbers(monkeypatch, found, since):
    monkeypatch.setattr(compat, "version", lambda: found)
    assert compat.is_since("0.5.20") is since


def test_added_arguments_are_those_that_the_installed_sglang_has():
    fields = set(compat.resolve("sglang.srt.server_args.ServerArgs").__annotations__)
    for name in compat._ADDED_ARGUMENTS:
        assert compat.has_argument(name) == (name in fields)


def test_resolved_arguments_are_what_resolution_decided(server_args, model_dir):
    args = server_args(model_path=model_dir())
    assert compat.resolved_arguments(args).page_size == 1
    assert compat.model_config(compat.resolved_arguments(args)).head_dim == 64


def test_a_share_of_states_that_nobody_chose_is_open(server_args, model_dir):
    assert compat.is_state_ratio_open(server_args(model_path=model_dir()))
    assert not compat.is_state_ratio_open(server_args(model_path=model_dir(), mamba_full_memory_ratio=0.5))


def test_an_argument_of_a_scheduler_is_read_where_it_was_set(server_args, model_dir):
    publish = compat.resolve("sglang.srt.server_args.set_global_server_args_for_scheduler")
    args = server_args(model_path=model_dir(), max_running_requests=7)
    publish(args)
    assert compat.scheduler_argument(args, "max_running_requests") == 7
    compat.override_argument(args, max_running_requests=5)
    assert compat.scheduler_argument(args, "max_running_requests") == 5


def test_attention_layers_are_those_of_a_hybrid_that_keep_no_states(monkeypatch):
    monkeypatch.setattr(compat, "hybrid_config", lambda model: None)
    plain = SimpleNamespace(is_hybrid_swa=False)
    assert compat.attention_layers(plain, 2, 5) == [2, 3, 4]
    found = SimpleNamespace(full_attention_layer_ids=[3, 7, 11])
    monkeypatch.setattr(compat, "hybrid_config", lambda model: found)
    assert compat.attention_layers(plain, 0, 12) == [3, 7, 11]
    assert compat.attention_layers(plain, 4, 11) == [7] and compat.sliding_layers(plain, 0, 12) == []


def test_attention_layers_and_sliding_windows_are_those_of_sglang():
    model = SimpleNamespace(is_hybrid_swa=True, swa_attention_layer_ids=[0, 2, 4], full_attention_layer_ids=[1, 3, 5])
    assert compat.attention_layers(model, 0, 6) == [1, 3, 5] and compat.attention_layers(model, 2, 4) == [3]
    assert compat.sliding_layers(model, 0, 6) == [0, 2, 4] and compat.sliding_layers(model, 2, 4) == [2]
    heads = SimpleNamespace(num_attention_heads_per_layer=[96, 64, 96, 64, 96, 64])
    assert compat.query_heads(SimpleNamespace(**vars(model), hf_text_config=heads)) == 64
    heads.num_attention_heads_per_layer[3] = 32
    assert compat.query_heads(SimpleNamespace(**vars(model), hf_text_config=heads)) is None
    # of Step, with a layer that drafts behind the others
    kinds = ["sliding_attention", "full_attention"] * 3 + ["sliding_attention"]
    step = SimpleNamespace(attention_other_setting={"num_attention_heads": 96}, layer_types=kinds)
    made = SimpleNamespace(**vars(model), hf_text_config=step, num_attention_heads=64, num_hidden_layers=6)
    assert compat.query_heads_of_layers(made) == [96, 64] * 3 and compat.query_heads(made) == 64


def test_windows_in_records_are_those_of_layers_in_one_pool_with_all_others():
    text = SimpleNamespace(layer_types=["sliding_attention", "full_attention"], sliding_window=512)
    assert compat.windows_in_records(SimpleNamespace(is_hybrid_swa=False, hf_text_config=text)) == (512,)
    assert compat.windows_in_records(SimpleNamespace(is_hybrid_swa=True, hf_text_config=text)) == ()
    text.layer_types = ["full_attention"] * 2
    assert compat.windows_in_records(SimpleNamespace(is_hybrid_swa=False, hf_text_config=text)) == ()
    # as in configurations without layer types
    assert compat.windows_in_records(SimpleNamespace(is_hybrid_swa=False, hf_text_config=SimpleNamespace())) == ()


@pytest.mark.parametrize(("found", "right"), [("0.5.16", False), ("0.5.18", False), ("0.5.20", True), ("0.5.23", True)])
def test_states_are_saved_where_pages_end_from_the_first_version_that_does(monkeypatch, found, right):
    monkeypatch.setattr(compat, "version", lambda: found)
    assert compat.saves_states_at_page_ends() is right


@pytest.mark.parametrize(("found", "right"), [("0.5.16", False), ("0.5.20", False), ("0.5.23", True)])
def test_states_go_to_host_memory_from_the_version_that_the_hook_is_for(monkeypatch, found, right):
    monkeypatch.setattr(compat, "version", lambda: found)
    assert compat.hosts_states() is right


@pytest.mark.parametrize(
    ("name", "found", "wrong"),
    [
        ("GraniteMoeHybridConfig", "0.5.20", True),
        ("GraniteMoeHybridConfig", "0.5.23", False),
        ("FalconH1Config", "0.5.16", False),
    ],
)
def test_a_model_with_an_error_is_known_by_its_version(monkeypatch, name, found, wrong):
    monkeypatch.setattr(compat, "version", lambda: found)
    assert compat.adds_last_residual_twice(type(name, (), {})()) is wrong
    assert not compat.adds_last_residual_twice(None)


@pytest.mark.parametrize(("found", "wrong"), [("0.5.16", True), ("0.5.20", True), ("0.5.23", False)])
def test_ranks_that_sum_states_twice_are_known_by_the_version(monkeypatch, found, wrong):
    monkeypatch.setattr(compat, "version", lambda: found)
    assert compat.adds_states_per_rank(type("FalconH1Config", (), {})()) is wrong
    assert not compat.adds_states_per_rank(type("NemotronHConfig", (), {})())


def test_layers_that_stop_at_drafts_are_known_by_their_version(monkeypatch):
    falcon, other = type("FalconH1Config", (), {})(), type("NemotronHConfig", (), {})()
    monkeypatch.setattr(compat, "version", lambda: "0.5.16")
    assert not compat.verifies_drafts(falcon) and compat.verifies_drafts(other)
    monkeypatch.setattr(compat, "version", lambda: "0.5.23")
    assert compat.verifies_drafts(falcon)


# published shapes, the states in 32 bits and the inputs of convolutions in 16: layers, heads, channels of a head and of
# its state, channels of the convolution
STATES = {
    "Qwen3-Next-80B-A3B": (
        {"model_type": "qwen3_next", "num_hidden_layers": 48, "full_attention_interval": 4, "linear_num_key_heads": 16},
        {"linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128},
        (36, 32, 128, 128, 2 * 2048 + 4096),
    ),
    "Nemotron-H-8B": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-"},
        {"mamba_num_heads": 128, "mamba_head_dim": 64, "ssm_state_size": 128, "n_groups": 8},
        (24, 128, 64, 128, 8192 + 2 * 8 * 128),
    ),
    "Falcon-H1-7B": (
        {"model_type": "falcon_h1", "num_hidden_layers": 44, "mamba_d_ssm": 3072, "mamba_n_heads": 24},
        {"mamba_d_head": 128, "mamba_d_state": 256, "mamba_n_groups": 1},
        (44, 24, 128, 256, 3072 + 2 * 256),
    ),
    "Granite-4-H-tiny": (
        {"model_type": "granitemoehybrid", "num_hidden_layers": 40, "hidden_size": 1536, "mamba_n_heads": 48},
        {"mamba_d_head": 64, "mamba_d_state": 128, "mamba_n_groups": 1},
        (36, 48, 64, 128, 3072 + 2 * 128),
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_takes_the_bytes_of_its_shape(model_dir, monkeypatch, name):
    monkeypatch.delenv("SGLANG_MAMBA_CONV_DTYPE", raising=False)
    one, other, (layers, heads, head, state, convolution) = STATES[name]
    if name.startswith("Granite"):
        one = one | {"layer_types": ["attention" if i in (5, 15, 25, 35) else "mamba" for i in range(40)]}
    folder = model_dir(plain=False, **one, **other, architectures=["Any"])
    config = compat.hybrid_config(compat.ModelConfig(folder))
    found = compat.planned_state_bytes(config, 1)
    assert found == layers * (heads * head * state * 4 + convolution * 3 * 2)
    if name.startswith(("Qwen", "Nemotron")):
        # the groups of the others are fewer than the ranks, so that each keeps one
        assert compat.planned_state_bytes(config, 2) == found // 2


def test_the_format_of_a_state_names_its_types_shapes_and_layers():
    parts = {"conv": torch.float32, "temporal": torch.bfloat16}, {"conv": [(96, 3)], "temporal": (4, 64, 128)}, (0, 2)

    def found(dtype: dict, shape: dict, layers: tuple) -> str:
        params = SimpleNamespace(dtype=SimpleNamespace(**dtype), shape=SimpleNamespace(**shape), layers=layers)
        return compat.state_format(SimpleNamespace(mamba2_cache_params=params))

    dtype, shape, layers = parts
    formats = [
        found(*parts),
        found(dtype | {"conv": torch.float16}, shape, layers),
        # of as many bytes
        found(dtype | {"temporal": torch.float16}, shape, layers),
        found(dtype, shape | {"conv": [(3, 96)]}, layers),
        found(dtype, shape | {"temporal": (4, 128, 64)}, layers),
        found(dtype, shape, (1, 2)),
    ]
    assert formats[0] == found(*parts) and len(set(formats)) == len(formats)


def test_layers_with_states_are_counted_by_sglangs_own_list():
    config = SimpleNamespace(mamba2_cache_params=SimpleNamespace(layers=range(3)))
    assert compat.state_layers(config) == 3


def test_the_window_of_layers_counts_the_query_s_own_token():
    def layer(n: int, **window: int) -> torch.nn.Module:
        return compat.RadixAttention(num_heads=4, head_dim=64, scaling=1.0, num_kv_heads=2, layer_id=n, **window)

    whole = torch.nn.ModuleList([layer(0), torch.nn.Linear(1, 1)])
    assert compat.window_of_layers(whole) == 0
    assert compat.window_of_layers(torch.nn.ModuleList([*whole, layer(1, sliding_window_size=127)])) == 128
