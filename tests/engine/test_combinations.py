# SPDX-License-Identifier: Apache-2.0
"""What runs together: kinds of models, drafts, host memory, the prefix cache and overlap, each cell an engine.

A cell answers as the oracle does, or is refused by a sentence. What a request may ask for is tried in each: a grammar,
several answers, log-probabilities of a cached prompt, a salt. CI runs cells in which every pair of values is that any
cell has; `-m long` runs the rest.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import astuple, dataclass, fields
from typing import Any

import drafts_on_cpu
import hybrids
import pytest
import states_on_cpu
import tiny_engines
import torch
from sglang_kvarn import compat
from texts import REGEX, by_the_regex, with_texts

from benchmarks.common import models, tiny_model
from benchmarks.common.tiny_model import prompt

pytestmark = pytest.mark.skipif(not compat.is_since("0.5.23"), reason="the table is that of SGLang 0.5.23")

# a preset that answers a hit as it answers a miss
PRESET, NEW, DRAFTS = hybrids.PRESET, 8, 4
# of a prompt, whose first two pages stay in the prefix cache
LENGTH = 270
# dense, with states, with sliding windows beside records, with sliding windows in records; arguments of their engines
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_5_text": {"max_mamba_cache_size": 40, "chunked_prefill_size": hybrids.STEP},
    "gpt_oss": {"moe_runner_backend": "triton"},
    "olmo3": {},
}
NGRAM = models.draft_arguments(models.TINY, models.NGRAM, DRAFTS)
# log-probabilities that differ by less are the same
NEAR = 0.05


@dataclass(frozen=True)
class Cell:
    """A server: its model, and whether it has drafts, host memory, a prefix cache, and steps that overlap."""

    family: str
    drafts: bool
    host: bool
    prefix: bool
    overlap: bool

    def __str__(self) -> str:
        words = {name: getattr(self, name) for name in ("drafts", "host", "prefix", "overlap")}
        return " ".join([self.family, *(word if given else f"no-{word}" for word, given in words.items())])

    def pairs(self) -> set[tuple[Any, ...]]:
        """Return each two of its values, with what they are values of."""
        return set(itertools.combinations(zip((field.name for field in fields(self)), astuple(self), strict=True), 2))


def refusal(cell: Cell) -> str | None:
    """Return the beginning of the sentence that refuses a cell, None for one that is served."""
    if cell.host and not cell.prefix:
        return "The arguments enable-hierarchical-cache and disable-radix-cache are mutually exclusive"
    return None


def cover(cells: list[Cell]) -> list[Cell]:
    """Choose cells that have every pair of values that any cell has; each time the first with the most new ones."""
    chosen, missing = [], set().union(*(cell.pairs() for cell in cells))
    while missing:
        best = max(cells, key=lambda cell: len(cell.pairs() & missing))
        chosen.append(best)
        missing -= best.pairs()
    return chosen


CELLS = [Cell(*values) for values in itertools.product(FAMILIES, *[(False, True)] * 4)]
SERVED = [cell for cell in CELLS if refusal(cell) is None]
REFUSED = [cell for cell in CELLS if refusal(cell) is not None]


def params(cells: list[Cell]) -> list[Any]:
    """Return cells as parameters; those that CI leaves out are long."""
    chosen = cover(cells)
    return [pytest.param(cell, id=str(cell), marks=() if cell in chosen else pytest.mark.long) for cell in cells]


@pytest.fixture(scope="module", autouse=True)
def stand_ins(tmp_path_factory):
    """Put all that a CPU lacks in place for all cells, so that their processes are forked from one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY", "2")
        # experts of gpt-oss compile their activation, which takes a minute
        patch.setenv("TORCH_COMPILE_DISABLE", "1")
        for module in (states_on_cpu, drafts_on_cpu):
            module.prepare(patch, tmp_path_factory.mktemp("plugin"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return what makes the model of a family once."""
    return functools.cache(lambda family: with_texts(tiny_model.save(tmp_path_factory.mktemp(family), family)))


@functools.cache
def steady(folder: str, length: int, *, after: tuple[int, ...] = (), **options: Any) -> tuple[list[int], list[int]]:
    """Return `hybrids.steady`, once for all cells of a family."""
    return hybrids.steady(folder, length, after=after, **{"new_tokens": NEW} | options)


@functools.cache
def log_probabilities(folder: str) -> torch.Tensor:
    """Return those of the tokens of a steady prompt behind the first, by the oracle."""
    tokens, _ = steady(folder, LENGTH)
    found = tiny_model.logits(folder, tokens, PRESET)[:-1].log_softmax(-1)
    return found.gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]


def options_of(cell: Cell, folder: str) -> dict[str, Any]:
    """Return the arguments of a cell's engine."""
    chosen = {"model_path": folder, "kv_cache_dtype": PRESET, "skip_tokenizer_init": False, **FAMILIES[cell.family]}
    chosen |= {"disable_radix_cache": not cell.prefix, "disable_overlap_schedule": not cell.overlap}
    if cell.drafts:
        chosen |= NGRAM
    if cell.host:
        # a ring and 8 pages on the device, of which a prompt of 300 tokens takes 3
        ring = tiny_engines.ring_pages(folder, PRESET, 4, DRAFTS if cell.drafts else 1)
        chosen |= {"max_total_tokens": (ring + 8) * 128, "hicache_ratio": 3.0, "enable_cache_report": True}
        chosen["enable_hierarchical_cache"] = True
    return chosen


def ask(engine: Any, tokens: list[int], *, new_tokens: int = NEW, **options: Any) -> tuple[list[int], dict[str, Any]]:
    """Return a greedy answer, and what SGLang says of it."""
    regex = options.pop("regex", None)
    sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": regex is None, "regex": regex}
    output = engine.generate(input_ids=tokens, sampling_params=sampling, **options)
    return output["output_ids"], output["meta_info"]


@pytest.mark.parametrize("cell", params(REFUSED))
def test_a_refused_cell_says_why(cell, folder, start_engine):
    with pytest.raises(ValueError, match=rf"^{refusal(cell)}"), start_engine(**options_of(cell, folder(cell.family))):
        pass


@pytest.mark.parametrize("cell", params(SERVED))
def test_a_served_cell_answers_as_the_oracle(cell, folder, start_engine, monkeypatch):
    model = folder(cell.family)
    if cell.overlap:
        drafts_on_cpu.allow_overlap(monkeypatch)
    tokens, expected = steady(model, LENGTH)
    hit = 256 * cell.prefix
    with start_engine(**options_of(cell, model)) as engine:
        arguments = compat.resolved_arguments(engine.server_args)
        assert arguments.disable_overlap_schedule is not cell.overlap
        for cached in (0, hit):
            found, facts = ask(engine, tokens)
            assert found == expected and facts["cached_tokens"] == cached
        # the drafts are what was answered before
        assert facts.get("spec_num_correct_drafts", 0) >= NEW // 2 or not cell.drafts
        # a page that ends in the answer
        begun, answer = steady(model, 252)
        assert ask(engine, begun)[0] == answer
        turn, continued = steady(model, LENGTH, after=(*begun, *answer))
        found, facts = ask(engine, turn)
        assert found == continued and facts["cached_tokens"] == hit
        if cell.host:
            for seed in range(4):
                ask(engine, prompt(300, seed=seed))
            found, facts = ask(engine, turn)
            assert found == continued and facts["cached_tokens_details"]["host"] == 256
        check_kinds_of_requests(engine, cell, model)


def check_kinds_of_requests(engine: Any, cell: Cell, model: str) -> None:
    """Ask for what changes the key of a prefix, the choice of tokens, or what is returned beside them."""
    tokens, expected = steady(model, LENGTH)
    for cached in (0, 256 * cell.prefix):
        found, facts = ask(engine, tokens, cache_salt="another tenant")
        assert found == expected and facts["cached_tokens"] == cached
    found, facts = ask(engine, tokens, return_logprob=True, logprob_start_len=260)
    returned = torch.tensor([each[0] for each in facts["input_token_logprobs"][1:]])
    wanted = log_probabilities(model)[-len(returned) :]
    assert found == expected and facts["cached_tokens"] == 256 * cell.prefix and len(returned) == LENGTH - 261
    assert (returned - wanted).abs().max() < NEAR
    short, said = steady(model, 60)
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True, "n": 2}
    assert [each["output_ids"] for each in engine.generate(input_ids=short, sampling_params=sampling)] == [said] * 2
    short, said = steady(model, 61, new_tokens=13, allowed=by_the_regex)
    assert ask(engine, short, new_tokens=20, regex=REGEX)[0] == said


def test_the_cells_that_ci_runs_have_every_pair():
    for cells in (SERVED, REFUSED):
        chosen = cover(cells)
        assert set().union(*(cell.pairs() for cell in chosen)) == set().union(*(cell.pairs() for cell in cells))
        assert len(chosen) < len(cells)
