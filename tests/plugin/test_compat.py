# SPDX-License-Identifier: Apache-2.0
"""Versions: which are served, what an untested one is told, and that each difference is found where it is."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
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
    assert compat._since("0.5.20") is since


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
    assert compat.attention_layers(object(), 2, 5) == [2, 3, 4]
    found = SimpleNamespace(full_attention_layer_ids=[3, 7, 11])
    monkeypatch.setattr(compat, "hybrid_config", lambda model: found)
    assert compat.attention_layers(object(), 0, 12) == [3, 7, 11]
    assert compat.attention_layers(object(), 4, 11) == [7]
