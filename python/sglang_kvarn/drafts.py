# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding beside a kvarn cache: drafts in a chain, and a draft model with a cache of SGLang's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from sglang_kvarn import budget, compat, settings

# drafts of a verify step where nobody chose their number: each costs about as much as a token of a decode step
DRAFT_TOKENS = 4
# the algorithm that drafts without a model, and one that drafts a whole block at once, as large as its model's own
NGRAM, DFLASH = "NGRAM", "DFLASH"
# those whose number of drafts may change; for the others SGLang drops the argument
_ADAPTIVE = ("EAGLE", "EAGLE3", "NEXTN")


def algorithm_of(server_args: Any) -> str:
    """Return the name of the algorithm in capitals, "" without speculative decoding."""
    return (server_args.speculative_algorithm or "").upper()


def apply_defaults(server_args: Any) -> None:
    """Make drafts a short chain where nobody chose how many; SGLang's own choice may be a tree.

    Args:
        server_args: ServerArgs of a kvarn cache as typed, written.
    """
    algorithm = algorithm_of(server_args)
    if algorithm == NGRAM:
        if server_args.speculative_num_draft_tokens is None:
            server_args.speculative_num_draft_tokens = DRAFT_TOKENS
    elif algorithm:
        if server_args.speculative_eagle_topk is None:
            server_args.speculative_eagle_topk = 1
        numbers = (server_args.speculative_num_steps, server_args.speculative_num_draft_tokens)
        # the configuration of a number that changes says with which it begins
        changes = server_args.speculative_adaptive and algorithm in _ADAPTIVE
        if algorithm != DFLASH and not changes and numbers == (None, None):
            server_args.speculative_num_steps = DRAFT_TOKENS - 1
            server_args.speculative_num_draft_tokens = DRAFT_TOKENS
        if server_args.speculative_draft_attention_backend is None:
            server_args.speculative_draft_attention_backend = compat.draft_attention_backend(server_args)


def keep_chains(result: tuple[Any, Any], corpus: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """Let each draft follow the one before it. Hook after ``NgramCorpus.batch_get``.

    SGLang fills up the drafts of a request that has too few with tokens 0, each of which follows the root. If one is
    accepted, its key and value would have to move to the place after the root, and it was attended as if it stood
    behind drafts that were rejected.

    Args:
        result: tokens [B * D], and whether draft j is draft i or before it, 0 or 1, [B * D * D].
    """
    if not settings.is_kvarn(compat.published_argument("kv_cache_dtype")):
        return None
    tokens, mask = result
    drafts = mask.size // tokens.size
    chain = np.tril(np.ones((drafts, drafts), mask.dtype))
    return tokens, np.broadcast_to(chain, (tokens.size // drafts, drafts, drafts)).reshape(mask.shape)


def charge_draft(result: None, configurator: Any, kvc: Any) -> None:
    """Charge a token its bytes in the draft model's cache. Hook after ``DefaultPoolConfigurator.__init__``.

    SGLang scales the bytes of a token in the target by the layers of both, which is right for caches of one kind.
    """
    config = settings.target_preset(kvc)
    if config is not None and (drafted := budget.draft_token_bytes(kvc)):
        configurator._cell_size = budget.model_shape(kvc).token_bytes(config) + drafted


def keep_apart(original: Callable[..., bool], *args: Any, **kwargs: Any) -> bool:
    """Let host memory keep a draft model's pages in a pool of its own. Hook around ``_can_pack_hicache_mtp``.

    SGLang would pack the layer of a head that comes with the model into the pages of the target, as one more layer of
    the same kind: here a page holds records. A draft model of any other kind has its own pool in any case.
    """
    return not settings.is_kvarn(compat.published_argument("kv_cache_dtype")) and original(*args, **kwargs)
