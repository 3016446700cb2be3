# SPDX-License-Identifier: Apache-2.0
"""The whole engine, cache against cache: pool tokens, time to first token, time per token, equal greedy tokens.

    python -m benchmarks.engine.bench_engine --model qwen3-8b-dummy --caches bf16 kvarn --shapes 1x8192 8x32768
    python -m benchmarks.engine.bench_engine --model qwen3-8b-dummy --caches bf16 kvarn --prefills 2048+0 2048+32768
    python -m benchmarks.engine.bench_engine --model smollm2 --caches bf16 kvarn kvarn_k4v4_g128 --answers

Every cache gets an engine of its own in a process of its own, one after the other, with the same memory fraction. A
shape BATCHxCONTEXT feeds BATCH random prompts of CONTEXT tokens to the first token (nothing cached), to the first token
again (all full pages cached), and to 65 and 129 tokens in turn; the time per token is the difference of the last two
over 64, whatever was cached of the prompts (states of hybrid models may be evicted). Shapes of up to 100,000 tokens run
once before they are measured. --prefills NEW+CACHED sends NEW random tokens on top of CACHED ones that the prefix cache
holds, --repeats times, each time other new tokens: one request at a time, to its first
token. --reloads NEW+CACHED does so on prefixes that only host memory holds (--hicache GB), because the device has room
for two of them. Dummy weights give true speeds and sizes, not texts. --answers adds three chats and one long prompt
with a second turn on top of it, greedy, and counts the tokens until the first one that differs from the first cache.
--drafts NGRAM=D or EAGLE3=D speculates with chains of D drafts. Hardly a draft of EAGLE3 is accepted, as its head has
random weights: what it shows is the time of a step.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import statistics
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import caches, cli, launch, models
from benchmarks.common.answers import agreement
from benchmarks.common.rows import Figure, Rows

MODULE = "benchmarks.engine.bench_engine"
# settings and figures of a shape
Measured = list[tuple[dict[str, Any], list[Figure]]]
CHATS = (
    "Name three primary colours and explain how they mix.",
    "What is the capital of France and why is it famous?",
    "Write a short story about a robot that learns to paint.",
)
DECODED = 64
# requests of a shape to the first token and to the last one, of which the medians count: one that is late by 0.2 s
# would move the time of a token by 3 ms
TRIES = 3
# tokens of a shape up to which it runs once before it is measured; what a larger one needs has run by then
WARMED_UP = 100_000
# prefixes of --reloads that the device has room for, with what is new
RELOADED = 2
# ids of random tokens are below this, or below the vocabulary
TOKENS = 30_000


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of sglang.Engine for one cache."""
    import torch

    chosen = models.arguments(args.model) | {
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_running_requests": args.max_running_requests,
        "log_level": "info",
    }
    if torch.cuda.is_available():
        chosen |= {"dtype": args.dtype, "mem_fraction_static": args.mem_fraction_static}
        chosen |= {"cuda_graph_max_bs_decode": args.max_running_requests}
    if args.tp > 1:
        chosen["tp_size"] = args.tp
    if args.no_prefill_graph:
        chosen["disable_prefill_cuda_graph"] = True
    if args.drafts:
        chosen |= models.draft_arguments(args.model, *args.drafts)
    chosen |= caches.host_memory(args.hicache)
    if args.reloads:
        chosen["max_total_tokens"] = RELOADED * max(sum(shape) for shape in args.reloads)
    return chosen | caches.engine_arguments(args.one, args.bf16_backend)


def memory_used() -> float | None:
    """Return the MiB in use on the GPU, by all processes; None without one."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return None
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _verify_steps(answers: list[dict[str, Any]]) -> int:
    """Return the verify steps of a batch, which goes on until its slowest request is done; 0 without drafts."""
    return max(answer["meta_info"].get("spec_verify_ct", 0) for answer in answers)


def measure_shape(engine: Any, batch: int, context: int, seed: int, tokens: int) -> Measured:
    """Return the figures of one shape; tokens: ids are below this."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, tokens) for _ in range(context)] for _ in range(batch)]

    def seconds(new_tokens: int) -> tuple[float, list[dict[str, Any]]]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        return time.perf_counter() - started, answers

    miss, _ = seconds(1)
    hits = [seconds(1) for _ in range(TRIES)]
    hit, answers = statistics.median(taken for taken, _ in hits), hits[-1][1]
    pairs = [(seconds(1 + DECODED), seconds(1 + 2 * DECODED)) for _ in range(TRIES)]
    shorter, longer = (statistics.median(pair[n][0] for pair in pairs) for n in (0, 1))
    per_token = (longer - shorter) / DECODED
    figures = [
        Figure("time_to_first_tokens", miss, "s"),
        Figure("time_to_first_tokens_cached", hit, "s"),
        Figure("cached_tokens_of_the_first", answers[0]["meta_info"]["cached_tokens"], "tokens"),
        Figure("time_per_token", per_token * 1e3, "ms"),
        Figure("throughput", batch / per_token, "tokens/s"),
    ]
    steps = [[_verify_steps(answers) for _, answers in pair] for pair in pairs]
    if all(map(all, steps)):
        verified = [
            (long[0] - short[0]) / (own[1] - own[0]) * 1e3 for (short, long), own in zip(pairs, steps, strict=True)
        ]
        count = statistics.median(own[1] - own[0] for own in steps)
        figures += [Figure.of("time_per_verify_step", verified, "ms"), Figure("verify_steps", count)]
    return [({"batch": batch, "context": context}, figures)]


