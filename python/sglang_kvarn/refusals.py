# SPDX-License-Identifier: Apache-2.0
"""What a kvarn cache does not serve: one sentence each, with what is expected, what came, why and what to do."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from kvarn_kernels.config import SUPPORTED_HEAD_DIMS, KVarNConfig
from kvarn_kernels.shape import AttentionShape

from sglang_kvarn import capacity, compat, settings, storage_keys
from sglang_kvarn.drafts import DFLASH, NGRAM, algorithm_of
from sglang_kvarn.refused import Refused

UNTESTED_HICACHE_ENV, UNTESTED_DRAFTS_ENV = "KVARN_UNTESTED_HICACHE", "KVARN_UNTESTED_DRAFTS"
UNTESTED_WINDOWS_ENV, UNTESTED_RANKS_ENV = "KVARN_UNTESTED_WINDOWS", "KVARN_UNTESTED_RANKS"
UNTESTED_TRANSFERS_ENV = "KVARN_UNTESTED_TRANSFERS"
# what SGLang calls the orders of pages in host memory between which a host pool of records need not choose
HOST_LAYOUTS = ("page_first", "layer_first")
# the one of them that SGLang has for states, and copies what a draft model keeps in
_PAGE_FIRST = "page_first"
MIN_POOL_TOKENS = capacity.MIN_PAGES * settings.PAGE_SIZE

_NOT_A_SLOT = f"it copies single tokens, and {settings.PAGE_SIZE} tokens share one record"
_OTHER_LAYOUT = "it changes the layout of a 16-bit cache"
_CONTEXT_PARALLEL = "context parallelism writes the cache outside the attention backend"
_TWO_BATCHES = "two batches would share one set of decode buffers"
_TREE = "the tokens of an accepted branch would have to move to other places of a page"
_SESSION = "a session may be cut back into a page that is already quantised"

_FULL_LAYERS = {"full_attention", "attention"}
_STATE_LAYERS = {"linear_attention", "mamba"}
_SLIDING_LAYERS = {"sliding_attention"}
# Step 3.5, and 3.7 with the same text part. SGLang hands its backends their window as the tokens before the query's
# own, so that a query sees one more than in transformers, whatever the cache
_STEP = ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration")
# models of which some layers have a sliding window in a pool of SGLang's, as tested, with the version of SGLang from
# which on
WITH_WINDOWS = dict.fromkeys(("GptOssForCausalLM", "LagunaForCausalLM", "MellumForCausalLM"), "0")
WITH_WINDOWS |= dict.fromkeys(_STEP, "0.5.23")
# models with sliding windows whose layers SGLang all gives one pool, so that windows are read from records, as tested
# (Olmo 3 has the architecture of Olmo 2), with that version
WINDOWS_IN_RECORDS = {"Gemma3ForCausalLM": "0", "Olmo2ForCausalLM": "0.5.23"}
# of both, those that have answered right on a GPU, from a version of SGLang on
_WINDOWS_ON_GPUS = ("GptOssForCausalLM", "LagunaForCausalLM", "Olmo2ForCausalLM", "Gemma3ForCausalLM")
# heads that have drafted for them there
_HEADS_ON_GPUS = {"GptOssForCausalLM": ("EAGLE3",)}
_WINDOWS_ON_GPUS_SINCE = "0.5.23"
# models with sliding windows that have gone from one server to another while drafts were verified
_SENT_WITH_DRAFTS = ("GptOssForCausalLM", "LagunaForCausalLM")
# models with sliding windows that have run beside DP attention, without drafts, and the version of SGLang with which
# these and states of gated delta nets have
_WINDOWS_BESIDE_RANKS, _BESIDE_RANKS_SINCE = ("GptOssForCausalLM",), "0.5.23"
# drafts that are tested beside states of Mamba-2, and models that hand DFLASH their hidden states, from a version of
# SGLang on; with a head of EAGLE3 none of them starts in 0.5.23
_DRAFTS_BESIDE_MAMBA2 = (NGRAM, "STANDALONE")
_DFLASH_BESIDE_MAMBA2 = {"NemotronHForCausalLM": "0.5.23"}
# drafts beside states that have answered right on a GPU with any version; SGLang resolves NEXTN to EAGLE
_DRAFTS_BESIDE_STATES_ON_GPUS = (NGRAM, "NEXTN", "EAGLE")
# drafts with which answers of tenants were compared on a GPU beside host memory
_DRAFTS_COMPARED_ON_GPUS = (NGRAM, "STANDALONE")
# the version of SGLang from which on they were, and all drafts have answered right beside states
_DRAFTS_ON_GPUS_SINCE = "0.5.23"
# drafts that are tested beside sliding windows: those of the two last come from heads with full attention
_DRAFTS_BESIDE_WINDOWS = (NGRAM, "EAGLE", "EAGLE3")
# SGLang has heads of Step with windows only, several at a time
_DRAFTS_OF_MODEL = dict.fromkeys(_STEP, (NGRAM,))
# models whose configuration has a `sliding_window_pattern`, if only an empty one: SGLang insists on its own backends
_OWN_BACKENDS = ("Exaone4ForCausalLM", "ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM")
_BIDIRECTIONAL = "attention to later tokens, as encoders have"
# what SGLang writes into the code of a model, so that no configuration shows it
_IN_CODE = {
    **dict.fromkeys(("BertModel", "BertForSequenceClassification", "Contriever", "CLIPModel"), _BIDIRECTIONAL),
    **dict.fromkeys(("XLMRobertaModel", "XLMRobertaForSequenceClassification"), _BIDIRECTIONAL),
    **dict.fromkeys(("EmbeddingGemmaModel", "HrmTextForCausalLM"), _BIDIRECTIONAL),
    # diffusion models, also where --dllm-algorithm is not given
    **dict.fromkeys(("LLaDA2MoeModelLM", "SDARForCausalLM", "SDARMoeForCausalLM"), _BIDIRECTIONAL),
    **dict.fromkeys(("Grok1ForCausalLM", "Grok1ModelForCausalLM"), "a logit cap"),
}


@dataclass(frozen=True)
class Refusal:
    """Describe one combination of arguments that is refused.

    Attributes:
        applies: reads ServerArgs, as typed and as `compat.resolved_arguments` returns them.
        text: the sentence, with {preset} and {args} in it: what is expected, what came, why, what to do.
        typed: whether it can be read as typed, before SGLang resolves the arguments; resolved: afterwards.
    """

    applies: Callable[[Any], bool]
    text: str
    typed: bool = True
    resolved: bool = True

    def sentence(self, server_args: Any) -> str:
        """Return the whole message."""
        return self.text.format(preset=server_args.kv_cache_dtype, args=server_args)


def _text(what: str, why: str, drop: str) -> str:
    """Return the sentence about a feature that is not served."""
    return f"{what} cannot be combined with --kv-cache-dtype {{preset}}, because {why}: {drop}"


def _flag(name: str, why: str, *, off: Any = False) -> Refusal:
    """Return the refusal of an argument that has any other value than `off`."""
    option = "--" + name.replace("_", "-")
    return Refusal(lambda args: compat.argument(args, name, off) != off, _text(option, why, f"drop {option}"))


# the most drafts of a step: fewer than a page has tokens, so that padded requests stay on page 0
MAX_DRAFT_TOKENS = settings.PAGE_SIZE - 2
# algorithms whose drafts follow one another; a verify step reads what stands before each
CHAINS = (NGRAM, "STANDALONE", "EAGLE", "EAGLE3", "NEXTN", DFLASH)
_OTHER_DRAFTS = {
    "DSPARK": "its requests have different numbers of drafts in a step",
    "FROZEN_KV_MTP": "its draft model reads the cache of the target",
    "UNO": "it drafts with the target itself",
}


def _splits_pages(args: Any, ranks: int = 1) -> bool:
    size = args.chunked_prefill_size or 0
    return size > 0 and size % (settings.PAGE_SIZE * ranks) != 0


def _one_of(names: Sequence[str]) -> str:
    """Return names as a sentence lists them."""
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last


def _other_drafts(name: str | None, why: str) -> Refusal:
    """Return the refusal of an algorithm by name; None: of all that are not chains."""

    def applies(args: Any) -> bool:
        found = algorithm_of(args)
        return found not in ("", *CHAINS) if name is None else found == name

    what = "--speculative-algorithm {args.speculative_algorithm}"
    return Refusal(applies, _text(what, why, f"set it to {_one_of(CHAINS)}"))


def _host_memory(applies: Callable[[Any], bool], what: str, why: str, way_out: str, typed: bool = True) -> Refusal:
    """Return a refusal beside --enable-hierarchical-cache."""
    return Refusal(lambda args: args.enable_hierarchical_cache and applies(args), _text(what, why, way_out), typed)


def _has_draft_model(args: Any) -> bool:
    return algorithm_of(args) not in ("", NGRAM)


_HICACHE = "--enable-hierarchical-cache"
_STORAGES = ("file",)
_ONLY_FILES = "only files are tested"
_LONG_NAME = (
    "files are named by the model, too, and with the name that it is served by, its path by default, theirs would be "
    f"longer than {storage_keys.NAME_BYTES} bytes"
)
_NO_SALT = "this version of SGLang leaves the salt of a request out of the keys, so that tenants would share pages"


def _has_long_name(args: Any) -> bool:
    """Return whether no file could be named by the model."""
    name, preset = args.served_model_name or args.model_path, KVarNConfig.from_preset(args.kv_cache_dtype)
    return len(name.encode()) > storage_keys.longest_model_name(preset.name)


def _is_trial(device: str, variable: str) -> bool:
    """Return whether a device is a GPU, where something has not been shown to be right, and nobody asked to try it."""
    return device != "cpu" and os.environ.get(variable) != "1"


def _trial_of_host_memory(applies: Callable[[Any], bool], beside: str) -> Refusal:
    """Return a refusal of host memory on a GPU that a variable lifts."""

    def untested(args: Any) -> bool:
        return applies(args) and _is_trial(args.device, UNTESTED_HICACHE_ENV)

    why = f"on a GPU answers of tenants beside {beside} were not compared"
    way_out = f"drop {_HICACHE}, or set {UNTESTED_HICACHE_ENV}=1 to try it"
    return _host_memory(untested, _HICACHE, why, way_out, typed=False)


_HOST_MEMORY = (
    _host_memory(
        lambda args: not compat.fences_host_copies(),
        _HICACHE,
        "this version of SGLang may copy a page to host memory before its record is written",
        f"drop {_HICACHE}, or use SGLang 0.5.23",
    ),
    _trial_of_host_memory(
        lambda args: algorithm_of(args) not in ("", *_DRAFTS_COMPARED_ON_GPUS),
        f"drafts other than {' and '.join(_DRAFTS_COMPARED_ON_GPUS)}",
    ),
    _trial_of_host_memory(
        lambda args: (
            algorithm_of(args) in _DRAFTS_COMPARED_ON_GPUS and not compat.is_since(_DRAFTS_ON_GPUS_SINCE)
        ),
        f"drafts before SGLang {_DRAFTS_ON_GPUS_SINCE}",
    ),
    _trial_of_host_memory(lambda args: args.disaggregation_mode != "null", "PD disaggregation"),
    _host_memory(
        lambda args: args.hicache_storage_backend is not None and not compat.salts_storage_keys(),
        "--hicache-storage-backend",
        _NO_SALT,
        "drop --hicache-storage-backend, or use SGLang 0.5.23",
    ),
    _host_memory(
        lambda args: args.hicache_storage_backend not in (None, *_STORAGES),
        "--hicache-storage-backend {args.hicache_storage_backend}",
        _ONLY_FILES,
        "drop --hicache-storage-backend, or set it to file",
    ),
    _host_memory(
        lambda args: args.hicache_storage_backend == "file" and _has_long_name(args),
        "--hicache-storage-backend file",
        _LONG_NAME,
        "give the model a shorter name by --served-model-name",
    ),
    _host_memory(
        lambda args: args.hicache_io_backend != "kernel",
        "--hicache-io-backend {args.hicache_io_backend}",
        "only copies by a kernel are tested",
        "drop --hicache-io-backend, or set it to kernel",
        typed=False,
    ),
    _host_memory(
        lambda args: args.hicache_mem_layout not in HOST_LAYOUTS,
        "--hicache-mem-layout {args.hicache_mem_layout}",
        "pages of records lie in one order only, whose names are page_first and layer_first",
        "drop --hicache-mem-layout",
        typed=False,
    ),
    _host_memory(
        lambda args: compat.argument(args, "hicache_host_memory_mode", "cache") != "cache",
        "--hicache-host-memory-mode {args.hicache_host_memory_mode}",
        "host memory that only stages pages for a storage is not tested",
        "drop --hicache-host-memory-mode",
    ),
    _host_memory(
        lambda args: (
            _has_draft_model(args)
            and args.hicache_mem_layout != _PAGE_FIRST
            and not compat.moves_host_indices_by_pool()
        ),
        "--hicache-mem-layout {args.hicache_mem_layout} beside the draft model of --speculative-algorithm",
        f"this version of SGLang copies what it keeps of one in the order {_PAGE_FIRST} only beside records",
        "drop --hicache-mem-layout, or use SGLang 0.5.23",
        typed=False,
    ),
)

# SGLang ignores the first flag without the second, and calls both --attn-dp-size from 0.5.23 on
_DP_FLAGS = "--enable-dp-attention with --dp-size {args.dp_size}"
_DP_ATTENTION = "ranks with requests of their own have run beside records on a CPU only, not on a GPU yet"
_DROP_DP_ATTENTION = "--enable-dp-attention and --attn-dp-size"
# drafts that are tested beside it; SGLang takes NEXTN for EAGLE, and refuses NGRAM and STANDALONE there itself
_DRAFTS_BESIDE_RANKS = ("EAGLE", "EAGLE3", "NEXTN")
_PIPELINE = "a pipeline has run with SGLang 0.5.23 only"


def _has_dp_flags(args: Any) -> bool:
    return args.enable_dp_attention and args.dp_size > 1


def _has_attn_dp(args: Any) -> bool:
    return compat.argument(args, "attn_dp_size", 1) > 1


def _own_requests(args: Any) -> int:
    """Return how many groups of ranks have requests of their own, 1 without DP attention."""
    return args.attn_dp_size if _has_attn_dp(args) else args.dp_size if _has_dp_flags(args) else 1


def _has_dp_attention(args: Any) -> bool:
    return _own_requests(args) > 1


def _untested_ranks(applies: Callable[[Any], bool], what: str, why: str, drop: str) -> Refusal:
    """Return a refusal that a variable lifts."""

    def untested(args: Any) -> bool:
        return applies(args) and os.environ.get(UNTESTED_RANKS_ENV) != "1"

    return Refusal(untested, _text(what, why, f"drop {drop}, or set {UNTESTED_RANKS_ENV}=1 to try it"))


def _beside_pipeline(name: str, *, off: Any) -> Refusal:
    """Return the refusal of an argument beside --pp-size that has any other value than `off`."""
    option = "--" + name.replace("_", "-")
    text = _text(f"--pp-size with {option}", "nothing is tested beside a pipeline", f"drop --pp-size or {option}")
    return Refusal(lambda args: args.pp_size > 1 and getattr(args, name) != off, text)


_RANKS = (
    _untested_ranks(
        lambda args: _has_dp_attention(args) and algorithm_of(args) not in ("", *_DRAFTS_BESIDE_RANKS),
        "--speculative-algorithm {args.speculative_algorithm} with DP attention",
        f"beside ranks with requests of their own drafts of {_one_of(_DRAFTS_BESIDE_RANKS)} only are tested",
        f"--speculative-algorithm, or {_DROP_DP_ATTENTION}",
    ),
    _untested_ranks(
        lambda args: args.device != "cpu" and _has_dp_flags(args),
        _DP_FLAGS,
        _DP_ATTENTION,
        "--enable-dp-attention and --dp-size",
    ),
    _untested_ranks(
        lambda args: args.device != "cpu" and _has_attn_dp(args),
        "--attn-dp-size {args.attn_dp_size}",
        _DP_ATTENTION,
        "--attn-dp-size",
    ),
    _beside_pipeline("tp_size", off=1),
    _beside_pipeline("enable_hierarchical_cache", off=False),
    _beside_pipeline("speculative_algorithm", off=None),
    _untested_ranks(
        lambda args: args.pp_size > 1 and not compat.runs_pipelines(),
        "--pp-size {args.pp_size}",
        _PIPELINE,
        "--pp-size",
    ),
)


_MODE = "--disaggregation-mode {args.disaggregation_mode}"
# what SGLang calls mooncake, and mooncake without RDMA
_TRANSFERS = ("mooncake", "mooncake_tcp")
# drafts with which a decode server of SGLang goes on from what it received; the others have nothing to start from
_DRAFTS_OF_TRANSFERS = ("EAGLE", "EAGLE3", "NEXTN", DFLASH)


def _transfer(applies: Callable[[Any], bool], what: str, why: str, way_out: str, typed: bool = True) -> Refusal:
    """Return a refusal beside --disaggregation-mode."""
    return Refusal(lambda args: args.disaggregation_mode != "null" and applies(args), _text(what, why, way_out), typed)


def _transfer_flag(name: str, why: str, *, off: Any = False) -> Refusal:
    """Return the refusal of an argument beside --disaggregation-mode that has any other value than `off`."""
    option = "--" + name.replace("_", "-")
    what = f"{option} with --disaggregation-mode"
    return _transfer(lambda args: getattr(args, name) != off, what, why, f"drop {option}")


_PD = (
    _transfer(
        lambda args: not compat.transfers_requests(),
        _MODE,
        f"the transfer between servers is tested with SGLang {compat.TRANSFERS_SINCE} only",
        f"use SGLang {compat.TRANSFERS_SINCE}, or drop --disaggregation-mode",
    ),
    _transfer(
        lambda args: args.disaggregation_transfer_backend not in _TRANSFERS,
        "--disaggregation-transfer-backend {args.disaggregation_transfer_backend}",
        "only transfers by mooncake are tested",
        f"drop --disaggregation-transfer-backend, or set it to {' or '.join(_TRANSFERS)}",
    ),
    _transfer(
        lambda args: args.disaggregation_decode_retraction_backup not in (None, "cpu_tensor"),
        "--disaggregation-decode-retraction-backup {args.disaggregation_decode_retraction_backup}",
        "only cpu_tensor keeps the exact tokens of a request that is retracted",
        "drop --disaggregation-decode-retraction-backup, or set it to cpu_tensor",
    ),
    _transfer_flag(
        "disaggregation_decode_enable_radix_cache",
        "a prefix that the decode server has was read as records there, and exactly by the prefill server",
    ),
    _transfer_flag("disaggregation_decode_enable_offload_kvcache", "host memory of a decode server is not tested"),
    _transfer_flag(
        "disaggregation_decode_allocation_policy",
        "SGLang sends no state of a request, as its exact tokens are, with this policy",
        off="early",
    ),
    _transfer_flag(
        "disaggregation_decode_host_receive_threshold", "host memory has no place for exact tokens", off=1.0
    ),
    _transfer_flag("disaggregation_enable_kv_checksum", "SGLang computes checksums on a GPU, where none was tested"),
    _transfer_flag("optimistic_prefill_attempts", "a prompt that is computed twice is not tested here", off=0),
    _transfer_flag("enable_pd_role_switch", "a server that changes its role is not tested"),
    _transfer(
        lambda args: args.enable_hierarchical_cache and args.hicache_storage_backend is not None,
        "--hicache-storage-backend with --disaggregation-mode",
        "files behind host memory are not tested beside transfers between servers",
        "drop --hicache-storage-backend",
    ),
    _transfer(
        lambda args: args.enable_hierarchical_cache and args.disaggregation_mode == "decode",
        f"{_HICACHE} with --disaggregation-mode decode",
        "a decode server has no prefix cache whose pages could leave the device",
        f"drop {_HICACHE}; a server for prompts takes it",
    ),
    _transfer_flag("pp_size", "a pipeline beside transfers between servers is not tested", off=1),
    _transfer(
        _has_dp_attention,
        "DP attention with --disaggregation-mode",
        "ranks with requests of their own are not tested beside transfers between servers",
        f"drop {_DROP_DP_ATTENTION}",
    ),
    _transfer(
        lambda args: algorithm_of(args) not in ("", *_DRAFTS_OF_TRANSFERS),
        "--speculative-algorithm {args.speculative_algorithm} with --disaggregation-mode",
        f"a decode server of SGLang {compat.TRANSFERS_SINCE} ends with its first request then, whatever its cache",
        f"drop --speculative-algorithm, or set it to {_one_of(_DRAFTS_OF_TRANSFERS)}",
    ),
    _transfer(
        lambda args: algorithm_of(args) != "" and _is_trial(args.device, UNTESTED_TRANSFERS_ENV),
        "--speculative-algorithm with --disaggregation-mode",
        "drafts beside transfers between servers have run on a CPU only",
        f"drop --speculative-algorithm, or set {UNTESTED_TRANSFERS_ENV}=1 to try it",
        typed=False,
    ),
    _transfer_flag(
        "speculative_draft_window_size", "what a draft model keeps in rows of its own is not sent", off=None
    ),
    _transfer(
        lambda args: compat.envs.SGLANG_DISAGG_STAGING_BUFFER.get(),
        "SGLANG_DISAGG_STAGING_BUFFER with --disaggregation-mode",
        "it regroups single tokens by their heads, and 128 of them share a record",
        "unset the variable",
    ),
    _transfer(
        lambda args: not compat.envs.SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE.get(),
        "SGLANG_DISAGGREGATION_DEFERRED_DECODE_KV_RELEASE=0 with --disaggregation-mode",
        "pages of a request that was aborted would go to another while they are still written",
        "unset the variable",
    ),
)

ARGUMENTS = (
    Refusal(
        lambda args: args.attention_backend != settings.ATTENTION_BACKEND and not compat.splits_sliding_windows(args),
        "--kv-cache-dtype {preset} needs the attention backend kvarn, not {args.attention_backend}, because no other"
        " one reads its records: drop --attention-backend, or --kv-cache-dtype for a model that needs another backend",
    ),
    Refusal(
        lambda args: (
            not {args.prefill_attention_backend, args.decode_attention_backend} <= {None, settings.ATTENTION_BACKEND}
            and not compat.splits_sliding_windows(args)
        ),
        "--kv-cache-dtype {preset} needs the attention backend kvarn for prefill and decode, because no other one"
        " reads its records: drop --prefill-attention-backend and --decode-attention-backend",
    ),
    Refusal(
        lambda args: args.page_size != settings.PAGE_SIZE,
        f"--kv-cache-dtype {{preset}} needs a page size of {settings.PAGE_SIZE}, not {{args.page_size}}, because a"
        " page is one quantisation tile: drop --page-size",
    ),
    Refusal(
        lambda args: args.device not in (None, "cuda", "cpu") or torch.version.hip is not None,
        "--kv-cache-dtype {preset} needs an NVIDIA GPU or a CPU, because its kernels are tested on nothing else:"
        " drop --kv-cache-dtype",
    ),
    Refusal(
        lambda args: _has_dp_attention(args) and _splits_pages(args, _own_requests(args)),
        f"--kv-cache-dtype {{preset}} needs a --chunked-prefill-size that is a multiple of the page size"
        f" {settings.PAGE_SIZE} for each rank of DP attention, among which SGLang divides it, not"
        f" {{args.chunked_prefill_size}}: set it to a multiple of {settings.PAGE_SIZE} times their number",
        # then it is divided
        resolved=False,
    ),
    Refusal(
        _splits_pages,
        f"--kv-cache-dtype {{preset}} needs a --chunked-prefill-size that is a multiple of the page size"
        f" {settings.PAGE_SIZE}, or -1 for prompts in one piece, not {{args.chunked_prefill_size}}:"
        f" set it to a multiple of {settings.PAGE_SIZE}",
    ),
    Refusal(
        lambda args: args.max_total_tokens is not None and args.max_total_tokens < MIN_POOL_TOKENS,
        f"--kv-cache-dtype {{preset}} needs a --max-total-tokens of at least {MIN_POOL_TOKENS}, not"
        f" {{args.max_total_tokens}}, because a request takes a page of {settings.PAGE_SIZE} tokens for its prompt, one"
        " for its answer and one that SGLang keeps free: raise --max-total-tokens",
    ),
    *(_other_drafts(name, why) for name, why in _OTHER_DRAFTS.items()),
    _other_drafts(None, "only the verification of SGLang's own chains of drafts is tested"),
    Refusal(
        lambda args: _has_draft_model(args) and args.speculative_eagle_topk not in (None, 1),
        _text("--speculative-eagle-topk {args.speculative_eagle_topk}", _TREE, "set --speculative-eagle-topk 1"),
    ),
    Refusal(
        lambda args: algorithm_of(args) == NGRAM and args.speculative_ngram_max_bfs_breadth != 1,
        _text(
            "--speculative-ngram-max-bfs-breadth {args.speculative_ngram_max_bfs_breadth}",
            _TREE,
            "set --speculative-ngram-max-bfs-breadth 1",
        ),
    ),
    Refusal(
        lambda args: algorithm_of(args) != "" and (args.speculative_num_draft_tokens or 0) > MAX_DRAFT_TOKENS,
        _text(
            "--speculative-num-draft-tokens {args.speculative_num_draft_tokens}",
            "a step may end at most one page",
            f"set it to at most {MAX_DRAFT_TOKENS}",
        ),
    ),
    Refusal(
        lambda args: max(compat.draft_steps(args), default=0) >= MAX_DRAFT_TOKENS,
        _text(
            "--speculative-adaptive-config {args.speculative_adaptive_config}",
            "a step may end at most one page",
            f"let its candidate_steps be less than {MAX_DRAFT_TOKENS}",
        ),
        typed=False,
    ),
    Refusal(
        lambda args: args.speculative_draft_attention_backend == settings.ATTENTION_BACKEND,
        _text(
            "--speculative-draft-attention-backend kvarn",
            "the draft model has a cache of SGLang's own",
            "drop --speculative-draft-attention-backend",
        ),
    ),
    _flag("enable_multi_layer_eagle", "SGLang has such heads of models with windows or latent attention only"),
    *_PD,
    _flag("encoder_only", "an encoder has no KV cache"),
    *_HOST_MEMORY,
    _flag("enable_hisparse", _NOT_A_SLOT),
    _flag("enable_lmcache", _NOT_A_SLOT),
    _flag("enable_flexkv", _NOT_A_SLOT),
    _flag("enable_unified_cache_external_linker", _NOT_A_SLOT),
    _flag("enable_kv_cache_sharding", "it spreads single tokens over ranks, and a page of them is one record"),
    _flag("radix_cache_backend", "only SGLang's own prefix cache is tested", off=None),
    _flag("rl_on_policy_target", "it needs an attention backend that SGLang lists as deterministic", off=None),
    _flag("enable_deterministic_inference", "SGLang does not list the attention backend kvarn as deterministic"),
    _flag("enable_torch_compile", "the compiler would trace the code that launches the kernels"),
    Refusal(
        lambda args: args.cuda_graph_config.prefill.backend in ("full", "tc_piecewise"),
        _text(
            "a full or compiled prefill CUDA graph",
            "the host sizes the extend kernels by the batch",
            "drop --cuda-graph-backend-prefill, or set it to breakable or disabled",
        ),
        typed=False,
    ),
    Refusal(
        lambda args: args.cuda_graph_config.decode.backend in ("breakable", "tc_piecewise"),
        _text(
            "a breakable or compiled decode CUDA graph",
            "only the full decode graph is tested",
            "drop --cuda-graph-backend-decode",
        ),
        typed=False,
    ),
    _flag("enable_memory_saver", "the memory of records and rings cannot be released and restored"),
    _flag("dcp_size", "decode context parallelism spreads the tokens of a page over ranks", off=1),
    _flag("attn_cp_size", _CONTEXT_PARALLEL, off=1),
    _flag("enable_prefill_cp", _CONTEXT_PARALLEL),
    *_RANKS,
    _flag("enable_two_batch_overlap", _TWO_BATCHES),
    _flag("enable_single_batch_overlap", "the overlap is not tested yet"),
    _flag("enable_pdmux", _TWO_BATCHES),
    _flag("dllm_algorithm", "a diffusion model rewrites tokens that are already quantised", off=None),
    _flag("enable_streaming_session", _SESSION),
    _flag("enable_session_radix_cache", _SESSION),
    _flag("enable_mis", "the kernels cannot mask tokens in the middle of a sequence"),
    _flag("enable_page_major_kv_layout", _OTHER_LAYOUT),
    _flag("enable_unified_memory", _OTHER_LAYOUT),
    _flag("prefill_only_disable_kv_cache", "it leaves no cache to quantise"),
    _flag("kv_canary", "it reads the cache token by token, and a token of this cache is part of a record", off="none"),
    _flag("enable_nvidia_megakernel", "its fused steps do not call the attention backend"),
    _flag("use_ray", "Ray actors do not load SGLang's plugins"),
    Refusal(
        lambda args: compat.envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
        _text(
            "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
            "the size of the pool is fixed before CUDA graphs are captured",
            "unset the variable",
        ),
    ),
    Refusal(
        lambda args: algorithm_of(args) != "" and compat.envs.SGLANG_ENABLE_OVERLAP_PLAN_STREAM.get(),
        _text(
            "SGLANG_ENABLE_OVERLAP_PLAN_STREAM with --speculative-algorithm",
            "a step would be described before its drafts have their slots",
            "unset the variable",
        ),
    ),
    Refusal(
        lambda args: compat.envs.SGLANG_USE_HND_KVCACHE.get(),
        _text("SGLANG_USE_HND_KVCACHE", _OTHER_LAYOUT, "unset the variable"),
    ),
)


def check_typed(server_args: Any) -> None:
    """Refuse what the arguments rule out as typed, before SGLang rejects or changes them for another reason.

    Args:
        server_args: ServerArgs with attention backend and page size filled in, not resolved yet.

    Raises:
        Refused: one sentence: what is expected, what came, why, what to do.
    """
    _check_table(server_args, [refusal for refusal in ARGUMENTS if refusal.typed])


def check_arguments(server_args: Any) -> None:
    """Refuse what the arguments and the model's configuration rule out, before any process is spawned.

    Args:
        server_args: as `compat.resolved_arguments` returns them.

    Raises:
        Refused: one sentence: what is expected, what came, why, what to do.
    """
    is_ours = settings.preset_of(server_args) is not None
    if is_ours:
        # the model first: SGLang may have changed arguments on its account, which the user never gave
        _check_model_with(server_args)
    _check_table(server_args, [refusal for refusal in ARGUMENTS if refusal.resolved])
    if is_ours:
        on_cpu = server_args.device == "cpu"
        # there SGLang makes up heads for all ranks, also where each has all heads of its requests
        ranks = server_args.tp_size if on_cpu else compat.attention_ranks(server_args)
        check_ranks(ranks, compat.model_config(server_args), on_cpu=on_cpu)
        check_ranks_of_states(ranks, compat.model_config(server_args))


def _check_table(server_args: Any, refusals: Iterable[Refusal]) -> None:
    if settings.preset_of(server_args) is None:
        if server_args.attention_backend == settings.ATTENTION_BACKEND:
            raise Refused(
                "--attention-backend kvarn needs one of the caches kvarn*, not --kv-cache-dtype "
                f"{server_args.kv_cache_dtype}, because it reads nothing else: "
                "add --kv-cache-dtype kvarn or drop --attention-backend"
            )
        return
    for refusal in refusals:
        if refusal.applies(server_args):
            raise Refused(refusal.sentence(server_args))


def resolve_or_refuse(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Resolve the arguments; where SGLang refuses to and the model is the reason, say so. Hook around resolution.

    SGLang checks the attention backend and the page size that a kvarn cache brings against lists for some models. The
    error that it raises names arguments that the user never gave.

    Raises:
        Refused: the property of the model that is not served; any other error is SGLang's.
    """
    try:
        return original(server_args, *args, **kwargs)
    except Refused:
        raise
    except (AssertionError, RuntimeError, ValueError):
        if settings.preset_of(server_args) is not None:
            _check_model_with(server_args)
        raise


