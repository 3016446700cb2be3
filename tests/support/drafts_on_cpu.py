# SPDX-License-Identifier: Apache-2.0
"""Speculative decoding on a machine without a GPU: torch in the place of SGLang's kernels that draft and accept.

Nothing here touches the verify step of a kvarn cache. It makes sure that no accepted token would have to move.
"""

from __future__ import annotations

import functools
import os
import sys
import types
from pathlib import Path

import host_pools_on_cpu
import numpy as np
import pytest
import torch
import triton_attention_on_cpu
import xgrammar
from engine_plugin import add_to_engines
from sglang_kvarn import compat

# where this is set, engines run their steps one ahead; SGLang does that for drafts on a GPU only
OVERLAP = "KVARN_TEST_OVERLAP"
# where this is set, a flush of the prefix cache leaves the n-grams that drafts are made of
KEEP = "KVARN_TEST_KEEP_NGRAMS"
# where this is set, drafts of n-grams follow one another with every cache; the plugin sees to that with its own
CHAINS = "KVARN_TEST_CHAINS"
WRONG = 7
# compiling a function of the draft model for a CPU takes longer than the tests
ENVIRONMENT = {"TORCHDYNAMO_DISABLE": "1"}


def prepare(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Put the torch forms in place in the processes of the engines that this one starts, and take the arguments."""
    add_to_engines(patch, folder, "drafts_on_cpu:install")
    for name, value in ENVIRONMENT.items():
        patch.setenv(name, value)
    patch.setattr(_platform(), "supports_speculative_algorithm", lambda self, algorithm: True, raising=False)
    patch.setattr(_platform(), "supports_speculative_draft_attention_backend", lambda *_: True, raising=False)
    if compat.version() == "0.5.16":
        patch.setattr(_arguments(), "_handle_dflash", on_a_gpu(_arguments()._handle_dflash))
        # a header of the n-gram corpus lacks an include that newer compilers ask for
        compiler = folder / "c++"
        compiler.write_text('#!/bin/sh\nexec c++ -include cstddef "$@"\n')
        compiler.chmod(0o755)
        patch.setenv("CXX", str(compiler))


def _platform() -> type:
    return type(compat.resolve("sglang.srt.platforms.current_platform"))


def install() -> None:
    """Put the torch forms in place, for good; before SGLang's workers are imported."""
    # of draft models, and of caches that are not ours
    triton_attention_on_cpu.install()
    # 0.5.16 imports the first, later versions the second
    for name in ("sgl_kernel.speculative", "sglang.kernels.ops.speculative.reconstruct_tree"):
        module = types.ModuleType(name)
        module.reconstruct_indices_from_tree_mask = module.reconstruct_indices_from_tree_mask_func = links_of_mask
        sys.modules[name] = module
    platform = _platform()
    platform.supports_speculative_algorithm = lambda self, algorithm: True
    platform.supports_speculative_draft_attention_backend = lambda *_: True
    platform.get_speculative_cache_locs_fn = lambda self: slots_of_drafts
    compat.resolve("sglang.kernels.ops.speculative.cache_locs").assign_extend_cache_locs_func = slots_of_drafts
    eagle = compat.resolve("sglang.srt.speculative.eagle_utils")
    eagle.verify_tree_greedy_func = accept_greedily
    # 0.5.16 calls the first, later versions the second
    eagle.sgl_build_tree_kernel_efficient = eagle.build_tree_kernel_efficient_func = link_chain
    corpus = compat.resolve("sglang.srt.speculative.cpp_ngram.ngram_corpus.NgramCorpus")
    corpus.batch_get = with_a_draft(corpus.batch_get)
    if CHAINS in os.environ:
        corpus.batch_get = in_a_chain(corpus.batch_get)
    if KEEP in os.environ:
        corpus.reset = nothing_to_do
    # 0.5.16 has none for a CPU
    compat.resolve("sglang.srt.constrained.xgrammar_backend.XGrammarGrammar").apply_vocab_mask = forbid
    # heads of 0.5.16 that share the embeddings of the target call these
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda: None
    # DFLASH calls the first, and SGLang hands its model embeddings in bfloat16
    torch.Tensor.record_stream = lambda self, stream: None
    block_model = compat.resolve("sglang.srt.models.dflash.DFlashDraftModel")
    block_model.forward = in_its_own_dtype(block_model.forward)
    if OVERLAP in os.environ:
        _arguments()._disable_overlap_schedule_for_cpu = nothing_to_do
    compat.resolve("sglang_kvarn.pool.KVarNTokenToKVPool").move_kv_cache = nothing_moves
    host_pools_on_cpu.install()


def with_a_draft(batch_get):
    """Return the function of SGLang's corpus with a draft, WRONG, for each request that it has none for.

    What SGLang fills up with then stands behind a draft that is rejected, which seldom happens by itself.
    """

    @functools.wraps(batch_get)
    def at_least_one(corpus, req_ids, batch_tokens, total_lens):
        tokens, mask = batch_get(corpus, req_ids, batch_tokens, total_lens)
        drafts = tokens.reshape(len(req_ids), -1)
        drafts[(drafts[:, 1:] == 0).all(1), 1] = WRONG
        return drafts.reshape(tokens.shape), mask

    return at_least_one


def in_a_chain(batch_get):
    """Return the function of SGLang's corpus with drafts that follow one another."""

    @functools.wraps(batch_get)
    def chained(corpus, req_ids, *args):
        tokens, mask = batch_get(corpus, req_ids, *args)
        drafts = tokens.size // len(req_ids)
        chain = np.tril(np.ones((drafts, drafts), mask.dtype))
        return tokens, np.tile(chain, (len(req_ids), 1, 1)).reshape(mask.shape)

    return chained


def in_its_own_dtype(forward):
    """Return the forward pass of a model that takes embeddings of any dtype."""

    @functools.wraps(forward)
    def cast(model, input_ids, positions, forward_batch, input_embeds=None, **kwargs):
        return forward(model, input_ids, positions, forward_batch, input_embeds.to(model.norm.weight.dtype), **kwargs)

    return cast


def on_a_gpu(resolve):
    """Return the function of 0.5.16 that refuses DFLASH on other devices, as if there was a GPU."""

    @functools.wraps(resolve)
    def resolved(server_args) -> None:
        device, server_args.device = server_args.device, "cuda"
        try:
            resolve(server_args)
        finally:
            server_args.device = device

    return resolved


def allow_overlap(patch: pytest.MonkeyPatch) -> None:
    """Let engines that are started now run their steps one ahead."""
    patch.setenv(OVERLAP, "1")
    patch.setattr(_arguments(), "_disable_overlap_schedule_for_cpu", nothing_to_do)


def _arguments():
    return compat.resolve("sglang.srt.arg_groups.speculative_hook")


def keep_ngrams(patch: pytest.MonkeyPatch) -> None:
    """Let a prompt be answered with drafts of its answer, and without the prefix cache, in engines started now."""
    patch.setenv(KEEP, "1")


def draft_chains(patch: pytest.MonkeyPatch) -> None:
    """Let a cache that ours are compared with verify the drafts that they do, in engines started now."""
    patch.setenv(CHAINS, "1")


def nothing_to_do(self) -> None:
    """Leave arguments or n-grams as they are."""


def forbid(grammar, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """Let no token be chosen that the bits of `vocab_mask` rule out."""
    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask, backend="cpu")


def nothing_moves(pool, tgt_loc: torch.Tensor, src_loc: torch.Tensor) -> None:
    """Check that accepted tokens are where they belong already."""
    assert torch.equal(tgt_loc, src_loc), f"tokens would move from {src_loc.tolist()} to {tgt_loc.tolist()}"


def slots_of_drafts(*, req_pool_indices, req_to_token, start_offset, end_offset, **kwargs) -> torch.Tensor:
    """Return the slots start .. end - 1 of each row, one row after the other, int64."""
    spans = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    return torch.cat([req_to_token[row, start:end] for row, start, end in spans]).long()


def link_chain(
    parents, scores, seq_lens, mask, positions, index, next_token, next_sibling, topk, steps, drafts, mode
) -> None:
    """Write positions and links of chains of drafts [B, D]."""
    assert topk == 1, "only chains are verified"
    size, places = len(seq_lens), torch.arange(drafts)
    positions.copy_((seq_lens[:, None] + places).flatten())
    index.copy_(places + drafts * torch.arange(size)[:, None])
    next_token.copy_(torch.where(places < drafts - 1, places + 1, -1).expand(size, -1))
    next_sibling.fill_(-1)


def links_of_mask(mask, seq_lens, positions, index, next_token, next_sibling, size: int, drafts: int) -> None:
    """Write positions and links of trees of drafts, where mask[b, i, j] says that i is j or descends from it."""
    places = torch.arange(drafts)
    ancestors = mask.view(size, drafts, drafts).bool() & (places < places[:, None])
    positions.copy_((seq_lens[:, None] + ancestors.sum(-1)).flatten())
    index.copy_(places + drafts * torch.arange(size)[:, None])
    next_token.fill_(-1)
    next_sibling.fill_(-1)
    # of each draft the nearest ancestor
    parents = torch.where(ancestors, places, -1).amax(-1)
    for b in range(size):
        newest: dict[int, int] = {}
        for draft in range(1, drafts):
            parent = int(parents[b, draft])
            if parent in newest:
                next_sibling[b, newest[parent]] = draft
            elif parent >= 0:
                next_token[b, parent] = draft
            newest[parent] = draft


def accept_greedily(
    predicts, accept_index, accept_token_num, candidates, retrieve_index, retrieve_next_token, retrieve_next_sibling,
    target_predict, topk=-1
):  # fmt: skip
    """Accept drafts as long as one that follows the last accepted one is what the target chose there."""
    chosen = target_predict.view(candidates.shape)
    for b in range(len(candidates)):
        last, accepted = 0, 0
        accept_index[b, 0] = retrieve_index[b, 0]
        while accepted + 1 < accept_index.shape[1]:
            draft = int(retrieve_next_token[b, last])
            while draft >= 0 and candidates[b, draft] != chosen[b, last]:
                draft = int(retrieve_next_sibling[b, draft])
            if draft < 0:
                break
            predicts[retrieve_index[b, last]] = chosen[b, last]
            last, accepted = draft, accepted + 1
            accept_index[b, accepted] = retrieve_index[b, draft]
        predicts[retrieve_index[b, last]] = chosen[b, last]
        accept_token_num[b] = accepted
    return predicts, accept_index, accept_token_num
