# SPDX-License-Identifier: Apache-2.0
"""What a user types, and what SGLang's arguments become."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kvarn_kernels.config import preset_names
from sglang_kvarn import compat, settings


@pytest.mark.parametrize("preset", preset_names())
def test_presets_pick_backend_and_page_size(server_args, model_dir, preset):
    args = compat.resolved_arguments(server_args(model_path=model_dir(), kv_cache_dtype=preset))
    assert (args.attention_backend, args.page_size, args.kv_cache_dtype) == ("kvarn", 128, preset)


@pytest.mark.skipif(not compat.transfers_requests(), reason="transfers are refused in this SGLang")
@pytest.mark.parametrize(("preset", "mode", "kept"), [
    ("kvarn", "decode", "cpu_tensor"), ("kvarn", "prefill", None), ("auto", "decode", None)
])
def test_a_decode_server_keeps_retracted_requests_with_their_rings(server_args, model_dir, preset, mode, kept):
    given = server_args(model_path=model_dir(), kv_cache_dtype=preset, disaggregation_mode=mode)
    assert compat.resolved_arguments(given).disaggregation_decode_retraction_backup == kept


def test_other_formats_keep_their_defaults(server_args, model_dir):
    args = compat.resolved_arguments(server_args(model_path=model_dir()))
    assert args.attention_backend != "kvarn" and args.page_size == 1


def test_cli_takes_presets_and_lists_them_for_a_wrong_name(model_dir, capsys):
    prepare = compat.resolve("sglang.srt.server_args.prepare_server_args")
    argv = ["--model-path", model_dir(), "--kv-cache-dtype"]
    assert prepare([*argv, "kvarn_k2v2_g128"]).kv_cache_dtype == "kvarn_k2v2_g128"
    with pytest.raises(SystemExit):
        prepare([*argv, "kvarn_k3v3_g128"])
    message = capsys.readouterr().err
    assert all(f"'{name}'" in message for name in preset_names())


def test_engine_lists_presets_for_a_wrong_name(server_args, model_dir):
    with pytest.raises(ValueError, match=r"one of kvarn, .*kvarn_k2v2_g128_canonical, got 'kvarn_k3v3'"):
        server_args(model_path=model_dir(), kv_cache_dtype="kvarn_k3v3")


def test_cache_dtype_is_that_of_what_is_not_in_records():
    configure = compat.resolve("sglang.srt.mem_cache.kv_cache_dtype.configure_kv_cache_dtype")
    common = dict(
        model=None, model_dtype=torch.bfloat16, is_dflash=False, speculative_draft_attention_backend=None
    )
    target = configure(server_args_kv_cache_dtype="kvarn", is_draft_worker=False, **common)
    draft = configure(server_args_kv_cache_dtype="kvarn", is_draft_worker=True, **common)
    assert target == (None, torch.bfloat16) and draft == (None, torch.bfloat16)
    if compat.has_argument("speculative_draft_kv_cache_dtype"):
        common["speculative_draft_kv_cache_dtype"] = "fp8_e4m3"
        draft = configure(server_args_kv_cache_dtype="kvarn", is_draft_worker=True, **common)
        target = configure(server_args_kv_cache_dtype="kvarn", is_draft_worker=False, **common)
        assert draft == (None, torch.float8_e4m3fn) and target == (None, torch.bfloat16)
    stock = configure(server_args_kv_cache_dtype="fp8_e4m3", is_draft_worker=False, **common)
    assert stock == (None, torch.float8_e4m3fn)


def test_target_preset_leaves_draft_workers_alone():
    args = SimpleNamespace(kv_cache_dtype="kvarn")
    assert settings.target_preset(SimpleNamespace(is_draft_worker=True, server_args=args)) is None
    target = settings.target_preset(SimpleNamespace(is_draft_worker=False, server_args=args))
    assert target is not None and target.name == "kvarn_k4v2_g128"