def first_token(engine: Any, prompt: list[int]) -> tuple[float, dict[str, Any]]:
    """Return milliseconds to the first token of one request, and what the engine says of it."""
    started = time.perf_counter()
    answer = engine.generate(
        input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    )
    return (time.perf_counter() - started) * 1e3, answer["meta_info"]


def measure_prefill(engine: Any, new: int, cached: int, repeats: int, tokens: int) -> Measured:
    """Return the figures of requests of `new` tokens on `cached` ones in the prefix cache; tokens: as above."""
    draw = random.Random(new + cached)
    prefix = [draw.randrange(3, tokens) for _ in range(cached)]
    if prefix:
        first_token(engine, prefix)
    prompts = [prefix + [draw.randrange(3, tokens) for _ in range(new)] for _ in range(repeats + 1)]
    # the first one may meet a batch size for the first time
    _, *found = [first_token(engine, prompt) for prompt in prompts]
    hits = {facts["cached_tokens"] for _, facts in found}
    assert hits == {cached}, f"expected {cached} cached tokens, got {hits}: --prefills takes whole pages of 128"
    return [({"new": new, "cached": cached}, [Figure.of("time_to_first_token", [ms for ms, _ in found], "ms")])]


def measure_reload(engine: Any, new: int, cached: int, repeats: int, tokens: int) -> Measured:
    """Return the figures of requests of `new` tokens on `cached` ones in host memory; tokens: as above."""
    draw = random.Random(new + cached)
    prefixes = [[draw.randrange(3, tokens) for _ in range(cached)] for _ in range(max(repeats, RELOADED) + 1)]
    for prefix in prefixes:
        first_token(engine, prefix)
    # the prefix that was used the longest ago comes next, so none is on the device any more
    prompts = [prefix + [draw.randrange(3, tokens) for _ in range(new)] for prefix in prefixes[: repeats + 1]]
    _, *found = [first_token(engine, prompt) for prompt in prompts]
    loaded = {facts["cached_tokens_details"]["host"] for _, facts in found}
    assert loaded == {cached}, f"expected {cached} tokens from host memory, got {loaded}: a shape of --reloads a run"
    taken = Figure.of("time_to_first_token_reloaded", [ms for ms, _ in found], "ms")
    return [({"new": new, "cached": cached}, [taken])]


