# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for models of random weights: token n is the word "tn", so n words are n tokens."""

from __future__ import annotations

from pathlib import Path

from benchmarks.common import models

OWN = (*models.DUMMIES, *models.TINY_ONES)


def with_tokenizer(model: str) -> Path:
    """Return the folder of a model; one of ours gets the tokenizer, others have their own."""
    folder = models.folder(model)
    if model not in OWN or (folder / "tokenizer.json").exists():
        return folder
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    words = {f"t{n}": n for n in range(models.vocabulary(folder))}
    tokenizer = Tokenizer(kinds.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # no special tokens: these are left out of answers, and bench_serving waits for the first text
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
