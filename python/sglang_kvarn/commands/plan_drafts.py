# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding in a plan: how many drafts a step verifies, and what a draft model takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_kvarn import capacity, compat, refusals
from sglang_kvarn.drafts import DFLASH, DRAFT_TOKENS, NGRAM

# algorithms whose draft may be the head in the checkpoint of the model itself
_OWN_HEADS = ("EAGLE", "NEXTN")


@dataclass(frozen=True)
class Drafts:
    """Describe the drafts of a server.

    Attributes:
        number: new tokens of a request in a verify step, 1 without speculative decoding.
        token: bytes of a token in the draft model's cache, of a rank.
        folder: of a draft model with weights of its own, None without.
    """

    number: int = 1
    token: int = 0
    folder: str | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of drafts, those of a server."""
    parser.add_argument(
        "--speculative-algorithm",
        type=str.upper,
        choices=refusals.CHAINS,
        help="drafts, as of the server; without it there are none",
    )
    parser.add_argument(
        "--speculative-draft-model-path",
        metavar="FOLDER",
        help="folder of the draft model; without it the head in the model's own checkpoint (NEXTN)",
    )
    parser.add_argument(
        "--speculative-num-draft-tokens",
        type=int,
        metavar="D",
        help=f"as of the server; default: {DRAFT_TOKENS}, of DFLASH what its draft model was trained for",
    )


def of(options: argparse.Namespace, model_config: Any) -> Drafts:
    """Return the drafts of a plan.

    Args:
        options: with the flags of `add_arguments`, `folder` and `tp`; model_config: SGLang's, of the model.

    Raises:
        Refused: such drafts are not served beside what the model has.
        ValueError: a draft model is missing, or there is one too many.
    """
    algorithm, folder = options.speculative_algorithm or "", options.speculative_draft_model_path
    if not algorithm:
        if folder or options.speculative_num_draft_tokens:
            raise ValueError("expected --speculative-algorithm with the flags of drafts, got none: add it or drop them")
        return Drafts()
    refusals.check_drafts(algorithm, model_config)
    number = options.speculative_num_draft_tokens or DRAFT_TOKENS
    if algorithm == NGRAM:
        if folder:
            raise ValueError(f"expected no draft model with {NGRAM}, got {folder}: drop --speculative-draft-model-path")
        return Drafts(number)
    if folder is None and algorithm not in _OWN_HEADS:
        raise ValueError(f"expected the folder of a draft model with {algorithm}: add --speculative-draft-model-path")
    if folder is not None and not (Path(folder) / "config.json").is_file():
        raise ValueError(f"expected the folder of a draft model, with config.json, got {folder}: name one")
    draft = compat.ModelConfig(
        folder or options.folder, is_draft_model=True, trust_remote_code=options.trust_remote_code
    )
    layers = draft.num_nextn_predict_layers if folder is None else draft.num_hidden_layers
    if not layers:
        raise ValueError(
            f"expected a head for drafts in the checkpoint of {options.folder}, got none: add "
            "--speculative-draft-model-path"
        )
    if algorithm == DFLASH and not options.speculative_num_draft_tokens:
        number = compat.dflash_block(draft) or number
    shape = capacity.rank_shape(draft, draft.dtype, options.tp, layers)
    return Drafts(number, shape.full_token_bytes(draft.dtype.itemsize), folder)