def attach_or_refuse(original: Callable[..., Any], scheduler: Any, recv_req: Any) -> Any:
    """Attach a storage to a running server if one could be given at its start.

    Hook around ``Scheduler.attach_hicache_storage_wrapped``, whose answer says why not.
    """
    if settings.preset_of(scheduler.server_args) is None:
        return original(scheduler, recv_req)
    if not compat.salts_storage_keys():
        why, way_out = _NO_SALT, "use SGLang 0.5.23"
    elif recv_req.hicache_storage_backend not in _STORAGES:
        why, way_out = _ONLY_FILES, f"attach {' or '.join(_STORAGES)}"
    elif _has_long_name(scheduler.server_args):
        why, way_out = _LONG_NAME, "start the server with a shorter --served-model-name"
    elif _has_windows(scheduler.model_config) and _is_trial(compat.published_argument("device"), UNTESTED_WINDOWS_ENV):
        why = "files beside sliding windows have run on a CPU only"
        way_out = f"keep prefixes in memory, or start the server with {UNTESTED_WINDOWS_ENV}=1 to try it"
    elif compat.published_argument("disaggregation_mode") != "null":
        why, way_out = "files are not tested beside transfers between servers", "keep prefixes in memory"
    else:
        return original(scheduler, recv_req)
    what = f"The storage backend {recv_req.hicache_storage_backend}"
    return compat.refuse_storage(_text(what, why, way_out).format(preset=scheduler.server_args.kv_cache_dtype))


def _check_model_with(server_args: Any) -> None:
    model_config = compat.model_config(server_args)
    if server_args.enable_hierarchical_cache:
        # first: SGLang then keeps the windows of some models in another way, for which no user has asked
        check_host_memory_of_windows(model_config, _HICACHE)
    check_model(model_config)
    check_states(server_args, model_config)
    check_windows(server_args, model_config)


def check_host_memory_of_windows(model_config: Any, flag: str) -> None:
    """Refuse host memory for models whose sliding windows SGLang does not keep apart beside it.

    Args:
        model_config: SGLang's ModelConfig; flag: which asks for host memory.

    Raises:
        Refused: the model, why, and what to drop.
    """
    if (model := model_config.hf_config.architectures[0]) in _STEP:
        raise Refused(
            f"{flag} cannot be combined with a kvarn cache of {model}, because beside host memory SGLang keeps all "
            f"tokens of its sliding windows: drop {flag}"
        )


def check_model(model_config: Any) -> None:
    """Refuse models by their configuration (SGLang's ModelConfig).

    Raises:
        Refused: the property of the model that is not served.
    """
    model = model_config.hf_config.architectures[0]
    for applies, what in chain(_attention_properties(model_config), _head_properties(model_config)):
        if applies:
            _refuse_model(model, what)
    if compat.adds_last_residual_twice(compat.hybrid_config(model_config)):
        raise Refused(
            f"a kvarn cache of {model} cannot be tested in SGLang {compat.version()}, which adds the residual of the "
            "last layer twice, whatever the cache: take SGLang 0.5.23 or drop --kv-cache-dtype"
        )


