# SPDX-License-Identifier: Apache-2.0
"""bench_generation: its prompts hold their answers, its scores count what they say, its processes report."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.common import launch, rows
from benchmarks.generation import bench_generation, chats, report, runs, tasks
from benchmarks.generation.scoring import Answer, summarise

ROOT = Path(__file__).parents[2]


def encode(text: str) -> list[int]:
    """Stand in for a tokenizer: one token a character."""
    return [ord(character) for character in text]


def text(task: tasks.Task) -> str:
    return "".join(map(chr, task.prompt))


def draw() -> random.Random:
    return random.Random(0)


def answer(**changes: object) -> Answer:
    return replace(Answer("needle", "greedy", "4831", [1, 2, 3], " 4831.", 500, 0), **changes)


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_stands_at_its_depth_in_a_prompt_of_the_length_asked_for(depth):
    task = tasks.needle(encode, 3000, depth, draw())
    assert task.expected is not None
    # a sentence of filler has up to 80 characters
    assert 2900 < len(task.prompt) <= 3000
    place = text(task).index(f" is {task.expected}.")
    assert place == pytest.approx(depth * 3000, abs=200)
    assert text(task).count(task.expected) == 1 and text(task).endswith(" is")


def test_table_asks_for_an_entry_that_no_exact_window_reaches():
    task = tasks.table(encode, 40, draw())
    lines = text(task).splitlines()
    asked = lines[-1]
    found = [n for n, line in enumerate(lines[:40]) if line == f"{asked} {task.expected}"]
    assert len(found) == 1 and found[0] < 20


@pytest.mark.parametrize("addend", [1, 10])
def test_sum_is_right_and_not_among_its_examples(addend):
    task = tasks.sums(encode, addend, 50, draw())
    *examples, question = text(task).splitlines()
    assert len(examples) == 50 and all(eval(line.replace("=", "==")) for line in examples)
    assert eval(question.rstrip(" =")) == int(task.expected)
    assert not any(line.startswith(question) for line in examples)


@pytest.mark.parametrize(
    "name, expected",
    [("first", "apple"), ("last", "hill"), ("copy", "apple, wolf, hill"), ("animal", "wolf")],
)
def test_instruction_has_the_answer_of_its_rule(name, expected):
    assert tasks.RULES[name][1](["apple", "wolf", "hill"]) == expected
    task = tasks.instruction(encode, name, 30, draw())
    *_, last, _ = text(task).splitlines()
    assert tasks.RULES[name][1](last.removeprefix("List: ").split(", ")) == task.expected


def test_conversation_keeps_every_turn_and_asks_what_was_said():
    turns = chats.conversation(encode, 4, 600, draw())
    for before, task in zip([None, *turns], turns, strict=False):
        question = text(task).splitlines()[-1]
        assert f" {question} {task.expected}." in text(task)
        assert before is None or text(task).startswith(f"{text(before)} {before.expected}.")


def test_prompts_depend_on_the_seed_and_on_no_other_option():
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": encode(text)}

    def prompts(seed: int, needle_tokens: list[int]) -> list[tasks.Task]:
        args = SimpleNamespace(
            seed=seed, needle_tokens=needle_tokens, depths=[0.5], needles=1, prompts_per_task=2, go_on=0
        )
        return bench_generation.make_tasks(args, tokenizer)

    one, same, other = prompts(0, [2000]), prompts(0, [1000, 2000]), prompts(1, [2000])
    assert one == same[1:] and not set(map(text, one)) & set(map(text, other))
    # no prompt without tokens, which would end the engine
    assert all(map(text, one))


@pytest.mark.parametrize(
    "got, correct",
    [(" 4831.", True), (" 4831\n12: 99", True), (" 48311", False), (" 4830.", False), ("", False)],
)
def test_answer_is_correct_only_to_the_letter(got, correct):
    assert answer(text=got).correct is correct


def test_summary_counts_right_answers_and_equal_leading_tokens():
    base = [answer(), answer(text=" 17."), answer(mode="sampled", text=" 17.")]
    own = [answer(text=" 17.", ids=[1, 9, 3]), answer(), answer(mode="sampled")]
    found = {(row["mode"], row["quantity"]): (row["value"], row["of"]) for row in summarise(own, base)}
    assert found == {("greedy", "correct"): (1, 2), ("greedy", "agreement"): (2.0, 3.0), ("sampled", "correct"): (1, 1)}


def test_summary_compares_hit_and_miss_of_one_cache():
    base = [answer(mode="hit"), answer(mode="miss")]
    own = [answer(mode="hit", ids=[1, 2, 9], cached_tokens=384), answer(mode="miss", ids=[1, 5, 9], text=" 7.")]
    found = {(row["mode"], row["quantity"]): row for row in summarise(own, base)}
    assert found["hit", "agreement of hit and miss"]["value"] == 1
    assert found["hit", "agreement"]["value"] == 2 and found["miss", "agreement"]["value"] == 1
    assert found["hit", "correct"]["value"] == 1 and found["miss", "correct"]["value"] == 0
    assert found["hit", "correct"]["cached_tokens"] == 384


def test_summary_tells_needles_apart_by_depth_over_all_lengths():
    texts = {0.1: " 4831.", 0.9: " 17."}
    own = [answer(section=f"needle {n}", depth=depth, text=texts[depth]) for n in (1, 2) for depth in texts]
    found = {row["quantity"]: (row["value"], row["of"]) for row in summarise(own, own) if "depth" in row["quantity"]}
    assert found == {"correct at depth 0.1": (2, 2), "correct at depth 0.9": (0, 2)}


def test_report_adds_up_the_right_answers_of_a_mode(capsys):
    base = [answer(), answer(section="table", prompt_tokens=300), answer(mode="sampled", text=" 17.")]
    own = [answer(text=" 17."), answer(section="table", prompt_tokens=300), answer(mode="sampled")]
    records = [{"cache": "bf16"} | row for row in summarise(base, base)]
    records += [{"cache": "kvarn"} | row for row in summarise(own, base)]
    found = [
        (*(row[key] for key in ("cache", "mode", "value", "of", "prompt_tokens")),) for row in report.totals(records)
    ]
    assert found == [
        *(("bf16", "greedy", 2, 2, 400), ("bf16", "sampled", 0, 1, 500)),
        *(("kvarn", "greedy", 1, 2, 400), ("kvarn", "sampled", 1, 1, 500)),
    ]
    report.show(records, "title")
    (line,) = (x for x in capsys.readouterr().out.splitlines() if "all of these" in x and "greedy" in x)
    assert line.index("2 of 2") < line.index("1 of 2")


class FakeEngine:
    """Answer each prompt with its length and the number of flushes so far; keep prompts until a flush."""

    def __init__(self) -> None:
        self.flushes, self.seen = 0, set[tuple[int, ...]]()

    def flush_cache(self) -> SimpleNamespace:
        self.flushes += 1
        self.seen.clear()
        return SimpleNamespace(success=True)

    def generate(self, input_ids: list[list[int]], sampling_params: list[dict]) -> list[dict]:
        outputs = []
        for ids in input_ids:
            cached = max((len(old) for old in self.seen if tuple(ids[: len(old)]) == old), default=0)
            meta = {"prompt_tokens": len(ids), "cached_tokens": cached}
            outputs.append({"output_ids": [len(ids), self.flushes], "meta_info": meta})
        self.seen.update(map(tuple, input_ids))
        return outputs


def test_conversations_hit_and_then_miss_with_the_same_prompts():
    conversation = [tasks.Task("turns", [1, 2], "3", 4), tasks.Task("turns", [1, 2, 3, 4], "5", 4)]
    tokenizer = SimpleNamespace(decode=str)
    answers = runs.hold_conversations(FakeEngine(), tokenizer, [conversation])
    assert [(a.mode, a.prompt_tokens, a.cached_tokens) for a in answers] == [
        *(("hit", 2, 0), ("hit", 4, 2)),
        *(("miss", 2, 0), ("miss", 4, 0)),
    ]


def test_greedy_answers_find_nothing_in_the_cache_and_samples_their_prompt():
    known = [tasks.Task("known", [1, 2], "3", 4), tasks.Task("known", [5, 6, 7], "3", 4)]
    answers = runs.answer_tasks(
        FakeEngine(), SimpleNamespace(decode=str), [*known, tasks.Task("open", [1, 2], None, 4)], 2, 0.7
    )
    found = [(a.section, a.mode, a.cached_tokens) for a in answers]
    samples = [("known", "sampled", 2), ("known", "sampled", 3)]
    assert found == [("known", "greedy", 0)] * 2 + samples * 2 + [("open", "greedy", 0)]


SCRIPT = """
import sys, time
from benchmarks.common import launch
if sys.argv[2] == "bf16":
    launch.report_progress("half")
    time.sleep(1)
    launch.report_result({"cache": sys.argv[2]})
