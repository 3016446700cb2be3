# SPDX-License-Identifier: Apache-2.0
"""Everything that this package takes from SGLang, and everything that differs between its versions.

No other module imports SGLang or asks for its version. Names are resolved on first use; where versions differ there is
one function per difference.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import pkgutil
import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any

import torch

logger = logging.getLogger(__name__)

# plugin, engine and fuzz suites in CI
TESTED_VERSIONS = ("0.5.16", "0.5.23")
# plugin suite and CPU engines run by hand, not in CI
BOOTED_VERSIONS = ("0.5.18", "0.5.20")
UNTESTED_ENV = "KVARN_UNTESTED_SGLANG"

_NAMES = {
    "AddReqResult": "sglang.srt.managers.schedule_policy:AddReqResult",
    "AttentionBackend": "sglang.srt.layers.attention.base_attn_backend:AttentionBackend",
    "AttentionType": "sglang.srt.layers.radix_attention:AttentionType",
    "CpuDeviceMixin": "sglang.srt.platforms.cpu:CpuDeviceMixin",
    "HostKVCache": "sglang.srt.mem_cache.pool_host.base:HostKVCache",
    "HookRegistry": "sglang.srt.plugins.hook_registry:HookRegistry",
    "HookType": "sglang.srt.plugins.hook_registry:HookType",
    "MHATokenToKVPool": "sglang.srt.mem_cache.memory_pool:MHATokenToKVPool",
    "MemoryPoolConfig": "sglang.srt.model_executor.pool_configurator:MemoryPoolConfig",
    "MemoryPoolConfigurator": "sglang.srt.model_executor.pool_configurator:MemoryPoolConfigurator",
    "ModelConfig": "sglang.srt.configs.model_config:ModelConfig",
    "PagedTokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator.paged:PagedTokenToKVPoolAllocator",
    "PlatformEnum": "sglang.srt.platforms.device_mixin:PlatformEnum",
    "PoolName": "sglang.srt.mem_cache.hicache_storage:PoolName",
    "RMSNorm": "sglang.srt.layers.layernorm:RMSNorm",
    "RadixAttention": "sglang.srt.layers.radix_attention:RadixAttention",
    "SRTPlatform": "sglang.srt.platforms.interface:SRTPlatform",
    "SWAKVPool": "sglang.srt.mem_cache.swa_memory_pool:SWAKVPool",
    "SWATokenToKVPoolAllocator": "sglang.srt.mem_cache.allocator.swa:SWATokenToKVPoolAllocator",
    "UnquantizedLinearMethod": "sglang.srt.layers.quantization.unquant:UnquantizedLinearMethod",
    "add_attention_backend_choices": "sglang.srt.server_args:add_attention_backend_choices",
    "envs": "sglang.srt.environ:envs",
    "get_parallel": "sglang.srt.runtime_context:get_parallel",
    "is_hybrid_swa_model": "sglang.srt.configs.model_config:is_hybrid_swa_model",
    "is_minimax_sparse": "sglang.srt.configs.model_config:is_minimax_sparse",
    "load_plugins": "sglang.srt.plugins:load_plugins",
    "mambaish_config": "sglang.srt.configs.hybrid_arch:mambaish_config",
    "register_attention_backend": "sglang.srt.layers.attention.attention_registry:register_attention_backend",
}

# arguments that the oldest tested version does not have, and the first that does
_ADDED_ARGUMENTS = {
    "attn_dp_size": "0.5.23",
    "enable_kv_cache_sharding": "0.5.23",
    "enable_nvidia_megakernel": "0.5.23",
    "enable_unified_cache_external_linker": "0.5.20",
    "hicache_host_memory_mode": "0.5.23",
    "speculative_draft_kv_cache_dtype": "0.5.20",
    "weight_cache_mode": "0.5.18",
}

# the first version for whose transfer between servers the hooks are made
TRANSFERS_SINCE = "0.5.23"

# the first version whose host memory keeps states beside our pool
HOSTS_STATES_SINCE = "0.5.23"

# --mamba-full-memory-ratio where nobody chooses it
STOCK_STATE_RATIO = 0.9

# --swa-full-tokens-ratio where nobody chooses it: tokens of sliding windows for each other token
STOCK_SLIDING_RATIO = 0.8

# see `resolution_target`: until 0.5.18, from 0.5.20 on
RESOLUTION_TARGETS = ("server_args.ServerArgs.__post_init__", "server_args.ServerArgs.resolve_once")

# RMSNorms below sglang.srt, and what they add to their weights; the last one is over the heads of all ranks
_NORM_OFFSETS = {
    "layers.layernorm.RMSNorm": 0,
    "layers.layernorm.GemmaRMSNorm": 1,
    "layers.layernorm.Gemma3RMSNorm": 1,
    "models.minimax_m2.MiniMaxM2RMSNormTP": 0,
}

# SGLang's configurations, by class, of models whose states are of a tested kind
GATED_DELTA_NETS = {"Qwen3NextConfig", "Qwen3_5TextConfig", "Qwen3_5MoeTextConfig"}
MAMBA2 = {"FalconH1Config", "GraniteMoeHybridConfig", "NemotronHConfig"}
# The first version whose model computes what the checkpoint was trained for: until 0.5.20 the residual of the last
# layer is added a second time.
_RIGHT_SINCE = {"GraniteMoeHybridConfig": "0.5.23"}
# The first version, of those that are tested, that adds what states put out once; before, a layer adds the sum of all
# ranks to the attention of each, and sums these again.
_SUMS_ONCE_SINCE = {"FalconH1Config": "0.5.23"}
# the first version, of those that are tested, that calls attention causal which is; before, it is that of an encoder
_CAUSAL_SINCE = {"Gemma3ForCausalLM": "0.5.23"}
# the first version, of those that are tested, whose model runs a verify step
_VERIFIES_SINCE = {"FalconH1Config": "0.5.23"}


def __getattr__(name: str) -> Any:
    """Return an SGLang object by the name that this package knows it by."""
    if name not in _NAMES:
        raise AttributeError(name)
    return resolve(_NAMES[name])


def resolve(path: str) -> Any:
    """Import and return the object at a dotted path, e.g. ``sglang.srt.server_args.ServerArgs``."""
    return pkgutil.resolve_name(path)


@functools.cache
def version() -> str | None:
    """Return the version of the installed SGLang, None where there is none."""
    try:
        return metadata.version("sglang")
    except metadata.PackageNotFoundError:
        return None


def check_version() -> None:
    """Refuse an SGLang that this package was never run with, unless KVARN_UNTESTED_SGLANG=1.

    A version that boots and generates but is not in CI is taken, with a line in the log.

    Raises:
        RuntimeError: names the version found, the tested ones and the two ways out.
    """
    found = version()
    base = (found or "").split(".post")[0].split("+")[0]
    tested = ", ".join(TESTED_VERSIONS)
    if base in TESTED_VERSIONS:
        return
    if base in BOOTED_VERSIONS:
        # a warning, since an info record is lost where SGLang has not set up logging yet
        logger.warning("SGLang %s boots and generates with sglang-kvarn, CI tests %s", found, tested)
        return
    if found is None or os.environ.get(UNTESTED_ENV) != "1":
        raise RuntimeError(
            f"sglang-kvarn is tested with SGLang {tested} and found {found or 'none'}: "
            f"pip install sglang=={TESTED_VERSIONS[-1]}, or set {UNTESTED_ENV}=1 to try what is installed"
        )
    logger.warning("sglang-kvarn is not tested with SGLang %s: %s=1 is set", found, UNTESTED_ENV)


def is_since(first: str) -> bool:
    """Whether the installed SGLang is this version or a later one; where there is none, only of version 0."""
    found, wanted = (tuple(int(n) for n in re.findall(r"\d+", v)[:3]) for v in (version() or "0", first))
    return found >= wanted


def resolution_target() -> str:
    """Return the path below ``sglang.srt`` of the function that fills what the user left open.

    Until 0.5.18 the constructor does it; from 0.5.20 on the launcher calls it, in the parent process only.
    """
    return RESOLUTION_TARGETS[is_since("0.5.20")]


def is_resolved(server_args: Any) -> bool:
    """Whether the arguments are resolved and read-only: `resolve_once` may be called again on them."""
    return getattr(server_args, "_resolution_finished", False)


def resolved_arguments(server_args: Any) -> Any:
    """Return ServerArgs as resolved, to be read only: from 0.5.20 on the fields keep what the user typed."""
    return resolve("sglang.srt.arg_groups.overrides.resolved_view")(server_args) if is_since("0.5.20") else server_args


def argument(server_args: Any, name: str, default: Any) -> Any:
    """Return an argument, or the default where the installed SGLang does not have it yet."""
    return getattr(server_args, name) if has_argument(name) else default


def has_argument(name: str) -> bool:
    """Whether the installed SGLang has this argument."""
    return is_since(_ADDED_ARGUMENTS.get(name, "0"))


def draft_tokens(server_args: Any) -> int:
    """Return the most new tokens of a request in a verify step of speculative decoding, 1 without it."""
    if resolved_arguments(server_args).speculative_algorithm is None:
        return 1
    if is_since("0.5.20"):
        return resolve("sglang.srt.arg_groups.overrides.max_speculative_num_draft_tokens")(server_args) or 1
    return server_args.max_speculative_num_draft_tokens or 1


def verified_tokens(server_args: Any) -> int:
    """Return the new tokens of a request in a verify step now, 1 without speculative decoding.

    Where the number changes while a server runs, SGLang makes an attention backend for each, one after the other, and
    says for which before it does.
    """
    args = resolved_arguments(server_args)
    if args.speculative_algorithm is None:
        return 1
    if is_since("0.5.20"):
        args = resolve("sglang.srt.runtime_context.get_spec")()
    return args.speculative_num_draft_tokens or 1


def draft_steps(args: Any) -> list[int]:
    """Return the numbers of steps of a draft model that SGLang chooses from as it runs; none where it is fixed.

    Args:
        args: as `resolved_arguments` returns them.
    """
    if args.speculative_algorithm is None or not args.speculative_adaptive:
        return []
    candidates = resolve("sglang.srt.speculative.adaptive_spec_params.resolve_candidate_steps_from_config")
    return candidates(cfg_path=args.speculative_adaptive_config)


def attention_backends(server_args: Any) -> int:
    """Return how many attention backends SGLang makes of a model, one for each number of drafts of a step."""
    return len(draft_steps(resolved_arguments(server_args))) or 1


def draft_model(configurator: Any) -> tuple[Any, int, int] | None:
    """Return of a KVCacheConfigurator's draft model (ModelConfig, its layers, bytes of a key's channel), or None."""
    found, args = configurator.spec_aux_config, resolved_arguments(configurator.server_args)
    # each is set by other algorithms; of a head that comes with the target 0.5.16 counts no layers
    names = ("eagle_draft_num_layers", "draft_kv_num_layers", "dflash_draft_num_layers")
    layers = next((layers for name in names if (layers := getattr(found, name, None))), None)
    is_head = args.speculative_algorithm == "EAGLE" and args.speculative_draft_model_path is None
    if not layers and not is_head:
        return None
    model_config = resolve(_NAMES["ModelConfig"]).from_server_args(
        configurator.server_args,
        model_path=args.speculative_draft_model_path,
        model_revision=args.speculative_draft_model_revision,
        is_draft_model=True,
    )
    if (layers := layers or model_config.num_nextn_predict_layers) is None:
        return None
    name = argument(args, "speculative_draft_kv_cache_dtype", None)
    return model_config, layers, 1 if name and name.startswith("fp8") else model_config.dtype.itemsize


def dflash_block(model_config: Any) -> int | None:
    """Return the drafts of a block that a DFLASH draft model was trained for, None where it does not say."""
    found = getattr(model_config.hf_config, "dflash_config", None) or {}
    return found.get("block_size", getattr(model_config.hf_config, "block_size", None))


def published_argument(name: str) -> Any:
    """Return an argument of the server that this process belongs to, None where there is none."""
    context = resolve("sglang.srt.runtime_context.get_context")()
    try:
        return context.config_leaf(name) if is_since("0.5.18") else getattr(context.server_args, name)
    except ValueError:
        return None


def draft_attention_backend(server_args: Any) -> str:
    """Return an attention backend of SGLang's for a draft model: up to Hopper what it takes for a 16-bit cache."""
    if server_args.device == "cpu" or not torch.cuda.is_available():
        return "triton"
    if torch.cuda.get_device_capability()[0] == 9:
        return "fa3"
    return "flashinfer" if importlib.util.find_spec("flashinfer") is not None else "triton"


