# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for models of random weights: token n is the word "tn", so n words are n tokens."""

from __future__ import annotations

from pathlib import Path

from agentic import servers

OWN = (servers.DUMMY, "tiny")


def with_tokenizer(folder: Path, model: str) -> Path:
    """Write the tokenizer into the folder of a model of ours and return the folder; others have their own."""
    if model not in OWN or (folder / "tokenizer.json").exists():
        return folder
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{n}": n for n in range(servers.vocabulary(folder))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # no special tokens: these are left out of answers, and bench_serving waits for the first text
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder
