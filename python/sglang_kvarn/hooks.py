# SPDX-License-Identifier: Apache-2.0
"""The table of hooks into SGLang, their registration, and the proof that they are in place."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang_kvarn import balanced_layers, budget, compat, refusals, refused, report, settings, tail


@dataclass(frozen=True)
class Hook:
    """Describe one hook.

    Attributes:
        target: dotted path of the function below ``sglang.srt``.
        kind: "before", "after" or "around", as SGLang's HookRegistry defines them.
        parameters: names that the function must have, because the hook reads them or passes them on.
        function: the hook.
        where: "arguments" where they are parsed and resolved, "launch" in the process that starts the schedulers,
            "scheduler" in a scheduler.
    """

    target: str
    kind: str
    parameters: tuple[str, ...]
    function: Callable[..., Any]
    where: str = "scheduler"

    @property
    def path(self) -> str:
        """The target as an absolute dotted path."""
        return f"sglang.srt.{self.target}"


def _build_pool(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # the pool subclasses SGLang's, so its module is imported once SGLang builds a pool, not when plugins load
    from sglang_kvarn import pool

    return pool.build(original, *args, **kwargs)


def _resolve(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Refuse what was typed before SGLang can advise otherwise, and fill what was left open."""
    settings.apply_defaults(server_args)
    refusals.check_typed(server_args)
    if settings.preset_of(server_args) is not None:
        register_rest()


def _refuse(result: Any, server_args: Any) -> None:
    if settings.preset_of(server_args) is not None:
        verify_hooks()
    refusals.check_arguments(compat.resolved_arguments(server_args))


_CONFIGURATOR = "mem_cache.kv_cache_configurator.KVCacheConfigurator"
_DTYPE_PARAMETERS = ("server_args_kv_cache_dtype", "model_dtype", "is_draft_worker")
_WAIT_PARAMETERS = ("scheduler_pipe_readers", "scheduler_procs")
_POOL_PARAMETERS = ("self", "sizes", "req_to_token_pool")
# what reads or writes the weights of a running server, by its one parameter
_SOURCES = ("disk", "distributed", "tensor", "ipc")
_WEIGHTS = "managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_WEIGHT_METHODS = {
    **dict.fromkeys([f"{_WEIGHTS}.update_weights_from_{source}" for source in _SOURCES], "recv_req"),
    **dict.fromkeys([f"{_WEIGHTS}.{name}" for name in ("get_weights_by_name", "check_weights")], "recv_req"),
    **dict.fromkeys([f"{_WEIGHTS}.save_{kind}_model" for kind in ("remote", "sharded")], "params"),
    "managers.scheduler.Scheduler.send_weights_to_remote_instance": "recv_req",
}

HOOKS = (
    Hook("server_args.ServerArgs.add_cli_args", "after", ("parser",), settings.add_choices, "arguments"),
    Hook("server_args.ServerArgs.add_cli_args", "after", ("parser",), refused.print_sentence, "arguments"),
    Hook(compat.resolution_target(), "before", ("self",), _resolve, "arguments"),
    Hook("server_args.ServerArgs.check_server_args", "after", ("self",), _refuse, "arguments"),
    Hook(
        "entrypoints.engine.Engine._launch_scheduler_processes",
        "around",
        ("server_args", "port_args", "run_scheduler_process_func"),
        refused.launch_schedulers,
        "launch",
    ),
    Hook("entrypoints.engine._wait_for_scheduler_ready", "around", _WAIT_PARAMETERS, refused.raise_refusal, "launch"),
    Hook("managers.scheduler.Scheduler.__init__", "around", ("self", "server_args"), refused.leave_scheduler),
    Hook("mem_cache.kv_cache_dtype.configure_kv_cache_dtype", "around", _DTYPE_PARAMETERS, settings.cache_dtype),
    Hook(
        "model_executor.pool_configurator.DefaultPoolConfigurator._compute_cell_size",
        "around",
        ("self", "kvc", "num_layers"),
        budget.cell_size,
    ),
    Hook(
        f"{_CONFIGURATOR}._profile_available_bytes",
        "after",
        ("self", "pre_model_load_memory"),
        budget.charge_fixed_bytes,
    ),
    Hook(f"{_CONFIGURATOR}.resolve_max_num_reqs", "after", ("self", "token_capacity"), budget.cap_rows),
    Hook(f"{_CONFIGURATOR}._build_token_to_kv_pool", "around", _POOL_PARAMETERS, _build_pool),
    Hook(
        "managers.scheduler.Scheduler.get_internal_state",
        "after",
        ("self", "recv_req"),
        report.add_to_server_info,
    ),
    Hook("mem_cache.memory_pool.ReqToTokenPool.alloc", "around", ("self", "reqs"), tail.record_exact_starts),
    *(
        Hook(target, "around", ("self", parameter), balanced_layers.with_plain_weights)
        for target, parameter in _WEIGHT_METHODS.items()
    ),
)

