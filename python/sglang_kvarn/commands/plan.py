# SPDX-License-Identifier: Apache-2.0
"""What a model and a GPU have room for, from the model's folder alone: ``python -m sglang_kvarn plan FOLDER``.

The arithmetic is that of a server (`capacity`). What a server measures is estimated here: the memory of the weights,
and what SGLang leaves free, by the rule of its ``--mem-fraction-static``.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from kvarn_kernels.config import KVarNConfig, preset_names
from kvarn_kernels.device.gpu import H100

from sglang_kvarn import capacity, compat, refusals
from sglang_kvarn.capacity import GIB, Bounds, ModelShape, SlidingShare, States
from sglang_kvarn.commands import launch, plan_drafts
from sglang_kvarn.commands.plan_drafts import Drafts
from sglang_kvarn.refused import Refused
from sglang_kvarn.settings import PAGE_SIZE

# GPU memory in GiB up to which SGLang takes them: new tokens of an extend step, and the largest batch of a decode graph
# for less than 4 ranks and for more (`_handle_gpu_memory_settings` of 0.5.16 and 0.5.23)
DEFAULTS = ((20, 2048, 8, 8), (35, 4096, 48, 160), (60, 4096, 32, 160), (160, 8192, 256, 512), (10**9, 16384, 512, 512))
# MiB that SGLang leaves free besides 1.5 for each token of a step, 2 for each request of the largest graph and 128 for
# each rank; of large GPUs at least this much
RESERVED, RESERVED_OF_LARGE, LARGE = 512, 10 * 1024, 60
# what a server has taken besides when it counts: the CUDA context, buffers of its layers. Qwen3-8B on an H100 of 79.65
# GiB had 49.8 GiB for its cache (benchmarks/results/serving_flag_only_8b.csv), 1.5 GiB less than without this
TAKEN = int(1.5 * GIB)
# states of a hybrid model that a running request takes with SGLang's overlap
STATES_PER_REQUEST = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the command."""
    parser.add_argument("folder", help="folder of a model, with config.json; weights need not be there")
    parser.add_argument("--gpu-gib", type=float, default=80, help="memory of one GPU in GiB (default: %(default)s)")
    parser.add_argument("--tp", type=int, default=1, help="GPUs, as --tp-size (default: %(default)s)")
    parser.add_argument(
        "--sessions", type=int, default=32, help="conversations that are to stay in the cache (default: %(default)s)"
    )
    parser.add_argument("--context", type=int, default=32768, help="tokens of each (default: %(default)s)")
    text = "size of the weights, of a draft model too; default: of the files, or estimated"
    parser.add_argument("--weights-gib", type=float, help=text)
    parser.add_argument("--mem-fraction-static", type=float, help="as of the server; default: SGLang's rule")
    parser.add_argument("--max-running-requests", type=int, help="as of the server; default: left open")
    parser.add_argument("--hicache-size", type=int, help="GB of host memory for each GPU, as of the server")
    parser.add_argument("--trust-remote-code", action="store_true", help="run code in the folder, as of the server")
    plan_drafts.add_arguments(parser)


