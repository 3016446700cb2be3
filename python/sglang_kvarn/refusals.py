# SPDX-License-Identifier: Apache-2.0
"""What a kvarn cache does not serve: one sentence each, with what, why and what to drop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from kvarn_kernels.config import SUPPORTED_HEAD_DIMS

from sglang_kvarn import compat, settings

_NOT_A_SLOT = (
    "a token has no bytes of its own to copy, only a page of 128 tokens has, and the newest are in a ring"
)

_FULL_LAYERS = {"full_attention", "attention"}
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
        applies: reads `compat.resolved_arguments`.
        what: the feature, as the subject of the sentence.
        why: the reason.
        drop: what to change.
    """

    applies: Callable[[Any], bool]
    what: str
    why: str
    drop: str

    def sentence(self, preset: str) -> str:
        """Return the whole message."""
        return f"{self.what} cannot be combined with --kv-cache-dtype {preset}: {self.why}; {self.drop}"


def _flag(name: str, why: str, *, off: Any = False, what: str | None = None) -> Refusal:
    """Return the refusal of an argument that has any other value than `off`."""
    option = "--" + name.replace("_", "-")
    return Refusal(lambda args: compat.argument(args, name, off) != off, what or option, why, f"drop {option}")


ARGUMENTS = (
    Refusal(
        lambda args: args.attention_backend != settings.ATTENTION_BACKEND,
        "another --attention-backend than kvarn",
        "only the kvarn backend reads tile records",
        "drop --attention-backend, or --kv-cache-dtype for a model that needs a backend of its own",
    ),
    Refusal(
        lambda args: (
            args.prefill_attention_backend not in (None, settings.ATTENTION_BACKEND)
            or args.decode_attention_backend not in (None, settings.ATTENTION_BACKEND)
        ),
        "a separate prefill or decode attention backend",
        "only the kvarn backend reads and writes tile records",
        "drop --prefill-attention-backend and --decode-attention-backend",
    ),
    Refusal(
        lambda args: args.page_size != settings.PAGE_SIZE,
        f"another --page-size than {settings.PAGE_SIZE}",
        "a page is one tile",
        "drop --page-size",
    ),
    Refusal(
        lambda args: args.device not in ("cuda", "cpu") or torch.version.hip is not None,
        "another device than a CUDA GPU or a CPU",
        "the kernels are tested on NVIDIA GPUs only",
        "drop --kv-cache-dtype",
    ),
    _flag("speculative_algorithm", "rejected draft tokens cannot be taken back out of a record", off=None),
    _flag("disaggregation_mode", "the ring of exact tokens is not transferred", off="null"),
    _flag("encoder_only", "an encoder has no KV cache"),
    _flag("enable_hierarchical_cache", "its transfers may copy a page before its record is written"),
    _flag("enable_hisparse", _NOT_A_SLOT),
    _flag("enable_lmcache", _NOT_A_SLOT),
    _flag("enable_flexkv", _NOT_A_SLOT),
    _flag("enable_unified_cache_external_linker", _NOT_A_SLOT),
    _flag("enable_kv_cache_sharding", _NOT_A_SLOT),
    _flag("radix_cache_backend", "only SGLang's own prefix cache is tested", off=None),
    _flag("enable_deterministic_inference", "the backend is not on SGLang's list of deterministic backends"),
    _flag("rl_on_policy_target", "it asks for deterministic attention", off=None),
    _flag("enable_torch_compile", "the compiler would trace the kernel launcher"),
    Refusal(
        lambda args: args.cuda_graph_config.prefill.backend in ("full", "tc_piecewise"),
        "a full or compiled prefill CUDA graph",
        "the extend kernels are sized by the batch on the host",
        "drop --cuda-graph-backend-prefill, or set it to breakable or disabled",
    ),
    Refusal(
        lambda args: args.cuda_graph_config.decode.backend in ("breakable", "tc_piecewise"),
        "a breakable or compiled decode CUDA graph",
        "only the full decode graph is tested",
        "drop --cuda-graph-backend-decode",
    ),
    _flag("enable_memory_saver", "records and ring are not in a region that can be released"),
    _flag("dcp_size", "decode context parallelism spreads a page over ranks", off=1),
    _flag("attn_cp_size", "context parallelism writes the cache outside the attention backend", off=1),
    _flag("enable_prefill_cp", "context parallelism writes the cache outside the attention backend"),
    _flag("enable_dp_attention", "it is not tested yet"),
    _flag("attn_dp_size", "it is not tested yet", off=1),
    _flag("pp_size", "pipeline parallelism is not tested yet", off=1),
    _flag("enable_two_batch_overlap", "two batches would share one set of decode buffers"),
    _flag("enable_single_batch_overlap", "it is not tested yet"),
    _flag("enable_pdmux", "two batches would share one set of decode buffers"),
    _flag("dllm_algorithm", "a diffusion model rewrites tokens that are already quantised", off=None),
    _flag("enable_streaming_session", "a session may be trimmed into a page that is already quantised"),
    _flag("enable_session_radix_cache", "a session may be trimmed into a page that is already quantised"),
    _flag("enable_mis", "multi-item scoring masks tokens in the middle of a sequence"),
    _flag("enable_page_major_kv_layout", "it is a layout of 16-bit caches"),
    _flag("enable_unified_memory", "it is a layout of 16-bit caches"),
    _flag("prefill_only_disable_kv_cache", "there would be no cache to quantise"),
    _flag("kv_canary", "it reads the cache slot by slot", off="none"),
    _flag("enable_nvidia_megakernel", "its fused steps do not call the attention backend"),
    _flag("use_ray", "Ray actors do not load SGLang plugins"),
    Refusal(
        lambda args: compat.envs.SGLANG_ENABLE_POST_CAPTURE_KV_SIZING.get(),
        "SGLANG_ENABLE_POST_CAPTURE_KV_SIZING",
        "the ring is fixed before CUDA graphs are captured",
        "unset it",
    ),
    Refusal(
        lambda args: compat.envs.SGLANG_USE_HND_KVCACHE.get(),
        "SGLANG_USE_HND_KVCACHE",
        "it is a layout of 16-bit caches",
        "unset it",
    ),
)