def _attention_properties(model_config: Any) -> Iterator[tuple[bool, str]]:
    """Yield what rules a model out by which tokens attend to which, and how."""
    config, text = model_config.hf_config, model_config.hf_text_config
    kinds, architectures = set(getattr(text, "layer_types", None) or ()), set(config.architectures)
    has_pattern = getattr(config, "sliding_window_pattern", None) is not None
    owns = has_pattern and bool(architectures & set(_OWN_BACKENDS))
    yield owns, "attention backends of its own in SGLang (fa3, triton, trtllm_mha)"
    # before the others: Inkling's state cannot be asked for before SGLang publishes its arguments
    is_window_model = compat.is_window_model(model_config) or bool(_SLIDING_LAYERS & kinds)
    is_split, is_kept = (
        architectures <= {name for name, since in names.items() if compat.is_since(since)}
        for names in (WITH_WINDOWS, WINDOWS_IN_RECORDS)
    )
    later = "".join(
        f" before SGLang {since}"
        for name, since in (WITH_WINDOWS | WINDOWS_IN_RECORDS).items()
        if name in architectures
    )
    yield is_window_model and not (is_split or is_kept), f"sliding-window layers of a kind that is not tested{later}"
    is_served = is_window_model and is_split and model_config.is_hybrid_swa
    keeps_all = is_window_model and is_split and not is_served
    yield keeps_all, "sliding-window layers, of which --disable-hybrid-swa-memory keeps all tokens"
    if is_served:
        layers = (0, model_config.num_hidden_layers)
        both = (compat.attention_layers(model_config, *layers), compat.sliding_layers(model_config, *layers))
        yield not all(both), "only layers with full attention or only sliding-window layers in a pool for both"
    yield model_config.attention_arch.name == "MLA", "latent attention (MLA)"
    yield compat.is_sparse(model_config), "sparse attention (to tokens that an index chooses)"
    states = compat.hybrid_config(model_config)
    is_known = states is not None and compat.keeps_known_states(states)
    yield states is not None and not is_known, f"states of a kind that is not tested ({type(states).__name__})"
    yield model_config.attention_arch.name != "MHA", f"attention of kind {model_config.attention_arch.name}"
    yield getattr(config, "dual_chunk_attention_config", None) is not None, "dual-chunk attention"
    yield getattr(model_config, "attention_chunk_size", None) is not None, "chunked attention"
    yield (getattr(text, "loop_num", None) or 1) > 1, "loops over its layers, with windows from the second one on"
    kinds -= _FULL_LAYERS | (_STATE_LAYERS if is_known else set())
    kinds -= _SLIDING_LAYERS if is_served or is_kept else set()
    yield bool(kinds), f"layers of type {', '.join(sorted(kinds))}"
    yield model_config.is_encoder_decoder, "cross attention"
    bidirectional = getattr(text, "use_bidirectional_attention", None) or getattr(text, "is_causal", None) is False
    yield bool(bidirectional), _BIDIRECTIONAL
    yield bool(model_config.has_attention_sinks) and not is_served, "attention sinks"
    yield getattr(text, "attn_logit_softcapping", None) is not None, "a logit cap"
    yield getattr(model_config, "use_alibi", False), "a bias by position (ALiBi)"
    yield (getattr(text, "num_kv_shared_layers", None) or 0) > 0, "layers that share another layer's keys and values"
    for architecture in config.architectures:
        yield architecture in _IN_CODE, _IN_CODE.get(architecture, "")
        is_causal = compat.calls_attention_causal(architecture)
        yield not is_causal, f"attention that SGLang {compat.version()}, unlike 0.5.23, does not call causal"


