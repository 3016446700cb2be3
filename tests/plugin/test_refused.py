# SPDX-License-Identifier: Apache-2.0
"""A refusal is a ValueError for a caller, the last line of a command, and leaves a scheduler by the pipe."""

from __future__ import annotations

import multiprocessing
import sys
import time
from types import SimpleNamespace

import pytest
from sglang_kvarn import compat, refused
from sglang_kvarn.refused import Refused


@pytest.fixture(autouse=True)
def hook(monkeypatch):
    """Note what the excepthook of the program gets, and put it back."""
    seen: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, traceback: seen.append(error))
    return seen


def test_a_command_prints_the_sentence_alone_and_leaves_other_errors_alone(hook, capsys):
    for _ in range(2):
        refused.print_sentence(None, None)
    sys.excepthook(Refused, Refused("no: drop it"), None)
    assert capsys.readouterr().err == "no: drop it\n" and hook == []
    other = ValueError("other")
    sys.excepthook(ValueError, other, None)
    assert hook == [other] and capsys.readouterr().err == ""
    # once, however often a parser is made
    assert not hasattr(sys.excepthook.args[0], "func")


def test_parsing_a_command_line_makes_the_process_a_command(model_dir):
    before = sys.excepthook
    arguments = ["--model-path", model_dir(), "--kv-cache-dtype", "kvarn"]
    compat.resolve("sglang.srt.server_args.prepare_server_args")(arguments)
    assert sys.excepthook.func is refused._print_sentence and sys.excepthook.args == (before,)


def test_a_caller_of_the_library_gets_a_value_error_and_keeps_its_excepthook(server_args, model_dir):
    before = sys.excepthook
    with pytest.raises(ValueError, match="drop --page-size"):
        server_args(model_path=model_dir(), kv_cache_dtype="kvarn", page_size=64)
    assert sys.excepthook is before


def run_scheduler_process(server_args, pipe_writer, outcome):
    """Stand for SGLang's function: the constructor is hooked, and any Exception is answered by SIGQUIT."""

    def construct():
        if outcome is not None:
            raise outcome

    try:
        refused.leave_scheduler(construct)
        pipe_writer.send({"status": "ready"})
    except Exception as error:
        pipe_writer.send({"status": "SIGQUIT", "error": str(error)})


def launch(outcome, preset="kvarn", dp_size=1, attn_dp_size=1, start=lambda: None):
    """Start a stand-in for a scheduler in this process, as SGLang's Engine does.

    Returns:
        What its ``_launch_scheduler_processes`` returns: a result with `wait_for_ready`, the processes.
    """
    reader, writer = multiprocessing.Pipe(duplex=False)
    processes = [Process()]

    def launch_scheduler_processes(cls, server_args, port_args, run_scheduler_process_func):
        run_scheduler_process_func(server_args, writer, outcome)
        start()
        infos = []

        def wait_for_ready():
            infos.extend(refused.raise_refusal(wait, [reader], processes))

        return SimpleNamespace(wait_for_ready=wait_for_ready, scheduler_infos=infos), processes

    args = SimpleNamespace(kv_cache_dtype=preset, dp_size=dp_size, attn_dp_size=attn_dp_size)
    return refused.launch_schedulers(launch_scheduler_processes, object, args, None, run_scheduler_process)


@pytest.fixture
def resolved(monkeypatch):
    monkeypatch.setattr(compat, "resolved_arguments", lambda args: args)


def wait(readers, processes):
    """Stand for SGLang's ``_wait_for_scheduler_ready``."""
    infos = []
    for reader in readers:
        assert reader.poll(timeout=5.0)
        infos.append(reader.recv())
        if infos[-1]["status"] != "ready":
            raise RuntimeError("Initialization failed. Please see the error messages above.")
    return infos


class Process:
    """A process that takes note of what is done to it."""

    def __init__(self):
        self.calls = []

    def join(self, timeout):
        self.calls.append("join")

    def kill(self):
        self.calls.append("kill")


def test_what_a_scheduler_refuses_is_raised_where_it_was_started(resolved):
    launched, (process,) = launch(Refused("too small: raise it"))
    with pytest.raises(Refused, match=r"^too small: raise it$"):
        launched.wait_for_ready()
    # no scheduler is left to print after the sentence
    assert process.calls == ["join", "kill"]


def test_a_scheduler_that_starts_or_fails_otherwise_is_left_to_sglang(resolved):
    launched, (process,) = launch(None)
    launched.wait_for_ready()
    assert launched.scheduler_infos == [{"status": "ready"}] and process.calls == []
    launched, (process,) = launch(ValueError("other"))
    with pytest.raises(RuntimeError, match="Initialization failed"):
        launched.wait_for_ready()
    assert process.calls == []


def test_a_launch_that_is_refused_leaves_its_processes_dead_and_others_alive(resolved):
    context = multiprocessing.get_context("fork")
    other, started = (context.Process(target=time.sleep, args=(600,)) for _ in range(2))
    other.start()
    try:
        launched, _ = launch(Refused("too small"), start=started.start)
        with pytest.raises(Refused, match="too small"):
            launched.wait_for_ready()
        assert other.is_alive() and not started.is_alive()
    finally:
        for process in (other, started):
            process.kill()
            process.join()


@pytest.mark.parametrize(("preset", "dp_size", "attn_dp_size"), [("auto", 1, 1), ("kvarn", 2, 1), ("kvarn", 1, 2)])
def test_without_a_reader_of_refusals_the_scheduler_ends_with_its_sentence(
    resolved, monkeypatch, preset, dp_size, attn_dp_size
):
    monkeypatch.setattr(compat, "has_argument", lambda name: True)
    with pytest.raises(SystemExit) as stop:
        launch(Refused("too small"), preset, dp_size, attn_dp_size)
    # multiprocessing prints a code that is a text, and exits with 1
    assert stop.value.code == "too small"
