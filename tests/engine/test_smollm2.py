# SPDX-License-Identifier: Apache-2.0
"""A real language model: the 4-bit cache answers as the 16-bit cache does."""

from __future__ import annotations

import pytest
from sglang_kvarn.demo import model as smollm2

PROMPTS = (
    "\n\nThe water cycle has four stages: evaporation,",
    "\n\nQuestion: What does a library lend today?\nAnswer: Today a library lends",
    "\n\nOnce upon a time, there was a little girl who lived with her grandmother in a small house near the "
    "forest. Every morning she walked to the village to buy bread, and every evening she",
)
# more than three pages before each question, so that two and more are read from records
BACKGROUND = (
    "A library is a place where books are kept for people to read and to borrow. The first libraries held "
    "clay tablets; later ones held scrolls of papyrus and parchment, and then printed books. Today a library "
    "also lends music, films and computers, and its staff help visitors to find what they need. "
) * 7
NEW = 20


@pytest.fixture(scope="module")
def folder() -> str:
    """Return the folder of SmolLM2-135M-Instruct, prepared once and cached."""
    return str(smollm2.prepare())


def texts(start_engine, folder: str, cache: str) -> list[list[int]]:
    options = {"skip_tokenizer_init": False, "max_total_tokens": 8192, "chunked_prefill_size": 1024}
    with start_engine(model_path=folder, kv_cache_dtype=cache, page_size=128, **options) as engine:
        outputs = engine.generate(
            [BACKGROUND + question for question in PROMPTS],
            sampling_params={"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True},
        )
    assert all(output["meta_info"]["prompt_tokens"] > 384 for output in outputs)
    return [output["output_ids"] for output in outputs]


def test_k4v4_gives_the_first_twenty_tokens_of_the_16_bit_cache(start_engine, folder):
    plain = texts(start_engine, folder, "auto")
    assert texts(start_engine, folder, "kvarn_k4v4_g128") == plain