def _head_properties(model_config: Any) -> Iterator[tuple[bool, str]]:
    """Yield what rules a model out by the shape of its heads."""
    keys, values = model_config.head_dim, model_config.v_head_dim
    yield keys not in SUPPORTED_HEAD_DIMS, f"head_dim {keys}"
    yield values != keys, f"values of {values} and keys of {keys} channels"
    yield compat.query_heads(model_config) is None, "layers with different numbers of query heads"


def check_states(server_args: Any, model_config: Any) -> None:
    """Refuse arguments with which SGLang cannot keep states of a hybrid model beside pages of 128 tokens.

    Args:
        server_args: ServerArgs, resolved or on the way; model_config: SGLang's ModelConfig.

    Raises:
        Refused: one sentence: what is expected, what came, why, what to do.
    """
    if (states := compat.hybrid_config(model_config)) is None:
        return
    args, model = compat.resolved_arguments(server_args), model_config.hf_config.architectures[0]
    algorithm = algorithm_of(args)
    _check_drafts_beside_states(algorithm, states, model)
    if algorithm and args.speculative_adaptive:
        raise Refused(
            f"--speculative-adaptive cannot be combined with a kvarn cache of {model}, because a changing number of "
            "drafts is not tested beside states yet: drop --speculative-adaptive"
        )
    if not _have_drafts_run_beside_states(algorithm) and _is_trial(args.device, UNTESTED_DRAFTS_ENV):
        raise Refused(
            f"--speculative-algorithm {algorithm} cannot be combined with a kvarn cache of {model} on a GPU in SGLang "
            f"{compat.version()}, because beside states drafts of that kind have run on a CPU only: use SGLang "
            f"{_DRAFTS_ON_GPUS_SINCE}, set it to {NGRAM}, or set {UNTESTED_DRAFTS_ENV}=1 to try it"
        )
    if algorithm and not compat.verifies_drafts(states):
        raise Refused(
            f"--speculative-algorithm {algorithm} cannot be combined with {model} in SGLang {compat.version()}, whose "
            "layers with states stop at drafts: take SGLang 0.5.23 or drop --speculative-algorithm"
        )
    if args.pp_size > 1:
        raise Refused(
            f"--pp-size {args.pp_size} cannot be combined with a kvarn cache of {model}, because a pipeline of "
            "layers with states is not tested yet: drop --pp-size"
        )
    if not (compat.has_gated_delta_nets(states) and compat.is_since(_BESIDE_RANKS_SINCE)):
        _check_dp_attention_beside(args, model, "states of its kind")
    if args.enable_mixed_chunk:
        raise Refused(
            f"--enable-mixed-chunk cannot be combined with a kvarn cache of {model}, because states would be saved at "
            "other tokens than pages end, which is not tested yet: drop --enable-mixed-chunk"
        )
    _check_transfers_beside(args, model, "states")
    if args.enable_hierarchical_cache:
        _check_host_states(args, model)
    if args.disable_radix_cache:
        return
    if not compat.saves_states_at_page_ends():
        raise Refused(
            f"a prefix cache for the states of {model} needs SGLang 0.5.20 or later beside a kvarn cache, because "
            f"{compat.version()} saves states of other tokens if pages have {settings.PAGE_SIZE}: take SGLang 0.5.23 "
            "or add --disable-radix-cache"
        )
    if not compat.checkpoints_states(server_args, model_config):
        raise Refused(
            f"a prefix cache for the states of {model} with --linear-attn-backend {args.linear_attn_backend} needs "
            f"pages of one token in SGLang {compat.version()}, and a kvarn cache pages of {settings.PAGE_SIZE}: add "
            "--disable-radix-cache or drop --kv-cache-dtype"
        )
    if args.mamba_radix_cache_strategy == "no_buffer":
        raise Refused(
            "--mamba-radix-cache-strategy no_buffer needs pages of one token, and a kvarn cache pages of "
            f"{settings.PAGE_SIZE}: drop --mamba-radix-cache-strategy"
        )
    if args.mamba_track_interval % settings.PAGE_SIZE:
        raise Refused(
            f"a kvarn cache needs a --mamba-track-interval that is a multiple of the page size {settings.PAGE_SIZE}, "
            f"not {args.mamba_track_interval}: drop --mamba-track-interval"
        )