def attention_output(forward_batch: Any) -> torch.Tensor | None:
    """Return where SGLang wants the output of an attention layer, [T, Hq * D], or None where it takes any tensor.

    Behind a prefill graph the next part of the graph reads it there, and SGLang would copy another tensor to it.
    """
    return getattr(forward_batch, "_attn_output", None)


def unread_verify_mask(requests: int, draft_tokens: int, device: str) -> Any:
    """Return the mask of drafts of an attention backend that reads none; None without drafts, or before 0.5.20.

    With it SGLang writes D * D bytes for a request; without it, D for each of its tokens.
    """
    if draft_tokens == 1 or not is_since("0.5.20"):
        return None
    return resolve("sglang.srt.layers.attention.verify_mask.maybe_create_verify_mask")(
        is_draft_runner=False,
        skip_prefill=False,
        max_bs=requests,
        max_context_len=0,
        num_draft_tokens=draft_tokens,
        device=device,
        is_read=False,
    )


def model_config(server_args: Any) -> Any:
    """Return SGLang's ModelConfig of these arguments."""
    if is_since("0.5.20"):
        return resolve("sglang.srt.arg_groups.overrides.model_config_of")(server_args)
    return server_args.get_model_config()


def hybrid_config(model_config: Any) -> Any:
    """Return SGLang's configuration of a model in which some layers keep states instead of keys and values, or None."""
    return resolve(_NAMES["mambaish_config"])(model_config)


