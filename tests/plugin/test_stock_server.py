# SPDX-License-Identifier: Apache-2.0
"""A server whose cache is one of SGLang's own is what it is without the plugin: hooks, arguments, an engine."""

from __future__ import annotations

import argparse
import copy
import sys
from types import SimpleNamespace

import pytest
import sglang_kvarn
import torch
from sglang_kvarn import compat, hook, plugin
from sglang_kvarn.hook import Hook

CONFIGURATOR = {"is_draft_worker": False, "server_args": SimpleNamespace(kv_cache_dtype="auto")}
SERVER_ARGS = {"kv_cache_dtype": "fp8_e4m3", "attention_backend": "triton", "device": "cuda"}


class Unread:
    """What a hook has no business with on a stock server."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"{name} is read")


def configurator() -> SimpleNamespace:
    return SimpleNamespace(**CONFIGURATOR)


def manager(worker: object) -> SimpleNamespace:
    return SimpleNamespace(tp_worker=worker)


def queue() -> SimpleNamespace:
    return SimpleNamespace(token_to_kv_pool=SimpleNamespace(size=4), req_to_token_pool=SimpleNamespace(size=4))


class Model(torch.nn.Module):
    """A model with attributes, as all have, whose layers nobody may walk through."""

    def modules(self):
        raise AssertionError("its layers are read")


# by the function of the hook: arguments and keyword arguments of the function that it hooks, of stock servers
STOCK = {
    "plugin._resolve": [((SimpleNamespace(**SERVER_ARGS),), {})],
    "refusals.resolve_or_refuse": [((SimpleNamespace(**SERVER_ARGS),), {})],
    "refused.leave_scheduler": [((Unread(), Unread()), {})],
    "rings.limit_prefix": [((SimpleNamespace(return_logprob=False), 512), {})],
    "plugin._refuse": [((SimpleNamespace(**SERVER_ARGS),), {})],
    "settings.cache_dtype": [
        ((), {"server_args_kv_cache_dtype": name, "model_dtype": Unread(), "is_draft_worker": draft})
        for name in ("auto", "fp8_e4m3", None)
        for draft in (False, True)
    ],
    "drafts.charge_draft": [((Unread(), configurator()), {})],
    "checksums.seal": [((Unread(), Unread(), Unread()), {})],
    "drafts.keep_apart": [((Unread(), Unread()), {})],
    "drafts.keep_chains": [((Unread(), Unread(), Unread(), Unread()), {})],
    "budget.split_memory": [((configurator(), Unread()), {})],
    "budget.cell_size": [((Unread(), configurator(), Unread()), {})],
    "budget.charge_fixed_bytes": [((configurator(), Unread()), {})],
    "budget.cap_rows": [((configurator(), Unread()), {}), ((configurator(),), {"token_capacity": Unread()})],
    "budget.choose_sizes": [((configurator(),), {})],
    "plugin._compose_backends": [
        ((SimpleNamespace(token_to_kv_pool=pool), Unread()), {})
        # plain, and with sliding windows
        for pool in (SimpleNamespace(size=4), SimpleNamespace(full_kv_pool=SimpleNamespace(size=4)))
    ],
    "plugin._build_pool": [((configurator(),), {"sizes": Unread(), "req_to_token_pool": Unread()})],
    "report.add_to_server_info": [
        ((SimpleNamespace(server_args=SimpleNamespace(**SERVER_ARGS)), Unread()), {}),
    ],
    "plugin._take_model": [((SimpleNamespace(server_args=SimpleNamespace(**SERVER_ARGS)),), {})],
    # a pool, and what it says of itself
    "plugin._choose_host_pool": [((SimpleNamespace(size=4),), {}), ((SimpleNamespace(head_num=4),), {})],
    "plugin._hold_states": [((Unread(), SimpleNamespace(size=4), Unread()), {})],
    "fences.before_writing": [((SimpleNamespace(mem_pool_device=SimpleNamespace(size=4)),), {})],
    "fences.before_loading": [((SimpleNamespace(mem_pool_device=SimpleNamespace(size=4)),), {})],
    "refusals.attach_or_refuse": [((SimpleNamespace(server_args=SimpleNamespace(**SERVER_ARGS)), Unread()), {})],
    "rings.attach_allocator": [((SimpleNamespace(get_kvcache=SimpleNamespace),), {"kvcache": Unread()})],
    "rings.alloc_rows": [((SimpleNamespace(size=4), [Unread()]), {})],
    "rings.free_row": [((SimpleNamespace(size=4), Unread()), {})],
    "rings.forget_rows": [((SimpleNamespace(size=4),), {})],
    "admission.add_with_ring": [
        ((SimpleNamespace(tree_cache=SimpleNamespace(req_to_token_pool=SimpleNamespace())), Unread()), {})
    ],
    "admission.begin_where_a_load_failed": [((SimpleNamespace(req_to_token_pool=SimpleNamespace()), Unread()), {})],
    "admission.limit_lengths": [
        ((SimpleNamespace(tp_worker=SimpleNamespace(get_memory_pool=lambda: (SimpleNamespace(), None))),), {})
    ],
    "admission.count_rings": [((SimpleNamespace(req_to_token_pool=SimpleNamespace()),), {})],
    "transfer.describe": [((SimpleNamespace(), SimpleNamespace(size=4)), {"req_to_token_pool": Unread()})],
    "transfer.send_exact_start": [
        ((SimpleNamespace(req_to_token_pool=SimpleNamespace()), Unread()), {"last_chunk": True})
    ],
    "transfer.take_exact_start": [
        ((SimpleNamespace(scheduler=SimpleNamespace(req_to_token_pool=SimpleNamespace())), Unread()), {})
    ],
    "transfer.check_senders": [((queue(), Unread()), {})],
    "transfer.charge_ring": [((queue(), Unread(), Unread(), Unread(), Unread()), {})],
    "transfer.charge_ring_of_retracted": [((queue(), Unread()), {})],
    "transfer.finish_step": [
        ((SimpleNamespace(token_to_kv_pool_allocator=SimpleNamespace(get_kvcache=SimpleNamespace)), Unread()), {})
    ],
    "fences.before_receiving": [((queue(), Unread(), Unread(), Unread()), {"decode_prefix_len": 0})],
    "balanced_layers.with_plain_weights": [
        ((manager(SimpleNamespace(model_runner=SimpleNamespace(model=Model()))), Unread()), {}),
        # a worker that holds no model itself
        ((manager(SimpleNamespace()), Unread()), {}),
    ],
}


def name_of(hook: Hook) -> str:
    return f"{hook.function.__module__.rpartition('.')[2]}.{hook.function.__name__}"


CALLS = [
    pytest.param(declared, *call, id=f"{declared.target}-{i}")
    for declared in plugin.HOOKS
    # those on the parser have tests below; the launch is hooked for a kvarn cache only
    if declared.target != "server_args.ServerArgs.add_cli_args" and declared.where != "launch"
    for i, call in enumerate(STOCK[name_of(declared)])
]


@pytest.mark.parametrize(("declared", "args", "kwargs"), CALLS)
def test_a_hook_passes_arguments_and_result_of_a_stock_server_on(declared, args, kwargs, caplog, monkeypatch):
    caplog.set_level("DEBUG")
    # as on a machine with a GPU; on a CPU the platform that comes with the plugin has defaults of its own
    monkeypatch.setattr("sglang_kvarn.cpu.platform._has_accelerator", lambda: True)
    for module in ("pool", "backend", "host_pool", "mixed_pool", "mixed_backend", "mixed_sizes"):
        monkeypatch.setitem(sys.modules, f"sglang_kvarn.{module}", None)
        monkeypatch.delattr(sglang_kvarn, module, raising=False)
    before = [copy.copy(vars(x)) for x in args if isinstance(x, SimpleNamespace)]
    result, calls = object(), []

    def original(*args, **kwargs):
        calls.append((args, kwargs))
        return result

    hooked = compat.resolve("sglang.srt.plugins.hook_registry._wrap_fn")(
        original, declared.function, compat.HookType(declared.kind)
    )
    assert hooked(*args, **kwargs) is result
    ((passed, named),) = calls
    assert len(passed) == len(args) and all(x is y for x, y in zip(passed, args, strict=True))
    assert named.keys() == kwargs.keys() and all(named[key] is value for key, value in kwargs.items())
    assert [vars(x) for x in args if isinstance(x, SimpleNamespace)] == before and not caplog.records


def test_the_presets_are_all_that_the_command_line_gains():
    parser, plain = argparse.ArgumentParser(), argparse.ArgumentParser()
    for made in (parser, plain):
        made.add_argument("--kv-cache-dtype", choices=["auto", "fp8_e4m3"], default="auto", help="Format.")
        made.add_argument("--page-size", type=int)
    (declared,) = [h for h in plugin.HOOKS if name_of(h) == "settings.add_choices"]
    assert declared.function(None, parser) is None
    for line in ([], ["--kv-cache-dtype", "fp8_e4m3", "--page-size", "1"]):
        assert parser.parse_args(line) == plain.parse_args(line)


def test_the_launch_of_a_stock_server_is_not_hooked(monkeypatch):
    registered = []
    monkeypatch.setattr(hook, "_registered", [])
    monkeypatch.setattr(hook, "register", registered.extend)
    plugin.register_all()
    plugin._resolve(SimpleNamespace(**SERVER_ARGS))
    assert registered and all(h.where == "arguments" for h in registered)


def test_an_error_of_a_stock_command_is_shown_as_before(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(sys, "excepthook", lambda *error: shown.append(error))
    (declared,) = [h for h in plugin.HOOKS if name_of(h) == "refused.print_sentence"]
    assert declared.function(None, argparse.ArgumentParser()) is None
    error = (ValueError, ValueError("no refusal"), None)
    sys.excepthook(*error)
    assert shown == [error] and capsys.readouterr().err == ""