def check_drafts(algorithm: str, model_config: Any) -> None:
    """Refuse drafts that are not tested beside the states or the sliding windows of a model.

    Args:
        algorithm: as `algorithm_of` returns it; model_config: SGLang's ModelConfig.

    Raises:
        Refused: the algorithm, the model, and what is tested.
    """
    model = model_config.hf_config.architectures[0]
    if (states := compat.hybrid_config(model_config)) is not None:
        _check_drafts_beside_states(algorithm, states, model)
    elif _has_windows(model_config):
        _check_drafts_beside_windows(algorithm, model)


def _check_drafts_beside_states(algorithm: str, states: Any, model: str) -> None:
    _check_drafts_beside("states of its kind", algorithm, model, _drafts_beside(states, model))


def _check_drafts_beside_windows(algorithm: str, model: str) -> None:
    tested = _DRAFTS_OF_MODEL.get(model, _DRAFTS_BESIDE_WINDOWS)
    _check_drafts_beside("sliding windows", algorithm, model, tested)


def _check_drafts_beside(what: str, algorithm: str, model: str, tested: tuple[str, ...]) -> None:
    if algorithm not in ("", *tested):
        raise Refused(
            f"--speculative-algorithm {algorithm} cannot be combined with a kvarn cache of {model}, because drafts of "
            f"that kind are not tested beside {what} yet: set it to {_one_of(tested)}"
        )


def _have_drafts_run_beside_states(algorithm: str) -> bool:
    return algorithm in ("", *_DRAFTS_BESIDE_STATES_ON_GPUS) or compat.is_since(_DRAFTS_ON_GPUS_SINCE)