def keeps_known_states(config: Any) -> bool:
    """Whether the states of a `hybrid_config` are of a tested kind, and some layers have attention beside them."""
    return type(config).__name__ in GATED_DELTA_NETS | MAMBA2 and bool(config.full_attention_layer_ids)


def has_gated_delta_nets(config: Any) -> bool:
    """Whether the states of a `hybrid_config` are those of gated delta nets."""
    return type(config).__name__ in GATED_DELTA_NETS


def adds_last_residual_twice(config: Any) -> bool:
    """Whether SGLang's own code of the model of a `hybrid_config` has this error."""
    return not is_since(_RIGHT_SINCE.get(type(config).__name__, "0"))


def adds_states_per_rank(config: Any) -> bool:
    """Whether several ranks answer something else than one does, by SGLang's code of the model of a `hybrid_config`."""
    return not is_since(_SUMS_ONCE_SINCE.get(type(config).__name__, "0"))


def shares_states(config: Any, ranks: int) -> bool:
    """Whether SGLang can share the states of a `hybrid_config` among so many ranks: heads, and groups of their inputs.

    Every rank may hold the one group of a Mamba-2 layer that has no other.
    """
    if has_gated_delta_nets(config):
        heads, groups, is_repeated = config.linear_num_value_heads, config.linear_num_key_heads, False
    else:
        # first the names of Nemotron-H, which has more of them than it reads
        heads = getattr(config, "mamba_num_heads", None) or config.mamba_n_heads
        groups = getattr(config, "n_groups", None) or config.mamba_n_groups
        is_repeated = groups == 1
    return heads % ranks == 0 and (groups % ranks == 0 or is_repeated)