elif sys.argv[2] == "kvarn":
    time.sleep(60)
else:
    raise SystemExit("no such engine")
"""


@pytest.fixture
def modules(tmp_path, monkeypatch) -> Path:
    """Return a folder from which child processes import, beside the benchmarks."""
    found = [str(tmp_path), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(found))
    return tmp_path


def test_engine_process_reports_fails_and_is_ended(modules, monkeypatch, capsys):
    (modules / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", ["script.py"])
    steps: list[str] = []
    assert launch.run_alone("script", "bf16", 60, steps.append) == {"cache": "bf16"}
    assert "half" in steps
    assert launch.run_alone("script", "fp8_e4m3", 60) is None
    assert "no such engine" in capsys.readouterr().err
    assert launch.run_alone("script", "kvarn", 2) is None


def test_run_alone_ends_the_engine_when_it_is_ended_itself(modules):
    pid = modules / "pid"
    (modules / "script.py").write_text(
        "import os, sys, time\nfrom benchmarks.common import launch\n"
        f"if '--one' in sys.argv: open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(60)\n"
        "launch.run_alone('script', 'kvarn', 60)\n"
    )
    process = subprocess.Popen([sys.executable, "-m", "script"])
    try:
        deadline = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid.read_text()), 0)
    finally:
        process.kill()


def measure_with(results: dict[str, list[Answer] | None], tmp_path: Path, monkeypatch) -> tuple[int, list[dict]]:
    """Return the exit status and the rows of a run whose engines give these answers."""
    target = tmp_path / "rows.csv"

    def run_alone(module: str, cache: str, timeout: float, show: object) -> dict | None:
        own = results[cache]
        return own and {"answers": [asdict(x) for x in own], "seconds": 1.0}

    monkeypatch.setattr(launch, "run_alone", run_alone)
    status = bench_generation.main(["--caches", *results, "--output", str(target)])
    return status, rows.read(target, "generation")


def test_run_writes_a_row_per_cache_and_quantity(tmp_path, monkeypatch):
    results = {"bf16": [answer()], "kvarn": [answer(ids=[1, 9], text=" 17.")]}
    status, read = measure_with(results, tmp_path, monkeypatch)
    found = [(r["provider"], r["metric"], r["value"], r["settings"]["of"], r["unit"]) for r in read]
    assert status == 0 and found == [
        *(("bf16", "correct", "1", "1", "answers"), ("bf16", "agreement", "3.0", "3.0", "tokens")),
        *(("kvarn", "correct", "0", "1", "answers"), ("kvarn", "agreement", "1.0", "3.0", "tokens")),
    ]


def test_run_fails_without_a_cache_and_ends_without_the_first(tmp_path, monkeypatch):
    status, read = measure_with({"bf16": [answer()], "kvarn": None}, tmp_path, monkeypatch)
    assert status == 1 and {row["provider"] for row in read} == {"bf16"}
    with pytest.raises(SystemExit, match="expected answers of bf16, the first cache"):
        measure_with({"bf16": None, "kvarn": [answer()]}, tmp_path, monkeypatch)


def test_bf16_cache_is_16_bit_beside_a_float32_model():
    args = SimpleNamespace(dtype="float32", seed=0, one="bf16", mem_fraction_static=0.8, bf16_backend=None)
    assert runs.engine_arguments(args, "model")["kv_cache_dtype"] == "bf16"
    args.one = "kvarn"
    assert runs.engine_arguments(args, "model")["kv_cache_dtype"] == "kvarn"