# what was handed to SGLang in this process; the proof that it was applied is `is_applied`
_registered: list[Hook] = []


def signature_problems(hooks: Iterable[Hook] | None = None) -> list[str]:
    """Return one sentence per hook, of all by default, that does not fit the installed SGLang; empty if all fit."""
    problems = []
    for hook in HOOKS if hooks is None else hooks:
        try:
            names = inspect.signature(compat.resolve(hook.path)).parameters
        except (ImportError, AttributeError) as error:
            problems.append(f"{hook.path} is missing ({error})")
            continue
        missing = [p for p in hook.parameters if p not in names]
        if missing:
            problems.append(f"{hook.path} has no parameter {', '.join(missing)}, only {', '.join(names)}")
    return problems


def needed_hooks() -> tuple[Hook, ...]:
    """Return the hooks that this process needs to serve a kvarn cache; the first process of a program needs all."""
    return HOOKS if multiprocessing.parent_process() is None else tuple(h for h in HOOKS if h.where != "launch")


def register_all() -> None:
    """Check version and signatures, then hand attention backend and hooks to SGLang.

    A process that another one started gets every hook it needs. The first process of a program gets those of the
    arguments: the others take seconds to import, which a command with an argument that is refused need not wait for.
    They follow with `register_rest`.

    Raises:
        RuntimeError: nothing was registered; the message names what does not fit.
    """
    if _registered:
        return
    compat.check_version()
    first = multiprocessing.parent_process() is None
    chosen = [hook for hook in needed_hooks() if hook.where == "arguments" or not first]
    _check_signatures(chosen)
    compat.add_attention_backend_choices([settings.ATTENTION_BACKEND])
    compat.register_attention_backend(settings.ATTENTION_BACKEND)(_create_backend)
    _register(chosen)


def register_rest() -> None:
    """Put the hooks in place that `register_all` left out; does nothing where they are.

    Raises:
        RuntimeError: none of them was registered; the message names what does not fit.
    """
    rest = [hook for hook in needed_hooks() if hook not in _registered]
    if rest:
        _check_signatures(rest)
        _register(rest)
        compat.HookRegistry.apply_hooks()


def _check_signatures(hooks: list[Hook]) -> None:
    problems = signature_problems(hooks)
    if problems:
        raise RuntimeError(
            f"sglang-kvarn does not fit SGLang {compat.version()}: {'; '.join(problems)}. "
            f"Install one of {', '.join(compat.TESTED_VERSIONS)}"
        )


def _register(hooks: list[Hook]) -> None:
    for hook in hooks:
        compat.HookRegistry.register(hook.path, hook.function, compat.HookType(hook.kind))
        _registered.append(hook)


def is_applied(hook: Hook) -> bool:
    """Whether calling the target in this process calls the hook: some wrapper around the target holds it.

    Other plugins may wrap the same function, so it is not enough that the target was replaced.
    """
    function = compat.resolve(hook.path)
    while function is not None:
        if any(cell.cell_contents is hook.function for cell in getattr(function, "__closure__", None) or ()):
            return True
        function = getattr(function, "__wrapped__", None)
    return False


def missing_hooks() -> list[str]:
    """Return the paths of the hooks that this process needs and that are not in place."""
    return [hook.path for hook in needed_hooks() if not is_applied(hook)]


def verify_hooks() -> None:
    """Refuse to run with only some hooks in place: SGLang logs a hook that it fails to apply and goes on.

    Raises:
        RuntimeError: names the missing hooks.
    """
    missing = missing_hooks()
    if missing:
        raise RuntimeError(
            f"sglang-kvarn is not in place in this process, these hooks are missing: {', '.join(missing)}. "
            "Call sglang.srt.plugins.load_plugins() first, see the log above and `python -m sglang_kvarn`"
        )


def _create_backend(model_runner: Any) -> Any:
    from sglang_kvarn.backend import KVarNAttentionBackend

    return KVarNAttentionBackend(model_runner)