def verifies_drafts(config: Any) -> bool:
    """Whether SGLang's layers of a `hybrid_config` keep the state after each draft; the others stop there."""
    return is_since(_VERIFIES_SINCE.get(type(config).__name__, "0"))


def saves_states_at_page_ends() -> bool:
    """Whether SGLang saves the right states for its prefix cache where pages have 128 tokens.

    Kernels return the state before every chunk of a step. Until 0.5.18 SGLang looks for a request's state as if there
    was one for each page, from the request's first token on. But chunks of gated delta nets have 64 tokens, and those
    of Mamba-2 begin with the step: the state of another token, or request, is saved.
    """
    return is_since("0.5.20")


def checkpoints_states(server_args: Any, model_config: Any) -> bool:
    """Whether SGLang can keep states of this model in a prefix cache with pages of more than one token."""
    function = resolve("sglang.srt.arg_groups.overrides.supports_mamba_cache_extra_buffer")
    config = model_config.hf_config
    return function(resolved_arguments(server_args), config if is_since("0.5.23") else config.architectures[0])


def attention_layers(model_config: Any, start: int, end: int) -> list[int]:
    """Return the ids of the layers in [start, end) that keep all keys and values, as the whole model counts them.

    The other layers of a hybrid model keep states (linear attention, a state space) or a sliding window.
    """
    ids: Any = range(start, end)
    if model_config.is_hybrid_swa:
        ids = model_config.full_attention_layer_ids or []
    elif (states := hybrid_config(model_config)) is not None:
        ids = states.full_attention_layer_ids
    return [i for i in ids if start <= i < end]


def sliding_layers(model_config: Any, start: int, end: int) -> list[int]:
    """Return the ids of the layers in [start, end) that SGLang gives a pool for their sliding windows."""
    ids = model_config.swa_attention_layer_ids or [] if model_config.is_hybrid_swa else []
    return [i for i in ids if start <= i < end]


def sliding_shape(model_config: Any, ranks: int) -> tuple[int, int, int]:
    """Return (KV heads of a rank, channels of a key, channels of a value) of layers with sliding windows."""
    return model_config.get_swa_num_kv_heads(ranks), model_config.swa_head_dim, model_config.swa_v_head_dim


def calls_attention_causal(architecture: str) -> bool:
    """Whether SGLang's code of a model without attention to later tokens says so to its attention backends."""
    return is_since(_CAUSAL_SINCE.get(architecture, "0"))


def windows_in_records(model_config: Any) -> tuple[int, ...]:
    """Return the sliding windows, in tokens, of layers whose tokens SGLang keeps beside those of all other layers."""
    text = model_config.hf_text_config
    if model_config.is_hybrid_swa or "sliding_attention" not in (getattr(text, "layer_types", None) or ()):
        return ()
    return (text.sliding_window,)


