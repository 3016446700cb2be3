# SPDX-License-Identifier: Apache-2.0
"""The reasoner: its chains are right step by step, a tiny one learns, and its chains are judged cache by cache."""

from __future__ import annotations

import itertools
import os
import re
from types import SimpleNamespace

import pytest
import torch

from benchmarks.common import launch, rows
from benchmarks.quality import caches
from benchmarks.quality.model import Model
from benchmarks.reasoning import bench_chains, bench_methods, tasks, train, training
from benchmarks.reasoning.tasks import Chain


def chain(task: str, tokens: int = 600, **options) -> Chain:
    (found,) = tasks.chains(task, tokens, 1, 0, **options)
    return found


def texts(found: Chain) -> tuple[list[str], list[list[str]]]:
    """Return the words of the prompt, and of each step."""
    return tasks.words(found.prompt).split(), [tasks.words(step).split() for step in found.steps]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_chains_have_the_tokens_asked_for_and_share_their_problem(task):
    one, other = tasks.chains(task, 601, 2, 7)
    assert len(one.answer) == len(other.answer) == 601
    assert one.prompt[: one.shared] == other.prompt[: one.shared] and one.shared > 20
    assert one.prompt != other.prompt and one.answer != other.answer
    assert tasks.chains(task, 601, 2, 7) == [one, other] != tasks.chains(task, 601, 2, 8)


def test_a_machine_runs_its_program():
    prompt, steps = texts(chain("machine"))
    at = prompt.index("start")
    program = {prompt[n]: prompt[n + 1 : n + 4] for n in range(1, at, 4)}
    place = prompt[at + 1]
    registers = {word[0]: int(word[1:]) for word in prompt[at + 2 :]}
    assert len(registers) == tasks.REGISTERS
    jumps = 0
    for step in steps[:-1]:
        assert step[0] == place
        assert step[1:4] == program[place]
        kind, a, b = program[place]
        assert step[4:6] == [f"{a}{registers[a]}", f"{b}{registers[b]}" if b in registers else b]
        after = (int(place[1:]) + 1) % len(program)
        if kind == "jump" and registers[a]:
            after, jumps = int(b[1:]), jumps + 1
        if kind in ("add", "subtract"):
            change = registers[b] * (1 if kind == "add" else -1)
        else:
            change = int(b) if kind == "raise" else int(registers[a] > 0)
        registers[a] = (registers[a] + change) % 10
        assert step[6:] == [f"{name}{digit}" for name, digit in registers.items()]
        place = f"i{after}"
    assert jumps > 0


def test_a_walk_takes_the_successor_of_its_parity():
    prompt, steps = texts(chain("walk"))
    at = prompt.index("start")
    graph = {prompt[n]: prompt[n + 1 : n + 3] for n in range(1, at, 3)}
    node = prompt[at + 1]
    for number, (successor, after) in enumerate(steps):
        assert successor == graph[node][number % 2] and successor[0] == "eo"[number % 2]
        assert after == f"n{successor[1:]}"
        node = after


def test_a_multiplication_is_right():
    size = 9
    prompt, steps = texts(chain("multiply", size * (3 + 7 * size)))
    at = prompt.index("solve")
    x, y = (int("".join(reversed(part[1::2]))) for part in (prompt[1:at], prompt[at + 1 :]))
    assert prompt[1:at:2] == [f"i{n}" for n in range(size)]
    digits = [0] * (2 * size)
    for step in steps:
        if step[0] == "row":
            row = int(step[1][1:])
        else:
            place = row + int(step[0][1:])
            assert int(step[3]) == digits[place]
            digits[place], digits[place + 1 if int(step[0][1:]) == size - 1 else -1] = int(step[5]), int(step[6])
    assert int("".join(map(str, reversed(digits)))) == x * y