def _have_drafts_run_beside_windows(algorithm: str, model: str) -> bool:
    return algorithm in ("", NGRAM, *_HEADS_ON_GPUS.get(model, ()))


def _have_drafts_been_compared(algorithm: str) -> bool:
    """Return whether answers of tenants with such drafts beside host memory were compared on a GPU."""
    return not algorithm or (algorithm in _DRAFTS_COMPARED_ON_GPUS and compat.is_since(_DRAFTS_ON_GPUS_SINCE))


def _check_dp_attention_beside(args: Any, model: str, what: str) -> None:
    if _has_dp_attention(args) and os.environ.get(UNTESTED_RANKS_ENV) != "1":
        raise Refused(
            f"DP attention cannot be combined with a kvarn cache of {model} in SGLang {compat.version()}, because "
            f"ranks with requests of their own are not tested beside {what}: drop {_DROP_DP_ATTENTION}, or set "
            f"{UNTESTED_RANKS_ENV}=1 to try it"
        )


def _check_transfers_beside(args: Any, model: str, what: str) -> None:
    if args.disaggregation_mode != "null" and _is_trial(args.device, UNTESTED_TRANSFERS_ENV):
        raise Refused(
            f"--disaggregation-mode cannot be combined with a kvarn cache of {model} on a GPU yet, because transfers "
            f"of {what} beside records have run on a CPU only: drop --disaggregation-mode, or set "
            f"{UNTESTED_TRANSFERS_ENV}=1 to try it"
        )


def _drafts_beside(states: Any, model: str) -> tuple[str, ...]:
    """Return the algorithms that are tested beside states of a kind."""
    if compat.has_gated_delta_nets(states):
        return CHAINS
    takes_dflash = model in _DFLASH_BESIDE_MAMBA2 and compat.is_since(_DFLASH_BESIDE_MAMBA2[model])
    return (*_DRAFTS_BESIDE_MAMBA2, DFLASH) if takes_dflash else _DRAFTS_BESIDE_MAMBA2


def _check_host_states(args: Any, model: str) -> None:
    """Refuse what is not served beside --enable-hierarchical-cache if host memory takes states too."""
    what = f"{_HICACHE} cannot be combined with a kvarn cache of {model}"
    if not compat.hosts_states():
        raise Refused(
            f"{what} in SGLang {compat.version()}, which saves states of other tokens if pages have "
            f"{settings.PAGE_SIZE}, so that there is no prefix cache to take into host memory: use SGLang "
            f"{compat.HOSTS_STATES_SINCE}, or drop {_HICACHE}"
        )
    if _is_trial(args.device, UNTESTED_HICACHE_ENV):
        raise Refused(
            f"{what} on a GPU yet, because there more answers of tenants differed beside states in host memory than "
            f"with a 16-bit cache, all but one at near ties: drop {_HICACHE}, or set {UNTESTED_HICACHE_ENV}=1 to try it"
        )
    if args.hicache_mem_layout != _PAGE_FIRST:
        raise Refused(
            f"--hicache-mem-layout {args.hicache_mem_layout} cannot be combined with a kvarn cache of {model}, because "
            f"SGLang keeps states in host memory in the order {_PAGE_FIRST} only: drop --hicache-mem-layout"
        )


def _has_windows(model_config: Any) -> bool:
    return bool(model_config.is_hybrid_swa or compat.windows_in_records(model_config))


def check_windows(server_args: Any, model_config: Any) -> None:
    """Refuse arguments that are not tested beside sliding windows.

    Args:
        server_args: ServerArgs, resolved or on the way; model_config: SGLang's ModelConfig.

    Raises:
        Refused: one sentence: what is expected, what came, why, what to do.
    """
    if not _has_windows(model_config):
        return
    args, model = compat.resolved_arguments(server_args), model_config.hf_config.architectures[0]
    backends = {args.attention_backend, args.prefill_attention_backend, args.decode_attention_backend}
    if not model_config.is_hybrid_swa:
        # the backend of all layers is ours
        backends = {None}
    algorithm = algorithm_of(args)
    _check_drafts_beside_windows(algorithm, model)
    if algorithm and "flashinfer" in backends:
        raise Refused(
            f"--attention-backend flashinfer cannot verify drafts in the sliding windows of {model}, "
            "because it reads the first tokens of a request in the place of those in a window, whatever the cache: "
            "set --attention-backend to triton, or drop --speculative-algorithm"
        )
    untested = (
        (args.enable_hierarchical_cache and not compat.hosts_windows(), _HICACHE, "host memory of this SGLang"),
        (args.pp_size > 1, "--pp-size", "a pipeline"),
        (
            args.disaggregation_mode != "null" and bool(algorithm) and model not in _SENT_WITH_DRAFTS,
            "--speculative-algorithm",
            "drafts between servers",
        ),
        (len(backends - {None}) > 1, "--prefill-attention-backend and --decode-attention-backend", "two backends"),
    )
    for applies, flag, what in untested:
        if applies:
            raise Refused(
                f"{flag} cannot be combined with a kvarn cache of {model}, because {what} beside sliding windows "
                f"{'are' if what.endswith('s') else 'is'} not tested yet: drop {flag}"
            )
    if not (model in _WINDOWS_BESIDE_RANKS and not algorithm and compat.is_since(_BESIDE_RANKS_SINCE)):
        _check_dp_attention_beside(args, model, "its sliding windows" + " and drafts" * bool(algorithm))
    _check_transfers_beside(args, model, "sliding windows")
    if settings.ATTENTION_BACKEND in backends:
        raise Refused(
            f"--attention-backend kvarn cannot attend the sliding windows of {model}, which stay in 16 bits: drop "
            "--attention-backend, or name one of SGLang's for them"
        )
    if "torch_native" in backends:
        raise Refused(
            f"--attention-backend torch_native cannot attend the sliding windows of {model}, because it reads them at "
            "the slots of the other layers, whatever the cache: drop --attention-backend, or set it to triton"
        )
    if not _is_trial(args.device, UNTESTED_WINDOWS_ENV):
        return
    if not _have_windows_run_on_gpus(model):
        raise Refused(
            f"a kvarn cache of {model} cannot be served on a GPU with SGLang {compat.version()} yet, because its "
            f"sliding windows have run on a CPU only: drop --kv-cache-dtype, or set {UNTESTED_WINDOWS_ENV}=1 to try it"
        )
    on_cpus = (
        (args.tp_size > 1, "--tp-size", "ranks"),
        (args.hicache_storage_backend is not None, "--hicache-storage-backend", "files"),
        (
            not _have_drafts_run_beside_windows(algorithm, model),
            "--speculative-algorithm",
            "drafts of such a head",
        ),
    )
    for applies, flag, what in on_cpus:
        if applies:
            raise Refused(
                f"{flag} cannot be combined with a kvarn cache of {model} on a GPU yet, because {what} beside sliding "
                f"windows have run on a CPU only: drop {flag}, or set {UNTESTED_WINDOWS_ENV}=1 to try it"
            )


def _have_windows_run_on_gpus(model: str) -> bool:
    return compat.is_since(_WINDOWS_ON_GPUS_SINCE) and model in _WINDOWS_ON_GPUS