def splits_sliding_windows(server_args: Any) -> bool:
    """Whether SGLang will give a model's sliding windows a pool, from arguments that need not be resolved yet.

    SGLang's ModelConfig is made from resolved arguments and kept, so the configuration is read without it. What cannot
    be read yet, e.g. because resolution fetches it, counts as a model without windows.
    """
    if server_args.disable_hybrid_swa_memory:
        return False
    utils = "sglang.srt.utils.hf_transformers_utils"
    try:
        config = resolve(f"{utils}.get_config")(
            server_args.model_path,
            trust_remote_code=server_args.trust_remote_code,
            revision=server_args.revision,
            model_override_args=json.loads(server_args.json_model_override_args),
        )
    except (OSError, ValueError):
        return False
    text = resolve(f"{utils}.get_hf_text_config")(config)
    return resolve(_NAMES["is_hybrid_swa_model"])(config.architectures or [], text)


def is_sliding_ratio_open(server_args: Any) -> bool:
    """Whether nobody chose ``--swa-full-tokens-ratio``; before 0.5.23 the default cannot be told from a choice."""
    if is_since("0.5.23"):
        return not scheduler_argument(server_args, "_swa_full_tokens_ratio_explicitly_set")
    return scheduler_argument(server_args, "swa_full_tokens_ratio") == STOCK_SLIDING_RATIO


def sliding_eviction_interval(draft_tokens: int = 1) -> int:
    """Return the tokens of a request after which SGLang frees what left its sliding windows.

    Before 0.5.23 SGLang counts steps, each of which may accept all drafts.

    Args:
        draft_tokens: new tokens of a request in a verify step, 1 without speculative decoding.
    """
    interval = max(1, resolve(_NAMES["envs"]).SGLANG_SWA_EVICTION_INTERVAL.get())
    return interval if is_since("0.5.23") else interval * draft_tokens


def window_of_layers(model: torch.nn.Module) -> int:
    """Return the most tokens that a layer with a sliding window sees, the query's own among them; 0 without any.

    Layers count the tokens before the query's own and have -1 for all. What models name as their window is as much for
    some of them and one more for others.
    """
    layer = resolve(_NAMES["RadixAttention"])
    return max((x.sliding_window_size + 1 for x in model.modules() if isinstance(x, layer)), default=0)


def query_heads_of_layers(model_config: Any) -> list[int]:
    """Return how many query heads each layer has, of whatever kind; one number where all have as many."""
    text = model_config.hf_text_config
    if each := getattr(text, "num_attention_heads_per_layer", None):
        return each
    heads = model_config.num_attention_heads
    # of Step, for layers with a sliding window
    if (other := getattr(text, "attention_other_setting", None)) is None:
        return [heads]
    # behind those of the model are kinds of layers that draft
    kinds = text.layer_types[: model_config.num_hidden_layers]
    return [other["num_attention_heads"] if kind == "sliding_attention" else heads for kind in kinds]


def query_heads(model_config: Any) -> int | None:
    """Return how many query heads the layers with full attention have; None where they differ."""
    each = query_heads_of_layers(model_config)
    if len(each) == 1:
        return each[0]
    first, *others = {each[i] for i in attention_layers(model_config, 0, len(each))} or [None]
    return None if others else first


def attention_sinks(model: torch.nn.Module) -> Any:
    """Return the attention sinks of some layer of a model, None where it has none."""
    return next((x for name, x in model.named_parameters() if name.endswith(".sinks")), None)


def evict(tree_cache: Any, tokens: int) -> None:
    """Evict from the prefix cache until so many tokens are free, those of sliding windows aside."""
    allocator = tree_cache.token_to_kv_pool_allocator
    if not isinstance(allocator, resolve(_NAMES["SWATokenToKVPoolAllocator"])):
        resolve("sglang.srt.mem_cache.common.evict_from_tree_cache")(tree_cache, tokens)
    elif (missing := tokens - allocator.full_available_size()) > 0:
        params = resolve("sglang.srt.mem_cache.base_prefix_cache.EvictParams")
        tree_cache.evict(params(num_tokens=missing))


def is_sparse(model_config: Any) -> bool:
    """Whether SGLang attends to chosen tokens only, in a backend and mostly a pool of its own."""
    config, text = model_config.hf_config, model_config.hf_text_config
    if resolve(_NAMES["is_minimax_sparse"])(config):
        return True
    # from 0.5.23 on; with the variable SGLang attends to all tokens
    if getattr(config, "has_minicpm_sparse_attention", False):
        return not resolve(_NAMES["envs"]).SGLANG_MINICPM_FORCE_DENSE.get()
    keys = ("sparse_attention_config", "index_topk")
    return any(getattr(source, key, None) is not None for source in (config, text) for key in keys)