def test_right_tokens_and_steps_are_counted_and_cut_answers_are_right_so_far():
    own = Chain([1], 1, [[5, 6], [7, 8], [9]])
    counted = {(5, 6, 7, 8, 9): (5, 3), (5, 6, 7, 0, 9): (3, 1), (5, 6, 7, 8): (4, 2), (0, 6): (0, 0)}
    for answer, expected in counted.items():
        right = tasks.right_tokens(own, list(answer))
        assert (right, tasks.right_steps(own, right)) == expected


def test_a_step_has_chains_of_each_task_and_judges_the_solutions_only():
    steps = training.steps_of(training.TINY, (24,), 0)
    assert len(steps) == 8
    shares = torch.zeros(3)
    for ids, labels, of in steps:
        assert [tasks.words([token]) for token in ids[:, 0].tolist()] == [tasks.TASKS[task] for task in of]
        judged = labels >= 0
        assert ids.shape == labels.shape and judged.sum(1).eq(24).all() and labels[judged].equal(ids[judged])
        for row, mask in zip(ids, judged, strict=True):
            first = mask.int().argmax()
            assert (row[first + 24 :] == tasks.PAD).all() and (row[:first] != tasks.PAD).all()
        shares += torch.stack([(ids[of == task] != tasks.PAD).sum() for task in range(3)])
    assert shares.div(shares.sum()).sub(torch.tensor([0.4, 0.4, 0.2])).abs().max() < 0.02
    kept = [(ids != tasks.PAD).sum().item() for ids, _, _ in steps]
    assert all(0.7 * training.TINY.batch < size < 1.3 * training.TINY.batch for size in kept)
    # machines of all sizes: one word, six instructions of four, and where it starts
    assert max(ids.shape[1] for ids, _, _ in steps) == 1 + 24 + 10 + 24
    # multiplications have short prompts
    assert sum(kept) > 0.75 * sum(ids.numel() for ids, _, _ in steps)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_ends_when_its_minutes_are_over(workers, monkeypatch):
    torch.manual_seed(0)
    # a clock on which each look takes a second: the first batch is seen at 0, the last at 54 s
    seconds = itertools.count()
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    network, seen = training.model("qwen3", training.TINY), []
    options = {"workers": workers, "minutes": 0.9}
    steps = training.train(network, training.TINY, 10**6, 0, lambda step, losses: seen.append(step), **options)
    assert steps == 54 and seen == [0, 50]


@pytest.mark.parametrize("variant", training.VARIANTS)
def test_a_full_model_has_the_attention_of_its_variant(variant):
    with torch.device("meta"):
        network = training.model(variant, training.FULL)
    assert 25e6 < sum(weight.numel() for weight in network.parameters()) < 60e6
    names = [name for name, _ in network.named_parameters()]
    assert any("q_norm" in name for name in names) is (variant == "qwen3")
    assert any("k_proj.bias" in name for name in names) is (variant == "qwen2")


def test_keys_of_the_qwen2_variant_have_channels_that_stand_out():
    bias = training.model("qwen2", training.TINY).model.layers[0].self_attn.k_proj.bias
    assert bias.abs().topk(4).values.eq(30).all() and bias.abs().sum() == 120


def test_a_rounded_model_turns_its_keys_as_before():
    network = training.model("qwen3", training.TINY)
    frequencies = network.model.rotary_emb.inv_freq.clone()
    training.round_weights(network)
    assert {weight.dtype for weight in network.parameters()} == {torch.bfloat16}
    assert network.model.rotary_emb.inv_freq.equal(frequencies)