def greedy_answers(engine: Any, folder: str) -> dict[str, list[int]]:
    """Return greedy tokens of three chats, a long prompt and a turn on top of it (a prefix hit)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)

    def chat(text: str) -> list[int]:
        turn = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(prompt: list[int], count: int) -> dict[str, Any]:
        return engine.generate(input_ids=prompt, sampling_params={"temperature": 0, "max_new_tokens": count})

    answers = {text: answer(chat(text), 64)["output_ids"] for text in CHATS}
    document = tokenizer(Path(argparse.__file__).read_text())["input_ids"][:1500]
    first = answer(document, 100)["output_ids"]
    second = answer(document + first[:40] + chat(CHATS[0]), 64)
    answers |= {"document": first, "turn after the document": second["output_ids"]}
    answers["cached tokens of that turn"] = [second["meta_info"]["cached_tokens"]]
    batch = [document[: 300 + 37 * n] + chat(CHATS[n % 3]) for n in range(11)]
    together = engine.generate(input_ids=batch, sampling_params={"temperature": 0, "max_new_tokens": 64})
    return answers | {f"batch of 11, number {n}": a["output_ids"] for n, a in enumerate(together)}


def run_one(args: argparse.Namespace) -> None:
    """Measure one cache in this process and report to the parent."""
    import sglang

    arguments = engine_arguments(args)
    started = time.perf_counter()
    engine = sglang.Engine(**arguments)
    whole = [Figure("start_up", time.perf_counter() - started, "s")]
    whole.append(Figure("pool", engine.get_server_info()["max_total_num_tokens"], "tokens"))
    if used := memory_used():
        whole.append(Figure("memory_before_the_first_request", used, "MiB"))
    measured: Measured = []
    tokens = min(TOKENS, models.vocabulary(Path(arguments["model_path"])))
    if args.shapes or args.prefills or args.reloads:
        # builds and first launches are no part of any figure
        engine.generate(input_ids=[[5] * 300], sampling_params={"temperature": 0, "max_new_tokens": 4})
    for seed, shape in enumerate(args.shapes):
        batch, context = (int(n) for n in shape.split("x"))
        if batch * context <= WARMED_UP:
            measure_shape(engine, batch, context, 1000 + seed, tokens)
        measured += measure_shape(engine, batch, context, seed, tokens)
    for shape in args.prefills:
        measured += measure_prefill(engine, *shape, args.repeats, tokens)
    for shape in args.reloads:
        measured += measure_reload(engine, *shape, args.repeats, tokens)
    if used := memory_used():
        whole.append(Figure("memory_after_all_requests", used, "MiB"))
    answers = greedy_answers(engine, arguments["model_path"]) if args.answers else {}
    launch.report_result({"measured": [({}, whole), *measured], "answers": answers})
    engine.shutdown()


def turn(text: str) -> tuple[int, int]:
    """Return new and cached tokens of --prefills or --reloads.

    Raises:
        argparse.ArgumentTypeError: it is spelt otherwise.
    """
    new, _, cached = text.partition("+")
    if not (new.isdecimal() and cached.isdecimal() and int(new) and int(cached) % 128 == 0):
        raise argparse.ArgumentTypeError(f"expected NEW+CACHED, CACHED a multiple of 128, got {text!r}")
    return int(new), int(cached)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    cli.add_model(parser, models.SMOLLM2)
    cli.add_caches(parser, [caches.BF16, "kvarn"])
    parser.add_argument("--shapes", nargs="*", default=[], metavar="S", help="Requests x tokens of their context.")
    text = "New tokens + cached tokens, which are a multiple of 128, of one request at a time."
    parser.add_argument("--prefills", nargs="*", type=turn, default=[], metavar="S", help=text)
    text = "The same on cached tokens that only host memory holds; needs --hicache. The pool has room for two of them."
    parser.add_argument("--reloads", nargs="*", type=turn, default=[], metavar="S", help=text)
    cli.add_hicache(parser)
    cli.add_repeats(parser, 7, "Timed requests of each of --prefills and --reloads, whose median counts.")
    parser.add_argument("--answers", action="store_true", help="Compare greedy answers with those of the first cache.")
    parser.add_argument("--dtype", default="bfloat16", help="Data type of the model on a GPU.")
    cli.add_mem_fraction(parser)
    cli.add_max_running_requests(parser, 64)
    cli.add_bf16_backend(parser, "triton")
    text = "Speculate with chains of D drafts: NGRAM=D or EAGLE3=D. Without it nothing speculates."
    parser.add_argument("--drafts", type=cli.drafts, metavar="A=D", help=text)
    text = "Share every layer among so many GPUs (tensor parallelism). The pool is that of each."
    parser.add_argument("--tp", type=int, default=1, metavar="N", help=text)
    text = "Start faster, and prefill without CUDA graphs."
    parser.add_argument("--no-prefill-graph", action="store_true", help=text)
    cli.add_timeout(parser, 900, "one cache")
    cli.add_output(parser)
    cli.add_one(parser)
    args = parser.parse_args(arguments)
    if args.reloads and args.hicache is None:
        parser.error("--reloads needs host memory: add --hicache GB")
    return args


def compare(first: dict[str, list[int]], own: dict[str, list[int]]) -> Measured:
    """Return how many leading tokens of each answer are those of the first cache."""
    found: Measured = []
    for name, tokens in own.items():
        settings = {"answer": name, "of_tokens": len(first[name])}
        found.append((settings, [Figure("equal_tokens", agreement(first[name], tokens), "tokens")]))
    return found


def main() -> None:
    args = parse()
    if args.one:
        run_one(args)
        return
    rows = Rows(args.output, "engine")
    common = {"model": args.model, "mem_fraction_static": args.mem_fraction_static}
    common["max_running_requests"] = args.max_running_requests
    if args.drafts:
        common["drafts"] = "=".join(map(str, args.drafts))
    if args.hicache is not None:
        common["hicache"] = args.hicache
    if args.tp > 1:
        common["tp"] = args.tp
    first: dict[str, list[int]] | None = None
    for cache in args.caches:
        result = launch.run_alone(MODULE, cache, args.timeout)
        if result is None:
            continue
        measured = [(settings, [Figure(*figure) for figure in figures]) for settings, figures in result["measured"]]
        if first is None:
            first = result["answers"]
        else:
            measured += compare(first, result["answers"])
        backend = args.bf16_backend if cache in caches.STOCK else "kvarn"
        for settings, figures in measured:
            shape = " ".join(f"{name} {value}" for name, value in settings.items())
            for figure in figures:
                print(f"{cache:26} {shape:40} {figure.metric:32} {figure.value:14,.3f} {figure.unit}", flush=True)
            rows.append(cache, common | {"backend": backend} | settings, figures)


if __name__ == "__main__":
    main()