def is_window_model(model_config: Any) -> bool:
    """Whether SGLang knows the model as one with windows, also where --disable-hybrid-swa-memory is given."""
    known = resolve(_NAMES["is_hybrid_swa_model"])
    return model_config.is_hybrid_swa or known(model_config.hf_config.architectures, model_config.hf_text_config)


def scheduler_argument(server_args: Any, name: str) -> Any:
    """Return an argument in a scheduler process: from 0.5.18 on ServerArgs is read-only there, and may be behind."""
    if is_since("0.5.18"):
        return resolve("sglang.srt.runtime_context.get_context")().config_leaf(name)
    return getattr(server_args, name)


def runs_pipelines() -> bool:
    """Whether a pipeline was tested with this version of SGLang."""
    return is_since("0.5.23")


def attention_ranks(args: Any) -> int:
    """Return how many ranks share the heads of the model.

    Args:
        args: as `resolved_arguments` returns them.
    """
    replicas = args.attn_dp_size if has_argument("attn_dp_size") else args.dp_size if args.enable_dp_attention else 1
    # SGLang itself refuses fewer ranks than replicas, later
    return max(1, args.tp_size // replicas)


def has_controller(args: Any) -> bool:
    """Whether SGLang starts schedulers from a process that shares requests among them.

    Args:
        args: as `resolved_arguments` returns them.
    """
    return args.dp_size > 1 or argument(args, "attn_dp_size", 1) > 1


def override_argument(server_args: Any, **changes: Any) -> None:
    """Change arguments in a scheduler process."""
    target = resolve("sglang.srt.runtime_context.get_context")() if is_since("0.5.18") else server_args
    target.override("sglang-kvarn", **changes)


def is_state_ratio_open(server_args: Any) -> bool:
    """Whether nobody chose ``--mamba-full-memory-ratio``; until 0.5.20 the default cannot be told from a choice."""
    value = resolved_arguments(server_args).mamba_full_memory_ratio
    return value is None or (value == STOCK_STATE_RATIO and not is_since("0.5.23"))


def states_per_request(configurator: Any) -> int:
    """Return the states that a running request of a hybrid model takes, checkpoints included, by SGLang's count."""
    return configurator._calculate_mamba_ratio()


def state_bytes(config: Any) -> int:
    """Return the bytes of one state of a `hybrid_config`, all layers of a rank."""
    return config.mamba2_cache_params.mamba_cache_per_req


def state_format(config: Any) -> str:
    """Return what the bytes of one state of a `hybrid_config` mean: types, shapes and layers, of a rank."""
    params = config.mamba2_cache_params
    dtype, shape = params.dtype, params.shape
    return repr((dtype.conv, dtype.temporal, shape.conv, shape.temporal, list(params.layers)))


def state_layers(config: Any) -> int:
    """Return how many layers of a `hybrid_config` keep states; all those of Falcon-H1 keep tokens too."""
    return len(config.mamba2_cache_params.layers)


def planned_state_bytes(config: Any, ranks: int) -> int:
    """Return what `state_bytes` will be on one of so many ranks, where none of them runs yet."""
    widths: dict[str, Any] = dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), ranks)
    if is_since("0.5.23"):
        widths["enable_cp_tp_group_sharing"] = False
    with resolve(_NAMES["get_parallel"])().override(**widths):
        return state_bytes(config)


def prefix_len(req: Any) -> int:
    """Return how many tokens of a request are in its row already or, before it has one, in the prefix cache."""
    return req.prefix_len if is_since("0.5.23") else len(req.prefix_indices)


def request_row(req: Any) -> Any:
    """Return the row of a request in ReqToTokenPool, None while it has none."""
    return req.kv.req_pool_idx if is_since("0.5.20") else req.req_pool_idx


def free_pages(allocator: Any, pages: Any) -> None:
    """Give whole pages back to SGLang's paged allocator, without the wait of its `free`, which looks for duplicates.

    Args:
        pages: int64 [N] on the device, page ids.
    """
    if is_since("0.5.23"):
        allocator.free_page_ids(pages)
    elif not allocator.is_not_in_free_group:
        # an index in each page stands for the page
        allocator.free_group.append(pages * allocator.page_size)
    elif allocator.need_sort:
        allocator.release_pages = torch.cat((pages, allocator.release_pages))
    else:
        allocator.free_pages = torch.cat((pages, allocator.free_pages))


