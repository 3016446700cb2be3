# SPDX-License-Identifier: Apache-2.0
"""Hooks into SGLang: what one is, handing them over, and the proof that they are in place. Which ones: `plugin`."""

from __future__ import annotations

import inspect
import multiprocessing
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from sglang_kvarn import compat


@dataclass(frozen=True)
class Hook:
    """Describe one hook.

    Attributes:
        target: dotted path of the function below ``sglang.srt``.
        kind: "before", "after" or "around", as SGLang's HookRegistry defines them.
        parameters: names that the function must have, because the hook reads them or passes them on.
        function: the hook.
        why: what SGLang would do without it, one sentence.
        replaced_by: what makes it needless in an SGLang with the registry of ``patches``; None if nothing does.
        where: "arguments" where they are parsed and resolved, "launch" in the process that starts the schedulers,
            "scheduler" in a scheduler.
        since: the first version of SGLang that it is for.
    """

    target: str
    kind: str
    parameters: tuple[str, ...]
    function: Callable[..., Any]
    why: str
    replaced_by: str | None = None
    where: str = "scheduler"
    since: str = "0"

    @property
    def path(self) -> str:
        """The target as an absolute dotted path."""
        return f"sglang.srt.{self.target}"


# the hooks of this package; what of them was handed to SGLang in this process (whether that worked tells `is_applied`)
_declared: tuple[Hook, ...] = ()
_registered: list[Hook] = []


def declare(hooks: Iterable[Hook]) -> None:
    """Say which hooks there are: `needed_hooks`, `missing_hooks` and `verify_hooks` are about them."""
    global _declared
    _declared = tuple(hooks)


def signature_problems(hooks: Iterable[Hook] | None = None) -> list[str]:
    """Return one sentence per hook, of all by default, that does not fit the installed SGLang; empty if all fit."""
    problems = []
    for hook in _declared if hooks is None else hooks:
        try:
            names = inspect.signature(compat.resolve(hook.path)).parameters
        except (ImportError, AttributeError) as error:
            problems.append(f"{hook.path} is missing ({error})")
            continue
        missing = [p for p in hook.parameters if p not in names]
        if missing:
            problems.append(f"{hook.path} has no parameter {', '.join(missing)}, only {', '.join(names)}")
    return problems


def is_first_process() -> bool:
    """Whether this process is the first one of a program, not one that SGLang started."""
    return multiprocessing.parent_process() is None


def needed_hooks() -> tuple[Hook, ...]:
    """Return the hooks that this process needs to serve a kvarn cache; the first process of a program needs all."""
    return _declared if is_first_process() else tuple(h for h in _declared if h.where != "launch")


def registered_hooks() -> tuple[Hook, ...]:
    """Return what was handed to SGLang in this process."""
    return tuple(_registered)


def check_signatures(hooks: Iterable[Hook]) -> None:
    """Refuse hooks that do not fit the installed SGLang.

    Raises:
        RuntimeError: names what does not fit, and the versions that would.
    """
    problems = signature_problems(hooks)
    if problems:
        raise RuntimeError(
            f"sglang-kvarn does not fit SGLang {compat.version()}: {'; '.join(problems)}. "
            f"Install one of {', '.join(compat.TESTED_VERSIONS)}"
        )


def register(hooks: Iterable[Hook]) -> None:
    """Hand hooks to SGLang, which applies them once all plugins are loaded."""
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