def check_arguments(server_args: Any) -> None:
    """Refuse what the arguments and the model's configuration rule out, before any process is spawned.

    Args:
        server_args: as `compat.resolved_arguments` returns them.

    Raises:
        ValueError: one sentence: what, why, what to drop.
    """
    preset = settings.preset_of(server_args)
    if preset is None:
        if server_args.attention_backend == settings.ATTENTION_BACKEND:
            raise ValueError(
                f"--attention-backend kvarn cannot be combined with --kv-cache-dtype "
                f"{server_args.kv_cache_dtype}: it reads tile records only; "
                "add --kv-cache-dtype kvarn or drop --attention-backend"
            )
        return
    # the model first: SGLang may have changed arguments on its account, which the user never gave
    check_model(compat.model_config(server_args))
    for refusal in ARGUMENTS:
        if refusal.applies(server_args):
            raise ValueError(refusal.sentence(server_args.kv_cache_dtype))


def resolve_or_refuse(original: Callable[..., Any], server_args: Any, *args: Any, **kwargs: Any) -> Any:
    """Resolve the arguments; where SGLang refuses to and the model is the reason, say so. Hook around resolution.

    SGLang checks the attention backend and the page size that a kvarn cache brings against lists for some models. The
    error that it raises names arguments that the user never gave.

    Raises:
        ValueError: the property of the model that is not served; any other error is SGLang's.
    """
    try:
        return original(server_args, *args, **kwargs)
    except (AssertionError, RuntimeError, ValueError):
        if settings.preset_of(server_args) is not None:
            check_model(compat.model_config(server_args))
        raise


def check_model(model_config: Any) -> None:
    """Refuse models by their configuration (SGLang's ModelConfig).

    Raises:
        ValueError: the property of the model that is not served.
    """
    for applies, what in chain(_attention_properties(model_config), _head_properties(model_config)):
        if applies:
            _refuse_model(model_config.hf_config.architectures[0], what)