def trials_on_gpus(model_config: Any, *, ranks: int, host_memory: bool, algorithm: str = "") -> list[str]:
    """Return the variables without which a server on a GPU refuses a model; algorithm: of its drafts."""
    (model, *_), found = model_config.hf_config.architectures, []
    has_states = compat.hybrid_config(model_config) is not None
    have_run = _have_windows_run_on_gpus(model) and _have_drafts_run_beside_windows(algorithm, model)
    if _has_windows(model_config) and (ranks > 1 or not have_run):
        found.append(UNTESTED_WINDOWS_ENV)
    if has_states and not _have_drafts_run_beside_states(algorithm):
        found.append(UNTESTED_DRAFTS_ENV)
    if host_memory and (has_states or not _have_drafts_been_compared(algorithm)):
        found.append(UNTESTED_HICACHE_ENV)
    return found


def check_ranks(ranks: int, model_config: Any, *, on_cpu: bool) -> None:
    """Refuse a number of ranks among which the heads cannot be shared.

    On a GPU several ranks may hold the same KV head. On a CPU SGLang makes up heads until their number fits, for which
    a checkpoint has no weights.

    Raises:
        Refused: the heads, the ranks, and what to set.
    """
    qo_heads = sorted(set(compat.query_heads_of_layers(model_config)))
    kv_heads = model_config.get_total_num_kv_heads()

    def divides(n: int, *heads: int) -> bool:
        return all(number % n == 0 for number in heads)

    is_replicated = not on_cpu and ranks % kv_heads == 0
    if divides(ranks, *qo_heads) and (divides(ranks, kv_heads) or is_replicated):
        return
    sizes = [str(n) for n in range(1, kv_heads + 1) if divides(n, *qo_heads, kv_heads)]
    raise Refused(
        f"--tp-size {ranks} cannot share the {' or '.join(map(str, qo_heads))} query heads and {kv_heads} KV heads of "
        "this model"
        f"{' on a CPU' if on_cpu else ''}: set --tp-size to {' or '.join(sizes)}"
    )


def check_ranks_of_states(ranks: int, model_config: Any) -> None:
    """Refuse a number of ranks among which SGLang shares the states of a hybrid model wrongly, or cannot share them.

    Raises:
        Refused: the model, the ranks, and what to set.
    """
    if ranks == 1 or (states := compat.hybrid_config(model_config)) is None:
        return
    model = model_config.hf_config.architectures[0]
    if compat.adds_states_per_rank(states):
        raise Refused(
            f"--tp-size {ranks} cannot be combined with {model} in SGLang {compat.version()}, which adds what states "
            "put out once for each rank, whatever the cache: take SGLang 0.5.23 or set --tp-size to 1"
        )
    if not compat.shares_states(states, ranks):
        sizes = [str(n) for n in range(1, ranks) if compat.shares_states(states, n)]
        raise Refused(
            f"--tp-size {ranks} cannot share the states of {model}, because their heads or groups are no multiple of "
            f"{ranks}: set --tp-size to {' or '.join(sizes)}"
        )


def check_device(device: str, dtype: torch.dtype) -> None:
    """Refuse what is only known in the process that owns the device.

    Raises:
        Refused: the GPU is older than sm_80, or the model is not 16 bit on a GPU.
    """
    if device != "cuda":
        return
    if torch.cuda.get_device_capability() < (8, 0):
        raise Refused(
            f"a kvarn cache needs a GPU of compute capability 8.0 or later, not {torch.cuda.get_device_name()}: "
            "drop --kv-cache-dtype"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise Refused(
            f"a kvarn cache needs a model in float16 or bfloat16 on a GPU, not {dtype}: set --dtype bfloat16"
        )


def check_states_on_device(device: str, model_config: Any) -> None:
    """Refuse GPUs on which SGLang has gated delta nets beside its own attention backends only.

    Raises:
        Refused: the model and the GPU.
    """
    states, model = compat.hybrid_config(model_config), model_config.hf_config.architectures[0]
    if device != "cuda" or states is None:
        return
    if compat.has_gated_delta_nets(states) and torch.cuda.get_device_capability() >= (10, 0):
        raise Refused(
            f"SGLang runs {model} on {torch.cuda.get_device_name()} beside attention backends of its own only, and a "
            "kvarn cache has another: use a GPU up to Hopper or drop --kv-cache-dtype"
        )


def check_layers(
    model: torch.nn.Module, layer_ids: list[int], shape: AttentionShape, sliding_windows: tuple[int, ...] = ()
) -> None:
    """Refuse attention layers with a property that the kernels do not compute.

    Args:
        layer_ids: those in records; shape: that pool and workspaces are made for.
        sliding_windows: that steps are planned for, in tokens.

    Raises:
        ValueError: the first such property.
    """
    layers = [x for x in model.modules() if isinstance(x, compat.RadixAttention) and x.layer_id in layer_ids]
    _check_heads_of_ranks(model, layers, shape.num_qo_heads)
    heads = (shape.num_qo_heads, shape.num_kv_heads, shape.head_dim)
    for layer in layers:
        properties = (
            (layer.logit_cap > 0, f"a logit cap of {layer.logit_cap}"),
            (
                layer.sliding_window_size + 1 not in (0, *sliding_windows),
                f"a sliding window of {layer.sliding_window_size + 1} tokens",
            ),
            (layer.is_cross_attention, "cross attention"),
            (layer.attn_type != compat.AttentionType.DECODER, f"attention of type {layer.attn_type.value}"),
            (layer.xai_temperature_len > 0, "temperature by position"),
            (layer.head_dim not in SUPPORTED_HEAD_DIMS, f"head_dim {layer.head_dim}"),
            (layer.v_head_dim != layer.head_dim, "values and keys of different width"),
            (
                (layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim) != heads,
                "attention layers of another shape than its configuration says",
            ),
        )
        for applies, what in properties:
            if applies:
                _refuse_model(type(model).__name__, what)


def check_draft_model(model: torch.nn.Module, model_config: Any) -> None:
    """Refuse a draft model, just loaded, that SGLang cannot run beside DP attention.

    Args:
        model_config: SGLang's ModelConfig of the draft model.

    Raises:
        Refused: the model, and what to drop.
    """
    layers = [x for x in model.modules() if isinstance(x, compat.RadixAttention)]
    heads = model_config.num_attention_heads // compat.get_parallel().attn_tp_size
    _check_heads_of_ranks(model, layers, heads)


def _check_heads_of_ranks(model: torch.nn.Module, layers: list[Any], heads: int) -> None:
    """Refuse layers with fewer query heads than a rank with requests of its own has."""
    if compat.get_parallel().attn_dp_size > 1 and any(layer.tp_q_head_num < heads for layer in layers):
        raise Refused(
            f"DP attention cannot be combined with {type(model).__name__} in SGLang {compat.version()}, whose code "
            f"shares the heads of a request among all ranks, whatever the cache: drop {_DROP_DP_ATTENTION}"
        )


def check_call(k: torch.Tensor | None, save_kv_cache: bool, extra: dict[str, Any]) -> None:
    """Refuse a call of an attention layer that the kernels would answer wrongly.

    Raises:
        Refused: the layer shares another layer's cache, or passes something that changes the scores.
    """
    if k is None or not save_kv_cache:
        raise Refused(
            "a kvarn cache needs attention layers that write their own keys and values, but layers of this model "
            "share them: drop --kv-cache-dtype"
        )
    unknown = [name for name, value in extra.items() if value is not None]
    if unknown:
        raise Refused(f"a kvarn cache needs plain attention, but got {', '.join(unknown)}: drop --kv-cache-dtype")


def _refuse_model(model: str, what: str) -> None:
    raise Refused(
        f"{model} has {what}, which a kvarn cache does not serve (it takes causal multi-head or grouped-query "
        f"attention to all earlier tokens, head_dim {', '.join(map(str, SUPPORTED_HEAD_DIMS))}): "
        "drop --kv-cache-dtype"
    )