def collect(options: argparse.Namespace) -> dict[str, Any]:
    """Return the plan, JSON types.

    Raises:
        Refused: the model or the number of ranks is not served, or no cache fits.
        ValueError: the folder holds no configuration that SGLang reads.
    """
    if not (Path(options.folder) / "config.json").is_file():
        raise ValueError(f"expected the folder of a model, with config.json, got {options.folder}: name one")
    model = compat.ModelConfig(options.folder, trust_remote_code=options.trust_remote_code)
    refusals.check_model(model)
    refusals.check_ranks(options.tp, model, on_cpu=False)
    refusals.check_ranks_of_states(options.tp, model)
    layers, config = len(compat.attention_layers(model, 0, model.num_hidden_layers)), compat.hybrid_config(model)
    if options.hicache_size and not compat.fences_host_copies():
        raise Refused(
            f"host memory behind a kvarn cache needs SGLang 0.5.16 or 0.5.23, not {compat.version()}, which may copy a "
            "page before its record is written: take SGLang 0.5.23 or drop --hicache-size"
        )
    if options.hicache_size:
        refusals.check_host_memory_of_windows(model, "--hicache-size")
    windows = compat.windows_in_records(model)
    for kind, has_them, takes_them in (
        ("sliding windows", model.is_hybrid_swa or windows, compat.hosts_windows()),
        ("states", config is not None, compat.hosts_states()),
    ):
        if options.hicache_size and has_them and not takes_them:
            raise Refused(
                f"{model.hf_config.architectures[0]} has layers with {kind}, for which a server with a kvarn cache "
                f"takes no host memory in SGLang {compat.version()}: take SGLang 0.5.23 or drop --hicache-size"
            )
    dtype = model.dtype if model.dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
    heads, drafts = compat.query_heads(model), plan_drafts.of(options, model)
    weights = _weights(options, model, drafts) // options.tp
    available, fraction = _kv_memory(options, weights)
    if available <= 0:
        raise Refused(
            f"the weights take {weights / GIB:.1f} GiB of each GPU and {fraction:.1%} of {options.gpu_gib:g} GiB are "
            "for weights and cache: use more GPUs (--tp) or larger ones"
        )
    rank = _Rank(
        shape=capacity.rank_shape(model, dtype, options.tp, layers, heads, windows),
        state=0 if config is None else compat.planned_state_bytes(config, options.tp),
        windows=_windows(model, dtype, options.tp),
        drafts=drafts,
        available=available,
        options=options,
    )
    return {
        "model": model.hf_config.architectures[0],
        "weights_gib": round(weights / GIB, 2),
        "mem_fraction_static": fraction,
        "kv_gib": round(available / GIB, 2),
        "bytes_per_state": rank.state,
        "drafts": drafts.number,
        "sessions": options.sessions,
        "context": options.context,
        "caches": [
            *(rank.plain(name, size) for name, size in (("16 bit", 2), ("fp8", 1))),
            *(rank.kvarn(name) for name in preset_names() if "_g" in name),
        ],
        "launch": launch.recommend(options, model, rank.kvarn),
    }


def report(facts: dict[str, Any]) -> str:
    """Return a plan as lines of text."""
    head = (
        f"{facts['model']}: served. Of each GPU the weights take {facts['weights_gib']} GiB and the cache "
        f"{facts['kv_gib']} GiB (--mem-fraction-static {facts['mem_fraction_static']}), estimated"
    )
    columns = f"{'--kv-cache-dtype':28}{'bytes a token':>14}{'running at a time':>20}{'pool tokens':>14}"
    sessions = f"sessions of {facts['context']:,}"
    has_host = "host_tokens" in facts["caches"][0]
    lines = [head, f"{columns}{sessions:>22}" + (f"{'in host memory':>16}" if has_host else "")]
    for cache in facts["caches"]:
        enough = "" if cache["sessions"] >= facts["sessions"] else f"  (fewer than {facts['sessions']})"
        if "sliding_tokens" in cache:
            enough = f"  ({cache['sliding_tokens']:,} tokens of sliding windows){enough}"
        if facts["bytes_per_state"]:
            enough = f"  ({cache['states']:,} states; {cache['runs_out']} run out first){enough}"
        requests = cache["requests_at_a_time"]
        numbers = f"{cache['bytes_per_token']:>14,}{requests:>20,}{cache['pool_tokens']:>14,}{cache['sessions']:>22,}"
        numbers += f"{cache['host_sessions']:>16,}" if has_host else ""
        lines.append(f"{cache['cache']:28}{numbers}{enough}")
    room = "with room for" if facts["launch"]["fits"] else "no preset has room for"
    return "\n".join([*lines, f"Launch, {room} {facts['sessions']:,} {sessions}:", f"    {facts['launch']['command']}"])


@dataclass(frozen=True)
class _Windows:
    """Describe layers with sliding windows whose tokens stay in 16 bits: bytes of a token, window in tokens."""

    token: int
    window: int


def _windows(model: Any, dtype: torch.dtype, ranks: int) -> _Windows | None:
    if not (layers := compat.sliding_layers(model, 0, model.num_hidden_layers)):
        return None
    heads, *channels = compat.sliding_shape(model, ranks)
    return _Windows(len(layers) * heads * sum(channels) * dtype.itemsize, model.sliding_window_size)


