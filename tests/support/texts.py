# SPDX-License-Identifier: Apache-2.0
"""Texts for the tokens of a tiny model, and a grammar of them."""

from __future__ import annotations

import string

import tokenizers
import transformers

from benchmarks.common import tiny_model

# six letters, a digit behind each; the tokens of both are those of `with_texts`, behind them the end
REGEX, LETTERS, DIGITS, END = "([a-f][0-9]){6}", range(6), range(26, 36), tiny_model.VOCABULARY - 1


def by_the_regex(n: int) -> list[int]:
    """Return what REGEX allows as the n-th token of an answer."""
    return [END] if n == 12 else list(DIGITS if n % 2 else LETTERS)


def with_texts(folder: str) -> str:
    """Put texts of the tokens beside a model, a letter or digit each of the first 36, and return its folder."""
    texts = [*string.ascii_lowercase, *string.digits]
    texts += [f"<{token}>" for token in range(len(texts), tiny_model.VOCABULARY)]
    words = tokenizers.models.WordLevel({text: token for token, text in enumerate(texts)}, unk_token=texts[-2])
    options = {"tokenizer_object": tokenizers.Tokenizer(words), "eos_token": texts[END]}
    transformers.PreTrainedTokenizerFast(**options).save_pretrained(folder)
    return folder
