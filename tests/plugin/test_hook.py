# SPDX-License-Identifier: Apache-2.0
"""The contract with the installed SGLang: every hook fits, is in place, and its absence is loud."""

from __future__ import annotations

import functools
import inspect

import pytest
from sglang_kvarn import compat, hook, plugin

ALLOC = "sglang.srt.mem_cache.memory_pool.ReqToTokenPool.alloc"


def test_hooks_fit_the_installed_sglang():
    compat.check_version()
    assert hook.signature_problems() == []


def unwrapped(path):
    """Return SGLang's own function behind all wrappers."""
    return inspect.unwrap(compat.resolve(path))


@pytest.mark.parametrize("declared", plugin.HOOKS, ids=lambda h: h.target)
def test_hooks_are_applied_once(declared):
    registered = [function for _, function, _ in compat.HookRegistry._hooks[declared.path]]
    assert registered.count(declared.function) == 1
    assert hook.is_applied(declared)


def test_verify_hooks_names_a_hook_that_is_not_in_place(monkeypatch):
    owner = compat.resolve(ALLOC.rpartition(".")[0])
    hook.verify_hooks()
    monkeypatch.setattr(owner, "alloc", unwrapped(ALLOC))
    with pytest.raises(RuntimeError, match=rf"missing: {ALLOC}\."):
        hook.verify_hooks()


def test_verify_hooks_is_not_satisfied_by_the_wrapper_of_another_plugin(monkeypatch):
    owner, own = compat.resolve(ALLOC.rpartition(".")[0]), unwrapped(ALLOC)

    @functools.wraps(own)
    def foreign(*args, **kwargs):
        return own(*args, **kwargs)

    monkeypatch.setattr(owner, "alloc", foreign)
    with pytest.raises(RuntimeError, match="missing"):
        hook.verify_hooks()


def test_pool_and_backend_refuse_to_exist_without_a_hook(monkeypatch):
    from sglang_kvarn.backend import KVarNAttentionBackend
    from sglang_kvarn.pool import KVarNTokenToKVPool

    monkeypatch.setattr(compat.resolve(ALLOC.rpartition(".")[0]), "alloc", unwrapped(ALLOC))
    with pytest.raises(RuntimeError, match="not in place in this process"):
        KVarNTokenToKVPool(128, None, [0], config=None, rows=1, device="cpu")
    with pytest.raises(RuntimeError, match="not in place in this process"):
        KVarNAttentionBackend(model_runner=None)


def test_register_all_refuses_an_untested_sglang(monkeypatch):
    monkeypatch.setattr(hook, "_registered", [])
    monkeypatch.setattr(compat, "version", lambda: "0.4.9")
    with pytest.raises(RuntimeError, match=r"tested with SGLang 0\.5\.16, .* and found 0\.4\.9: pip install"):
        plugin.register_all()
    assert hook._registered == []


@pytest.mark.parametrize(
    ("where", "register"), [("arguments", plugin.register_all), ("scheduler", plugin.register_rest)]
)
def test_nothing_is_registered_when_a_signature_does_not_fit(monkeypatch, where, register):
    moved = hook.Hook("server_args.ServerArgs.gone", "after", ("self",), print, why="", where=where)
    renamed = hook.Hook("server_args.ServerArgs.check_server_args", "after", ("args",), print, why="", where=where)
    monkeypatch.setattr(hook, "_registered", [])
    monkeypatch.setattr(hook, "_declared", (*plugin.HOOKS, moved, renamed))
    registered = []
    monkeypatch.setattr(compat.HookRegistry, "register", lambda *args: registered.append(args))
    with pytest.raises(RuntimeError, match=r"gone is missing.*check_server_args has no parameter args"):
        register()
    assert registered == [] and hook._registered == []


def test_register_twice_changes_nothing():
    before = list(hook._registered)
    plugin.register_all()
    plugin.register_rest()
    assert hook._registered == before and len(before) == len(plugin.HOOKS)


@pytest.mark.parametrize("is_first", [True, False], ids=["first process", "scheduler"])
def test_register_all_leaves_out_what_the_process_does_not_need(monkeypatch, is_first):
    monkeypatch.setattr(hook, "_registered", [])
    monkeypatch.setattr(hook.multiprocessing, "parent_process", lambda: None if is_first else object())
    registered = []
    monkeypatch.setattr(compat.HookRegistry, "register", lambda path, *args: registered.append(path))
    plugin.register_all()
    wanted = ["arguments"] if is_first else ["arguments", "scheduler"]
    assert registered == [h.path for h in plugin.HOOKS if h.where in wanted]
    monkeypatch.setattr(compat.HookRegistry, "apply_hooks", lambda: registered.append("applied"))
    plugin.register_rest()
    if is_first:
        assert registered.pop() == "applied" and sorted(registered) == sorted(h.path for h in plugin.HOOKS)
    else:
        assert registered == [h.path for h in plugin.HOOKS if h.where in wanted]