@dataclass(frozen=True)
class _Rank:
    """Plan the caches of a rank.

    Attributes:
        state: bytes of a state of a hybrid model, 0 without states.
        drafts: of a request in a step, and what each token takes in a draft model's cache, of 16 bits with every cache.
        available: bytes for the cache.
    """

    shape: ModelShape
    state: int
    windows: _Windows | None
    drafts: Drafts
    available: int
    options: argparse.Namespace

    def plain(self, name: str, itemsize: int) -> dict[str, Any]:
        """Return the row of a stock cache, keys and values of `itemsize` bytes."""
        token, context = self.shape.full_token_bytes(itemsize) + self.drafts.token, self.options.context
        states, left = self._split(compat.STOCK_STATE_RATIO)
        share = itemsize / self.shape.attention.dtype.itemsize
        tokens, sliding = self._tokens(token, share, left)
        requests = min(tokens // context, self.options.max_running_requests or tokens)
        return self._row(name, token, tokens, requests, tokens // context, states, sliding, share)

    def kvarn(self, name: str) -> dict[str, Any]:
        """Return the row of a preset."""
        config, (_, chunk, graph_batch) = KVarNConfig.from_preset(name), _defaults(self.options)
        token, context = self.shape.token_bytes(config) + self.drafts.token, self.options.context
        states, left = self._split(self._state_ratio(token))
        allowed = None if states is None else states.requests
        wanted, number = self.options.max_running_requests, self.drafts.number
        bounds = Bounds(wanted, graph_batch, context, chunk, allowed, number)
        gpu = replace(H100, memory=int(self.options.gpu_gib * GIB))
        charge = capacity.charge(self.shape, config, left, bounds, torch.device("cuda"), gpu)
        tokens, sliding = self._tokens(token, 1, left - charge.workspace)
        tokens = tokens // PAGE_SIZE * PAGE_SIZE
        ring = capacity.ring_pages(self.shape.attention, config, number) * PAGE_SIZE
        requests = capacity.requests_of(tokens, ring, context, charge.rows)
        return self._row(name, token, tokens, requests, tokens // capacity.whole_pages(context), states, sliding)

    def _split(self, ratio: float) -> tuple[States | None, int]:
        """Return the states of a hybrid model and the bytes that they leave; SGLang keeps one state for itself.

        In a verify step a running request has a state after each draft besides: `capacity.state_ratio_with_drafts`.
        """
        if not self.state:
            return None, self.available
        of_states = self.available * ratio / (1 + ratio)
        number = int(of_states / (1 + self._drafts_per_state)) // self.state - 1
        states = States(number, self.state, STATES_PER_REQUEST, capacity.STATES_PER_SESSION)
        kept = (number + 1) * self.state
        return states, self.available - kept - min(int(kept * self._drafts_per_state), self._running)

    @property
    def _drafts_per_state(self) -> float:
        return self.drafts.number / STATES_PER_REQUEST if self.drafts.number > 1 else 0

    @property
    def _running(self) -> int:
        """Bytes of the states after drafts of all requests at a time; all memory where their number is left open."""
        requests = self.options.max_running_requests
        return self.available if requests is None else requests * self.drafts.number * self.state

    def _state_ratio(self, token: int) -> float:
        """Return the ratio that a server with a kvarn cache chooses; token: bytes of one."""
        share = capacity.state_ratio(self.state, capacity.STATES_PER_SESSION, token)
        if not self.state or self.drafts.number == 1:
            return share
        return capacity.state_ratio_with_drafts(share, self.available, self._drafts_per_state, self._running)

    def _tokens(self, token: int, share: float, left: int) -> tuple[int, int | None]:
        """Return tokens, and tokens of sliding windows, that so many bytes hold.

        Args:
            token: bytes of one; share: of its bytes in 16 bits that a token of a sliding window takes.
        """
        if self.windows is None:
            return left // token, None
        plain = self.shape.full_token_bytes(self.shape.attention.dtype.itemsize) + self.drafts.token
        plain = token if share < 1 else plain
        found = SlidingShare(
            token=token,
            plain_token=plain,
            sliding_token=self._sliding_token(share),
            ratio=compat.STOCK_SLIDING_RATIO,
            is_chosen=False,
            least=self._sliding_tokens_of_a_request() + 2 * _defaults(self.options)[1] + PAGE_SIZE,
        )
        return found.of_memory(left)

    def _sliding_tokens_of_a_request(self) -> int:
        assert self.windows is not None, "asked for models with sliding windows"
        number = self.drafts.number
        return capacity.sliding_tokens_of_request(self.windows.window, compat.sliding_eviction_interval(number), number)

    def _row(
        self,
        name: str,
        token: int,
        tokens: int,
        requests: int,
        sessions: int,
        states: States | None,
        sliding: int | None,
        share: float = 1,
    ) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if states is not None:
            requests = min(requests, states.requests)
            sessions, runs_out = states.sessions(tokens, self.options.context)
            kept = {"states": states.number, "runs_out": runs_out}
        if sliding is not None:
            each = self._sliding_tokens_of_a_request()
            requests, sessions = min(requests, sliding // each), min(sessions, sliding // each)
            kept = {"sliding_tokens": sliding}
        if self.options.hicache_size:
            kept |= self._host(token, tokens, states, sliding, self._sliding_token(share))
        return kept | {
            "cache": name,
            "bytes_per_token": token,
            "requests_at_a_time": requests,
            "pool_tokens": tokens,
            "sessions": sessions,
        }

    def _sliding_token(self, share: float) -> int:
        return 0 if self.windows is None else int(self.windows.token * share)

    def _host(
        self, token: int, tokens: int, states: States | None, sliding: int | None, sliding_token: int
    ) -> dict[str, Any]:
        """Return what host memory holds; SGLang shares it between tokens and what is beside them as the GPU does.

        Args:
            sliding: tokens of sliding windows on the GPU, None without any; sliding_token: bytes of one.
        """
        # SGLang counts in powers of ten
        size = self.options.hicache_size * 10**9
        of_states = 0 if states is None else (states.number + 1) * states.nbytes
        beside = of_states + (sliding or 0) * sliding_token
        for_others = size * beside // (beside + tokens * token)
        host_tokens = (size - for_others) // token // PAGE_SIZE * PAGE_SIZE
        kept, sessions = {"host_tokens": host_tokens}, [host_tokens // capacity.whole_pages(self.options.context)]
        if states is not None:
            kept["host_states"] = for_others // states.nbytes
            sessions.append(kept["host_states"] // states.per_session)
        elif sliding is not None:
            kept["host_sliding_tokens"] = for_others // sliding_token // PAGE_SIZE * PAGE_SIZE
            sessions.append(kept["host_sliding_tokens"] // self._sliding_tokens_of_a_request())
        return kept | {"host_sessions": min(sessions)}


def _defaults(options: argparse.Namespace) -> tuple[float, int, int]:
    """Return (reserved MiB, new tokens of a step, largest batch of a decode graph) of SGLang for a GPU."""
    _, chunk, few, many = next(entry for entry in DEFAULTS if options.gpu_gib < entry[0])
    graph_batch = few if options.tp < 4 else many
    reserved = RESERVED + 1.5 * max(chunk, 2048) + 2 * graph_batch + 128 * options.tp
    return max(reserved, RESERVED_OF_LARGE if options.gpu_gib > LARGE else 0), chunk, graph_batch


def _kv_memory(options: argparse.Namespace, weights: int) -> tuple[int, float]:
    """Return the bytes of a GPU for the cache, and the fraction that weights and cache may take."""
    total = options.gpu_gib * 1024
    fraction = options.mem_fraction_static or round((total - _defaults(options)[0]) / total, 3)
    return int(options.gpu_gib * GIB * fraction) - weights - TAKEN, fraction


def _weights(options: argparse.Namespace, model: Any, drafts: Drafts) -> int:
    """Return the bytes of the weights of all ranks, of a draft model too: as given, of the files, or estimated."""
    if options.weights_gib is not None:
        return int(options.weights_gib * GIB)
    of_drafts = 0 if drafts.folder is None else _file_bytes(drafts.folder)
    if of_files := _file_bytes(options.folder):
        return of_files + of_drafts
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(model.hf_config)
    except (ValueError, KeyError, ImportError, AttributeError) as error:
        raise ValueError(
            f"expected weights in {options.folder} or a model that transformers can build, got neither "
            f"({type(error).__name__}): add --weights-gib"
        ) from error
    return sum(p.numel() for p in empty.parameters()) * 2 + of_drafts


def _file_bytes(folder: str) -> int:
    """Return the bytes of the weights in a folder, 0 without any."""
    files = list(Path(folder).glob("*.safetensors")) or list(Path(folder).glob("*.bin"))
    return sum(file.stat().st_size for file in files)
