# SPDX-License-Identifier: Apache-2.0
"""Models of other families than Llama: balanced weights compute what the checkpoint does, with outliers and without."""

from __future__ import annotations

import pytest
import torch
from test_hard_model import KEY_CHANNELS, PROMPT, VALUE_CHANNELS, channels
from transformers import AutoModelForCausalLM

from benchmarks.common import tiny_model
from benchmarks.quality import hard

# the last prompt token that sees its own page only, so nothing quantised
EXACT = 127


def prompt_scores(start_engine, folder: str) -> torch.Tensor:
    """Return the log-probabilities that an engine gives to the tokens of the prompt but the first."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    with start_engine(model_path=folder, kv_cache_dtype="kvarn_canonical") as engine:
        output = engine.generate(
            input_ids=PROMPT, sampling_params=sampling, return_logprob=True, logprob_start_len=0
        )
    return torch.tensor([score for score, *_ in output["meta_info"]["input_token_logprobs"][1:]])


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_model_of_another_family_scores_as_in_transformers_and_as_with_outliers(start_engine, family, tmp_path):
    folders = [tmp_path / name for name in ("plain", "outliers")]
    network = AutoModelForCausalLM.from_pretrained(tiny_model.save(folders[0], family), dtype=torch.float32)
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        logits = network(ids).logits
        for layer in network.model.layers:
            keys, values = channels(KEY_CHANNELS), channels(VALUE_CHANNELS)
            hard.scaled("outliers", keys=keys, values=values).reweigh(layer.self_attn)
        torch.testing.assert_close(network(ids).logits, logits, rtol=1e-3, atol=1e-3)
        expected = logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    network.save_pretrained(folders[1])
    plain, outliers = (prompt_scores(start_engine, str(folder)) for folder in folders)
    for scores in (plain, outliers):
        torch.testing.assert_close(scores[:EXACT], expected[:EXACT], rtol=0, atol=1e-4)
    torch.testing.assert_close(outliers, plain, rtol=0, atol=2e-2)