def test_a_tiny_reasoner_learns_and_is_saved_as_it_is(tmp_path, capsys):
    folder, target = tmp_path / "reasoner", tmp_path / "rows.csv"
    arguments = [str(folder), "--tiny", "--steps", "120", "--judged", "8", "--output", str(target)]
    threads = torch.get_num_threads()
    try:
        assert train.main(arguments) == 0
    finally:
        torch.set_num_threads(threads)
    losses = [float(found) for found in re.findall(r"multiply ([\d.]+);", capsys.readouterr().err)]
    # one word of all is 5.9, one digit of ten 2.3
    assert losses[0] > 5.5 and losses[-1] < 1.5
    found = {row["settings"].get("task"): float(row["value"]) for row in rows.read(target, "reasoner")}
    assert {*tasks.TASKS, None} == found.keys() and found["walk"] >= 0
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.architectures == ["Qwen3ForCausalLM"]
    with pytest.raises(SystemExit, match="name another one"):
        train.main(arguments)


def test_chains_of_the_benchmark_are_of_other_problems_than_those_of_training():
    args = SimpleNamespace(chains=6, seed=0, tiny=False)
    found = bench_chains.make_chains(args, "walk", 50)
    problems = {tuple(c.prompt[: c.shared]) for c in found}
    assert len(found) == 6 and len(problems) == 2
    assert found != bench_chains.make_chains(SimpleNamespace(chains=6, seed=1, tiny=False), "walk", 50)