@contextmanager
def lock_host_prefix(adder: Any, req: Any) -> Iterator[None]:
    """Keep what a request found in host memory from eviction there, until SGLang loads it."""
    if getattr(adder.tree_cache, "cache_controller", None) is None:
        yield
    elif is_since("0.5.23"):
        with adder._lock_node(req.best_match_node, lock_host=True):
            yield
    else:
        req.best_match_node.protect_host()
        try:
            yield
        finally:
            req.best_match_node.release_host()


def fences_host_copies() -> bool:
    """Whether copies to and from host memory wait for the forward pass, by SGLang's fences or by ours, as tested."""
    return is_since("0.5.23") or not is_since("0.5.18")


def moves_host_indices_by_pool() -> bool:
    """Whether each host pool gets slots where its copies want them; before, all get them where the first pool does."""
    return is_since("0.5.23")


def salts_storage_keys() -> bool:
    """Whether the keys of a storage behind host memory hold the salt and the adapter of a request."""
    return is_since("0.5.23")


def hosts_states() -> bool:
    """Whether host memory may keep states of a hybrid model beside our pages; before, a hybrid has no prefix cache."""
    return is_since(HOSTS_STATES_SINCE)


def hosts_windows() -> bool:
    """Whether host memory may keep sliding windows beside our pages: as tested."""
    return is_since("0.5.23")


def host_states(tree_cache: Any) -> int:
    """Return the states of a hybrid model that host memory behind a prefix cache has room for."""
    return tree_cache.host_pool_group.get_pool(resolve(_NAMES["PoolName"]).MAMBA).size


def copy_state(tree_cache: Any, req: Any, node: Any) -> None:
    """Let a request of a hybrid model that has no state yet begin from a copy of a node's; nothing for other models."""
    base = "sglang.srt.mem_cache.base_prefix_cache"
    params = resolve(f"{base}.MatchPrefixParams")(key=None, cow_mamba=True, req=req)
    mamba = resolve("sglang.srt.mem_cache.unified_cache.components.ComponentType").MAMBA
    if mamba in tree_cache.components and not req.kv.holds_mamba:
        found = tree_cache.tree_core.empty_match_result._replace(best_match_node=node)
        tree_cache.components[mamba].finalize_match_result_in_cache(params, found)


def refuse_storage(message: str) -> Any:
    """Return a scheduler's answer to who asked for a storage and gets none."""
    output = resolve("sglang.srt.managers.io_struct.AttachHiCacheStorageReqOutput")
    return output(success=False, message=message)


def has_host_sources() -> bool:
    """Whether host memory is made for what a pool says of itself, not for the pool."""
    return is_since("0.5.23")


def host_pool_arguments(pool: Any, token_bytes: int) -> dict[str, Any]:
    """Return what SGLang's HostKVCache is told of a pool of the device: itself, from 0.5.23 on its numbers."""
    if not has_host_sources():
        return {"device_pool": pool}
    return {
        "dtype": pool.store_dtype,
        "device_capacity_tokens": pool.size,
        "size_per_token": token_bytes,
        "start_layer": pool.start_layer,
        "end_layer": pool.end_layer,
    }


def host_memory_function(device_type: str) -> Any:
    """Return SGLang's function that allocates memory of the host, page-locked for copies of a device of that type."""
    return resolve("sglang.srt.mem_cache.pool_host.common.ALLOC_MEMORY_FUNCS")[device_type]


def reserve_no_host_memory() -> None:
    """Let host pools of this process take all memory that is free."""
    resolve("sglang.srt.mem_cache.pool_host.base").HICACHE_HOST_MEMORY_RESERVE_BYTES = 0


def transfers_requests() -> bool:
    """Whether a request can go on in another server: the hooks into SGLang's transfer are made for this version."""
    return is_since(TRANSFERS_SINCE)


def received_requests(server_args: Any) -> int:
    """Return how many requests a decode server may receive beside those that run, in a scheduler."""
    return scheduler_argument(server_args, "disaggregation_decode_extra_slots")


def most_new_tokens_expected() -> int:
    """Return up to how many new tokens SGLang expects of a request, which may ask for more."""
    return resolve(_NAMES["envs"]).SGLANG_CLIP_MAX_NEW_TOKENS_ESTIMATION.get()


def states_made(req_to_token_pool: Any) -> int | None:
    """Return how many states of a hybrid model SGLang's rows of requests have room for, None where they keep none."""
    return getattr(getattr(req_to_token_pool, "mamba_pool", None), "size", None)


