# SPDX-License-Identifier: Apache-2.0
"""bench_answers: files of questions, prompts, what counts as right, and caches compared question by question."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import pytest

from benchmarks.common import launch, paired, rows
from benchmarks.generation import bench_answers, questions
from benchmarks.generation.questions import Question

GSM8K = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5 apples.\n#### 1,205"}
AIME = {"ID": "2024-I-1", "Problem": "Find x.", "Solution": "x = 204", "Answer": 204}


@pytest.fixture
def file(tmp_path):
    """Return a function that writes lines to a file of questions."""

    def write(*lines: dict) -> str:
        path = tmp_path / "questions.jsonl"
        path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        return path

    return write


def test_files_of_gsm8k_and_aime_are_read_as_they_are_published(file):
    found = questions.load(file(GSM8K, AIME))
    assert found == [Question("How many?", GSM8K["answer"]), Question("Find x.", "204")]
    assert questions.load(file(GSM8K, AIME), limit=1) == found[:1]


def test_a_file_without_answers_or_lines_is_refused_by_a_sentence(file):
    with pytest.raises(ValueError, match=r"expected question or problem .* in line 2 of .*, got question, solution"):
        questions.load(file(GSM8K, {"question": "Why?", "solution": "So."}))
    with pytest.raises(ValueError, match="got an empty file"):
        questions.load(file())
    with pytest.raises(SystemExit, match="No such file"):
        bench_answers.main(["missing.jsonl"])


@pytest.mark.parametrize(
    "text, expected, right",
    [
        ("So there are 1205 apples.\nAnswer: 1,205", GSM8K["answer"], True),
        ("Answer: $1,205.00 in all, of 17", GSM8K["answer"], True),
        (r"Hence \boxed{204}.", "204", True),
        ("I see 7, then 204.", "204", True),
        ("<think>Answer: 204</think>It is 17.", "204", False),
        ("Answer: 5", "204", False),
        ("Answer: none", "204", False),
        ("-204", "204", False),
    ],
)
def test_numbers_count_by_their_value_behind_the_last_mark(text, expected, right):
    assert questions.matcher(questions.NUMERIC)(text, expected) is right


@pytest.mark.parametrize(
    "text, right",
    [
        ("It is known.\nAnswer: Paris.\nQuestion:", True),
        ("Thinking\nParis", True),
        (r"\boxed{Paris}", True),
        ("Answer: paris", False),
        ("Answer: Paris or Rome", False),
        ("", False),
    ],
)
def test_words_count_to_the_letter(text, right):
    assert questions.matcher(questions.EXACT)(text, "Paris") is right


class Tokenizer:
    """Stand in for a tokenizer: one token a character, chats as lines."""

    def __init__(self, chat_template: str | None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, turns: list[dict], tokenize: bool, add_generation_prompt: bool) -> str:
        assert not tokenize and add_generation_prompt
        return "".join(f"{turn['role']}: {turn['content']}\n" for turn in turns) + "assistant:"


def test_prompts_are_chats_where_there_is_a_template():
    asked, shown = Question("Who?", "I"), [Question("Where?", "Here")]
    chat, plain = (
        "".join(map(chr, questions.prompt(Tokenizer(template), asked, shown, "Solve.")))
        for template in ("a template", None)
    )
    assert chat == "system: Solve.\nuser: Where?\nassistant: Here\nuser: Who?\nassistant:"
    assert plain == "Solve.\n\nQuestion: Where?\nAnswer: Here\n\nQuestion: Who?\nAnswer:"


def test_samples_of_a_question_are_compared_as_one():
    base, own = [True, False, True, False, True, True], [True, True, False, False, True, True]
    found = {figure.metric: figure.value for figure in paired.compare(own, base, prompts=3)}
    # of the three questions the first has one right answer more, the others as many
    assert found["right_less_first"] == pytest.approx(0) and found["only_this_right"] == 1
    assert found["only_first_right"] == 1
    same = {figure.metric: figure.value for figure in paired.compare(own, own, prompts=3)}
    assert same["right_less_first_low"] == same["right_less_first_high"] == same["only_this_right"] == 0


def test_run_writes_rows_a_table_and_every_answer(file, tmp_path, monkeypatch, capsys):
    path, target, kept = file(GSM8K, AIME, AIME), tmp_path / "rows.csv", tmp_path / "answers.jsonl"
    results = {
        "bf16": [(True, 5, False, "204"), (False, 9, True, "7")],
        "kvarn": [(True, 5, False, "204"), (True, 5, False, "204")],
        "fp8_e4m3": None,
    }
    reported = {cache: answers and {"answers": answers} for cache, answers in results.items()}
    monkeypatch.setattr(launch, "run_alone", lambda module, cache, *more: reported[cache])
    arguments = [str(path), "--examples", "1", "--caches", *results, "--output", str(target), "--answers", str(kept)]
    # a cache without a result is an error, the others count
    assert bench_answers.main(arguments) == 1
    read = {(row["provider"], row["metric"]): float(row["value"]) for row in rows.read(target, "answers")}
    assert read["bf16", "right"] == 50 and read["bf16", "cut"] == 50
    assert read["kvarn", "right_less_first"] == 50 and read["kvarn", "only_this_right"] == 1
    assert re.search(r"kvarn .* 100.0 % .* \+50.0 % \(\+0.0 to \+100.0\)", capsys.readouterr().out)
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert [(line["cache"], line["question"], line["right"]) for line in lines] == [
        *(("bf16", "Find x.", True), ("bf16", "Find x.", False)),
        *(("kvarn", "Find x.", True), ("kvarn", "Find x.", True)),
    ]


def test_answers_are_judged_and_counted_where_the_engine_runs(file, monkeypatch):
    import sglang
    import transformers

    class Engine:
        def __init__(self, **arguments) -> None:
            assert arguments["kv_cache_dtype"] == "kvarn"

        def generate(self, input_ids, sampling_params):
            assert len(input_ids) == 1 and sampling_params["max_new_tokens"] == 7
            meta = {"finish_reason": {"type": "length"}}
            return [{"output_ids": [ord(c) for c in "Answer: 204"], "meta_info": meta} for _ in input_ids]

        def shutdown(self) -> None:
            pass

    tokenizer = Tokenizer("a template")
    tokenizer.eos_token_id, tokenizer.decode = 0, lambda ids, skip_special_tokens: "".join(map(chr, ids))
    monkeypatch.setattr(sglang, "Engine", Engine)
    monkeypatch.setattr(transformers, "AutoTokenizer", SimpleNamespace(from_pretrained=lambda folder: tokenizer))
    reported: list[dict] = []
    monkeypatch.setattr(launch, "report_result", reported.append)
    arguments = [str(file(AIME)), "--one", "kvarn", "--samples", "2", "--new-tokens", "7", "--model", "folder"]
    assert bench_answers.main(arguments) == 0
    assert reported == [{"answers": [(True, 11, True, "Answer: 204")] * 2}]