def test_run_compares_caches_chain_by_chain(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text("{}")
    target, picture = tmp_path / "rows.csv", tmp_path / "chains.png"
    cells = {
        "bf16": {"right": [200, 200, 200, 60], "steps": [10, 10, 10, 3], "tokens": [200] * 4, "cached": 640},
        "kvarn": {"right": [200, 99, 200, 120], "steps": [10, 4, 10, 6], "tokens": [200] * 4, "cached": 512},
    }
    results = {name: {"cells": {"walk": cell}} for name, cell in cells.items()}
    monkeypatch.setattr(launch, "run_alone", lambda module, cache, *more: results[cache])
    arguments = [str(tmp_path), "--caches", *results, "--lengths", "100", "200"]
    arguments += ["--output", str(target), "--plot", str(picture)]
    assert bench_chains.main(arguments) == 0
    read = rows.read(target, "chains")
    found = {(row["provider"], row["settings"]["tokens"], row["metric"]): float(row["value"]) for row in read}
    assert found["bf16", "100", "right"] == found["bf16", "200", "right"] == found["kvarn", "100", "right"] == 75
    assert found["kvarn", "200", "right"] == 50
    # 33 right steps, and one that was wrong; 30 and two
    assert found["bf16", "200", "wrong_steps"] == pytest.approx(1e6 / 34)
    assert found["kvarn", "200", "wrong_steps"] == pytest.approx(2e6 / 32)
    assert found["kvarn", "100", "right_less_first"] == 0 and found["kvarn", "100", "only_this_right"] == 1
    assert found["kvarn", "200", "right_less_first"] == -25 and ("kvarn", "100", "wrong_steps") not in found
    assert picture.stat().st_size > 1000
    with pytest.raises(SystemExit, match="make it with"):
        bench_chains.main(["missing"])


def test_chains_are_written_freely_by_the_engine_and_judged_there(monkeypatch):
    import sglang

    class Engine:
        def __init__(self, **arguments) -> None:
            assert arguments["kv_cache_dtype"] == "kvarn" and arguments["max_running_requests"] == 2

        def flush_cache(self) -> SimpleNamespace:
            return SimpleNamespace(success=True)

        def generate(self, input_ids, sampling_params):
            start, end = [(0, 6), (6, 13), (13, 20)][len(asked)]
            assert all(own["max_new_tokens"] == end - start and own["ignore_eos"] for own in sampling_params)
            made = bench_chains.make_chains(args, "walk", 20)
            answers = [own.answer for own in made]
            answers[1] = [*answers[1][:5], 0, *answers[1][6:]]
            # what was answered, right or wrong, and not the rest of the right chain
            assert input_ids == [own.prompt + answer[:start] for own, answer in zip(made, answers, strict=True)]
            asked.append(end)
            return [{"output_ids": answer[start:end], "meta_info": {"cached_tokens": start}} for answer in answers]

        def shutdown(self) -> None:
            pass

    asked: list[int] = []
    monkeypatch.setattr(sglang, "Engine", Engine)
    monkeypatch.setenv("SGLANG_TEST_RETRACT", "0")
    monkeypatch.setenv("SGLANG_TEST_RETRACT_INTERVAL", "0")
    reported: list[dict] = []
    monkeypatch.setattr(launch, "report_result", reported.append)
    options = ["--tasks", "walk", "--lengths", "20", "--chains", "3", "--at-a-time", "2", "--retract", "7"]
    options += ["--turns", "3"]
    args = bench_chains.parse(["folder", "--one", "kvarn", *options])
    assert bench_chains.main(["folder", "--one", "kvarn", *options]) == 0
    cell = {"right": [20, 5, 20], "steps": [10, 2, 10], "tokens": [20] * 3, "cached": 3 * 19}
    assert reported == [{"cells": {"walk": cell}}]
    assert os.environ["SGLANG_TEST_RETRACT"] == "1" and os.environ["SGLANG_TEST_RETRACT_INTERVAL"] == "7"


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    """Return q, k and v of 700 tokens whose sizes differ by token and channel, the first of each page the largest."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(700, heads, 64) for heads in (4, 2, 2))
    for x in (k, v):
        x *= (torch.randn(64) / 2).exp() * (torch.randn(700, 1, 1) / 2).exp()
        x[::128] *= 8
    return [q / 4, k, v]


def test_each_part_of_the_method_makes_its_error_smaller(inputs):
    expected = caches.unquantised().attend(*inputs, 0.125)

    def error(cache: caches.Cache) -> float:
        return ((cache.attend(*(x.bfloat16() for x in inputs), 0.125) - expected).norm() / expected.norm()).item()

    whole = error(caches.kvarn("kvarn"))
    without = {cache.name.rpartition("without ")[2]: error(cache) for cache in caches.lacking("kvarn")}
    assert set(without) == {"window", "first tokens", "fitted codes", "normalisation"}
    assert all(own > 1.02 * whole for own in without.values())
    # channels of keys whose tokens differ in size, without what the exact tokens hide
    tiles = inputs[1][1:128].transpose(0, 1).transpose(-1, -2)
    plain, normalised = ((read(tiles, 4) - tiles).norm() for read in (caches.read_unnormalised, caches.read_min_max))
    assert plain > 1.2 * normalised


def test_wrong_tokens_of_the_16_bit_cache_are_those_of_the_network():
    torch.manual_seed(0)
    network = training.model("qwen3", training.TINY).eval()
    own = chain("walk", 300, most=6)
    ids = torch.tensor([own.prompt + own.answer])
    expected = network(ids).logits[0, len(own.prompt) - 1 : -1].argmax(-1) != torch.tensor(own.answer)
    model = Model(network, None, torch.device("cpu"), torch.float32)
    found = bench_methods.wrong_tokens(model, own, caches.unquantised())
    assert found.equal(expected) and len(found) == 300


def test_methods_are_compared_on_a_saved_reasoner(tmp_path):
    folder, target = tmp_path / "reasoner", tmp_path / "rows.csv"
    training.model("qwen2", training.TINY).save_pretrained(folder)
    options = ["--tasks", "walk", "--lengths", "150", "--chains", "2", "--tiny", "--output", str(target)]
    assert bench_methods.main([str(folder), *options]) == 0
    read = rows.read(target, "methods")
    names = list(dict.fromkeys(row["provider"] for row in read))
    assert names[:3] == ["16-bit", "fp8_e4m3", "kvarn_k4v2_g128"] and len(names) == 9
    metrics = {row["metric"] for row in read if row["provider"] == names[-1]}
    assert metrics >= {"right", "wrong_tokens", "right_less_first"}
    with pytest.raises(SystemExit, match="make it with"):
        bench_methods.main(["missing"])