def state_dtypes(req_to_token_pool: Any) -> str | None:
    """Return how SGLang's rows of requests keep states of a hybrid model, None where they keep none.

    Two servers with the same model and equal dtypes mean the same by the bytes of a state.
    """
    if (states := getattr(req_to_token_pool, "mamba_pool", None)) is None:
        return None
    kept = states.mamba_cache
    names = [str(each.dtype).removeprefix("torch.") for each in (kept.temporal, *kept.conv)]
    return "-".join(names)


def add_request_state(kv_args: Any, buffers: tuple[list[int], list[int], list[int]], layer_ids: list[int]) -> None:
    """Let SGLang send items of buffers as a state of each request.

    The pool's `request_state_transfer_indices` says which items.

    Args:
        kv_args: SGLang's KVArgs; buffers: addresses, bytes, and bytes of an item; layer_ids: of each.
    """
    state = resolve("sglang.srt.disaggregation.base.conn.StateType").DSV4_REQUEST_STATE
    append = resolve("sglang.srt.disaggregation.utils.append_state_component")
    append(kv_args, state, *buffers, layer_ids=list(layer_ids))


def send_page_ids_at_once() -> None:
    """Let a scheduler of this process hand page ids to mooncake itself: SGLang's other way takes CUDA events."""
    resolve("sglang.srt.disaggregation.mooncake.conn.MooncakeKVSender").supports_host_tensor_indices = False


def gather_from_ranks(value: str) -> list[str]:
    """Return what each rank that has a share of the heads calls this with, in their order."""
    group = resolve(_NAMES["get_parallel"])().attn_tp_group
    return [value] if group.world_size == 1 else group.all_gather_object(value)


def fail_receiver(receiver: Any, why: str) -> None:
    """Let SGLang's receiver of a request fail, and tell the sender where it is known."""
    failed = resolve("sglang.srt.disaggregation.base.conn.KVPoll").Failed
    receiver.kv_mgr.record_failure(receiver.bootstrap_room, why)
    receiver.kv_mgr.update_status(receiver.bootstrap_room, failed)
    receiver.conclude_state = failed
    receiver.ensure_abort_notified()


def runs_step(scheduler: Any) -> bool:
    """Whether a scheduler has not taken the result of its last step yet, as where steps overlap."""
    return scheduler.enable_overlap and scheduler.last_batch is not None


def may_retract(scheduler: Any, running_batch: Any, tokens: int) -> bool:
    """Whether a decode server may take requests back before its next step: out of memory, or because a test says so.

    Args:
        running_batch: the requests that run; those that wait to run with them count too.
        tokens: that one of them may need of the pool for the step.
    """
    module = resolve("sglang.srt.managers.scheduler")
    is_tested = module.TEST_RETRACT and scheduler.forward_ct % module.TEST_RETRACT_INTERVAL == 0
    requests = running_batch.batch_size() + len(scheduler.waiting_queue)
    return is_tested or scheduler.token_to_kv_pool_allocator.available_size() < requests * tokens


def finish_step(scheduler: Any) -> None:
    """Take the result of the last step, and wait for it, as SGLang does where it pauses."""
    scheduler.process_batch_result(*scheduler.result_queue.popleft())
    scheduler.last_batch = None


def rms_norm_offset(module: Any) -> int | None:
    """Return what an RMSNorm of SGLang's adds to its weight, which is one for each channel; None for another module."""
    cls = type(module)
    return _NORM_OFFSETS.get(f"{cls.__module__}.{cls.__qualname__}".removeprefix("sglang.srt."))


def is_plain_matrix(linear: Any, *, rows: int | None = None, columns: int | None = None) -> bool:
    """Whether the weight of a linear layer is a matrix of this shape, neither quantised nor packed for a CPU."""
    unquantised = type(linear.quant_method) is resolve(_NAMES["UnquantizedLinearMethod"])
    if not unquantised or getattr(linear, "use_intel_amx_backend", False):
        return False
    weight = linear.weight
    shape = (weight.shape[0] if rows is None else rows, weight.shape[-1] if columns is None else columns)
    return weight.is_floating_point() and tuple(weight.shape) == shape


def sharer_of_weights(server_args: Any) -> str | None:
    """Return the argument with which something besides the model reads or writes its weights, None for none."""
    args = resolved_arguments(server_args)
    applies = {
        # an adapter adds to what the weights of the checkpoint put out
        "--enable-lora": bool(args.enable_lora or args.lora_paths),
        "--cpu-offload-gb": args.cpu_offload_gb > 0,
        "--offload-group-size": args.offload_group_size > 0,
        # peers read and write the memory itself
        "a transfer engine for weights": server_args.remote_instance_weight_loader_use_transfer_engine(),
        "--weight-cache-mode": argument(args, "weight_cache_mode", "off") != "off",
    }
    return next((name for name, applied in applies.items() if applied), None)