def _attention_properties(model_config: Any) -> Iterator[tuple[bool, str]]:
    """Yield what rules a model out by which tokens attend to which, and how."""
    config, text = model_config.hf_config, model_config.hf_text_config
    kinds = set(getattr(text, "layer_types", None) or ())
    # first: Inkling's state cannot be asked for before SGLang publishes its arguments
    yield compat.is_window_model(model_config) or "sliding_attention" in kinds, "sliding-window layers"
    yield compat.mambaish_config(model_config) is not None, "linear attention or state-space layers"
    yield model_config.attention_arch.name == "MLA", "latent attention (MLA)"
    yield model_config.attention_arch.name != "MHA", f"attention of kind {model_config.attention_arch.name}"
    yield compat.is_sparse(model_config), "sparse attention (to tokens that an index chooses)"
    yield getattr(config, "dual_chunk_attention_config", None) is not None, "dual-chunk attention"
    yield getattr(model_config, "attention_chunk_size", None) is not None, "chunked attention"
    yield (getattr(text, "loop_num", None) or 1) > 1, "loops over its layers, with windows from the second one on"
    yield not kinds <= _FULL_LAYERS, f"layers of type {', '.join(sorted(kinds - _FULL_LAYERS))}"
    yield model_config.is_encoder_decoder, "cross attention"
    bidirectional = getattr(text, "use_bidirectional_attention", None) or getattr(text, "is_causal", None) is False
    yield bool(bidirectional), _BIDIRECTIONAL
    yield bool(model_config.has_attention_sinks), "attention sinks"
    yield getattr(text, "attn_logit_softcapping", None) is not None, "a logit cap"
    yield getattr(model_config, "use_alibi", False), "a bias by position (ALiBi)"
    yield (getattr(text, "num_kv_shared_layers", None) or 0) > 0, "layers that share another layer's keys and values"
    for architecture in config.architectures:
        yield architecture in _IN_CODE, _IN_CODE.get(architecture, "")


def _head_properties(model_config: Any) -> Iterator[tuple[bool, str]]:
    """Yield what rules a model out by the shape of its heads."""
    keys, values = model_config.head_dim, model_config.v_head_dim
    yield keys not in SUPPORTED_HEAD_DIMS, f"head_dim {keys}"
    yield values != keys, f"values of {values} and keys of {keys} channels"
    heads = getattr(model_config.hf_text_config, "num_attention_heads_per_layer", None) or ()
    yield not set(heads) <= {model_config.num_attention_heads}, "layers with different numbers of query heads"


def check_device(device: str, dtype: torch.dtype) -> None:
    """Refuse what is only known in the process that owns the device.

    Raises:
        ValueError: the GPU is older than sm_80, or the model is not 16 bit on a GPU.
    """
    if device != "cuda":
        return
    if torch.cuda.get_device_capability() < (8, 0):
        raise ValueError(
            f"expected a GPU of compute capability 8.0 or later, got {torch.cuda.get_device_name()}: "
            "drop --kv-cache-dtype"
        )
    if dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f"expected a model in float16 or bfloat16 on a GPU, got {dtype}: set --dtype bfloat16"
        )


def check_layers(model: torch.nn.Module) -> None:
    """Refuse attention layers with a property that the kernels do not compute.

    Raises:
        ValueError: the first such property.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, compat.RadixAttention)]
    shapes = {(layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim) for layer in layers}
    for layer in layers:
        properties = (
            (layer.logit_cap > 0, f"a logit cap of {layer.logit_cap}"),
            (layer.sliding_window_size > -1, f"a sliding window of {layer.sliding_window_size} tokens"),
            (layer.is_cross_attention, "cross attention"),
            (layer.attn_type != compat.AttentionType.DECODER, f"attention of type {layer.attn_type.value}"),
            (layer.xai_temperature_len > 0, "temperature by position"),
            (layer.head_dim not in SUPPORTED_HEAD_DIMS, f"head_dim {layer.head_dim}"),
            (layer.v_head_dim != layer.head_dim, "values and keys of different width"),
            # the pool and the workspace of the decode kernels have one shape
            (len(shapes) > 1, "attention layers of different shapes"),
        )
        for applies, what in properties:
            if applies:
                _refuse_model(type(model).__name__, what)


def check_call(k: torch.Tensor | None, save_kv_cache: bool, extra: dict[str, Any]) -> None:
    """Refuse a call of an attention layer that the kernels would answer wrongly.

    Raises:
        ValueError: the layer shares another layer's cache, or passes something that changes the scores.
    """
    if k is None or not save_kv_cache:
        raise ValueError(
            "expected every attention layer to write its own keys and values, but layers of this model share "
            "them: drop --kv-cache-dtype"
        )
    unknown = [name for name, value in extra.items() if value is not None]
    if unknown:
        raise ValueError(f"expected plain attention, got {', '.join(unknown)}: drop --kv-cache-dtype")


def _refuse_model(model: str, what: str) -> None:
    raise ValueError(
        f"{model} has {what}, which a kvarn cache does not serve (it takes causal multi-head or grouped-query "
        f"attention to all earlier tokens, head_dim {', '.join(map(str, SUPPORTED_HEAD_DIMS))}): "
        "drop --kv-cache-dtype"
    )
