# SPDX-License-Identifier: Apache-2.0
"""The position rule bit for bit: an output row depends on its position's queries, keys and values alone.

Neither the chunks of the prompt nor pages, request row, company in the batch and (canonical presets) a prefix hit
may change a bit of it. In the torch form and in the extend kernel.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

import pytest
import torch
from builders import PAGE, Request, attention_for, cache_for, make_cache, make_request, prefill, run_extend
from kvarn_kernels import torch_form
from kvarn_kernels.config import KVarNConfig
from test_extend import CANONICAL, KVARN, chunks_of, extend_kernel


def all_kernels(new, out, cache, batch, config, sm_scale) -> None:
    """Run a step in the kernels of a GPU, those of short extend steps."""
    attention = attention_for(cache, new.q.shape[1], config)
    attention.attend(new, out, cache, attention.plan(batch), sm_scale)


# a GPU runs the kernels only, all of them; interpreted, the encoder would take most of the time
FORMS = (
    {"kernels": all_kernels}
    if torch.cuda.is_available()
    else {"torch": torch_form.attend_extend, "kernels": extend_kernel}
)
SIZES = (1, 100, 127, 128, 129, 256, 1000)
# tokens of the prompt by chunk size: interpreted, just enough for the size to matter
TOKENS = {
    form: dict.fromkeys(SIZES, 8 * PAGE + 107)
    if form == "torch" or torch.cuda.is_available()
    else dict.fromkeys(SIZES, 3 * PAGE + 3) | {1: PAGE + 3, 1000: 8 * PAGE + 7}
    for form in FORMS
}
OTHER = make_request(PAGE + 90, (1, 1), 64, torch.float16, row=1, seed=2)
POOL_PAGES = 24

in_every_form = pytest.mark.parametrize("form", FORMS)
for_both_rules = pytest.mark.parametrize("config", (KVARN, CANONICAL), ids=lambda c: c.name)


@lru_cache
def prompt(tokens: int) -> Request:
    return make_request(tokens, (1, 1), 64, torch.float16, row=2)


@lru_cache
def whole(form: str, config: KVarNConfig, tokens: int) -> torch.Tensor:
    """Return the output of a prompt fed in one chunk, alone."""
    return prefill(FORMS[form], prompt(tokens), [tokens], cache_for(prompt(tokens), config), config)


@in_every_form
@for_both_rules
@pytest.mark.parametrize("size", SIZES)
def test_extend_gives_the_same_bits_for_every_chunk_size(form, config, size):
    tokens = TOKENS[form][size]
    # single tokens only around the end of a page
    chunks = chunks_of(size, tokens) if size > 1 else [PAGE - 2, *[1] * (tokens - PAGE + 2)]
    out = prefill(FORMS[form], prompt(tokens), chunks, cache_for(prompt(tokens), config), config)
    assert torch.equal(out, whole(form, config, tokens))


def feed(form: str, config: KVarNConfig, generator: random.Random) -> tuple[int, int, torch.Tensor]:
    """Feed a prompt in random chunks, to random pages, with OTHER in some steps, a random prefix from a donor.

    Returns:
        Tokens of the prompt and of the prefix hit, and the outputs behind it.
    """
    tokens = TOKENS[form][100]
    order = generator.sample(range(1, POOL_PAGES), POOL_PAGES - 1)
    hit = generator.randrange(tokens // PAGE + 1) * PAGE if config.window_pages == 0 else 0
    count = len(prompt(tokens).pages)
    request = replace(prompt(tokens), pages=order[:count], row=generator.choice((2, 3)), exact_start=hit)
    other = replace(OTHER, pages=order[count : count + len(OTHER.pages)])
    cache = make_cache(config, 1, 64, torch.float16, POOL_PAGES, rows=5)
    if hit:
        prefill(torch_form.attend_extend, replace(request, row=4, exact_start=0), [hit], cache, config)
    cuts = generator.sample(range(hit + 1, tokens), min(5, tokens - hit - 1))
    outs, done = [], 0
    for span in pairwise(sorted({hit, *cuts, tokens})):
        step = [(request, span)]
        if done < len(other.q) and generator.random() < 0.7:
            end = generator.randint(done + 1, len(other.q))
            step.insert(generator.randrange(2), (other, (done, end)))
            done = end
        requests, spans = zip(*step, strict=True)
        outs.append(run_extend(FORMS[form], requests, spans, cache, config)[spans.index(span)])
    return tokens, hit, torch.cat(outs)


@for_both_rules
@pytest.mark.parametrize(
    ("form", "seed"), [(form, seed) for form in FORMS for seed in range({"torch": 12, "kernels": 4}[form])]
)
def test_extend_gives_the_same_bits_for_random_chunks_pages_rows_hits_and_company(form, seed, config):
    tokens, hit, out = feed(form, config, random.Random(seed))
    assert torch.equal(out, whole(form, config, tokens)[hit:]), f"prefix hit of {hit} tokens"


@in_every_form
@pytest.mark.parametrize("pages", [1, 2, 3])
def test_extend_of_a_canonical_preset_gives_the_same_bits_for_a_hit_and_a_miss(form, pages):
    tokens = TOKENS[form][100]
    hit = replace(prompt(tokens), exact_start=pages * PAGE)
    cache = cache_for(hit, CANONICAL)
    prefill(torch_form.attend_extend, replace(hit, row=3, exact_start=0), [pages * PAGE], cache, CANONICAL)
    # the ring of row 2 is poison: nothing of the prefix may be read exactly
    out = prefill(FORMS[form], hit, [tokens - pages * PAGE], cache, CANONICAL)
    assert torch.equal(out, whole(form, CANONICAL, tokens)[pages * PAGE :])
