# SPDX-License-Identifier: Apache-2.0
"""A model with outlier channels and a value bias, which computes what the tiny model does, answers as it does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from benchmarks.common.tiny_model import flush, prompt
from benchmarks.quality import hard

NEW = 16
PROMPT = prompt(500, seed=1)
# whole RoPE pairs
KEY_CHANNELS, VALUE_CHANNELS, FACTOR, BIAS = [3, 35, 10, 42], [0, 5, 9, 60], 32.0, 8.0


def channels(chosen: Iterable[int], value: float = FACTOR, other: float = 1.0) -> torch.Tensor:
    """Return value in the chosen channels of both KV heads, [2, 64]."""
    made = torch.full((2, 64), other)
    made[:, list(chosen)] = value
    return made


def save(folder: Path, model: str) -> str:
    """Write the tiny model with other weights, whose 16-bit answers are the same, and return the folder's name."""
    plain = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    config = plain.config
    config.attention_bias = True
    network = LlamaForCausalLM(config)
    missing = network.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert all(name.endswith("bias") for name in missing)
    with torch.no_grad():
        for layer in network.model.layers:
            for name in "qkvo":
                getattr(layer.self_attn, f"{name}_proj").bias.zero_()
            for form in (
                hard.scaled("outliers", keys=channels(KEY_CHANNELS), values=channels(VALUE_CHANNELS)),
                hard.biased_values("bias", channels(range(20, 24), BIAS, other=0.0)),
            ):
                form.reweigh(layer.self_attn)
        ids = torch.tensor([PROMPT])
        torch.testing.assert_close(network(ids).logits, plain(ids).logits, rtol=1e-3, atol=1e-3)
    network.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def hard_model(model, tmp_path_factory) -> str:
    """Return the folder of the hard model."""
    return save(tmp_path_factory.mktemp("hard"), model)


def answer(engine) -> tuple[list[int], torch.Tensor]:
    """Return the greedy tokens after the prompt and their log-probabilities."""
    sampling = {"temperature": 0, "max_new_tokens": NEW, "ignore_eos": True}
    output = engine.generate(input_ids=PROMPT, sampling_params=sampling, return_logprob=True)
    scores = output["meta_info"]["output_token_logprobs"]
    return [token for _, token, *_ in scores], torch.tensor([score for score, *_ in scores])


def test_a_hard_model_answers_as_the_plain_one_before_and_after_an_update(start_engine, model, hard_model):
    with start_engine(kv_cache_dtype="kvarn_canonical") as engine:
        tokens, scores = answer(engine)
    with start_engine(model_path=hard_model, kv_cache_dtype="kvarn_canonical") as engine:
        for _ in range(2):
            hard_tokens, hard_scores = answer(engine)
            assert hard_tokens == tokens
            # without balance they differ by more than 1
            torch.testing.assert_close(hard_scores, scores, rtol=0, atol=2e-2)
            # SGLang ends a server whose weights are updated while its last step is in flight
            flush(engine)
            # weights as a checkpoint has them, into a model whose own are balanced
            assert engine.update_weights_from_disk(hard_model)[0]
