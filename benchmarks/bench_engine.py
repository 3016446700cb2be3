# SPDX-License-Identifier: Apache-2.0
"""The whole engine, cache against cache: pool tokens, time to first token, time per token, equal greedy tokens.

    python benchmarks/bench_engine.py --model qwen3-8b-dummy --caches bf16 kvarn --shapes 1x8192 1x32768 8x32768
    python benchmarks/bench_engine.py --model qwen3-8b-dummy --caches bf16 kvarn --prefills 2048+0 2048+32768
    python benchmarks/bench_engine.py --model smollm2 --caches bf16 kvarn kvarn_k4v4_g128 --prompts

Every cache gets an engine of its own in a process of its own, one after the other, with the same memory fraction. A
shape BATCHxCONTEXT feeds BATCH random prompts of CONTEXT tokens to the first token (nothing cached), to the first token
again (all full pages cached), and to 65 tokens; the time per token is the difference of the last two over 64. Shapes of
up to 100,000 tokens run once before they are measured. --prefills NEW+CACHED sends NEW random tokens on top of CACHED
ones that the prefix cache holds, --repeats times, each time other new tokens: one request at a time, to its first
token. Dummy weights give true speeds and sizes, not texts. --prompts adds three chats and one long prompt with a second
turn on top of it, greedy, and counts the tokens until the first one that differs from the first cache.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import engines
from rows import append, check_columns, commit

QWEN3_8B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 4096, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288,
    "vocab_size": 151936, "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "rope_theta": 1000000,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "torch_dtype": "bfloat16",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
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
COLUMNS = [
    "device", "torch", "sglang", "commit", "model", "cache", "backend", "mem_fraction", "quantity", "value", "unit",
]  # fmt: skip


def engine_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of sgl.Engine for one cache."""
    import torch

    chosen: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "sampling_backend": "pytorch",
        "grammar_backend": "none",
        "max_running_requests": args.max_requests,
        "log_level": "info",
    }
    if torch.cuda.is_available():
        chosen |= {"dtype": args.dtype, "mem_fraction_static": args.mem_fraction}
        chosen |= {"cuda_graph_max_bs_decode": args.max_requests}
    if args.no_prefill_graph:
        chosen["disable_prefill_cuda_graph"] = True
    if args.model == "qwen3-8b-dummy":
        folder = Path(tempfile.gettempdir()) / "sglang-kvarn-qwen3-8b-dummy"
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(QWEN3_8B))
        chosen |= {"model_path": str(folder), "load_format": "dummy", "context_length": 140_000}
    else:
        chosen["model_path"] = engines.model_folder(args.model)
    return chosen | engines.cache_arguments(args.one, args.bf16_backend)


def memory_used() -> float | None:
    """Return the MiB in use on the GPU, by all processes; None without one."""
    device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    command = ["nvidia-smi", f"--id={device}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    if shutil.which(command[0]) is None:
        return None
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def measure_shape(engine: Any, batch: int, context: int, seed: int) -> list[tuple[str, float, str]]:
    """Return (quantity, value, unit) of one shape."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(3, 30_000) for _ in range(context)] for _ in range(batch)]

    def seconds(new_tokens: int) -> tuple[float, list[dict[str, Any]]]:
        sampling = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
        started = time.perf_counter()
        answers = engine.generate(input_ids=prompts, sampling_params=sampling)
        return time.perf_counter() - started, answers

    miss, _ = seconds(1)
    hits = [seconds(1) for _ in range(TRIES)]
    hit, answers = statistics.median(taken for taken, _ in hits), hits[-1][1]
    whole = statistics.median(seconds(1 + DECODED)[0] for _ in range(TRIES))
    shape = f"{batch}x{context}"
    per_token = (whole - hit) / DECODED
    return [
        (f"{shape} time to first tokens", miss, "s"),
        (f"{shape} time to first tokens, cached", hit, "s"),
        (f"{shape} cached tokens of the first", answers[0]["meta_info"]["cached_tokens"], "tokens"),
        (f"{shape} time per token", per_token * 1e3, "ms"),
        (f"{shape} throughput", batch / per_token, "tokens/s"),
    ]


def measure_prefill(engine: Any, new: int, cached: int, repeats: int) -> list[tuple[str, float, str]]:
    """Return (quantity, value, unit) of requests of `new` tokens on `cached` ones in the prefix cache."""
    draw = random.Random(new + cached)
    sampling = {"temperature": 0, "max_new_tokens": 1, "ignore_eos": True}
    prefix = [draw.randrange(3, 30_000) for _ in range(cached)]
    if prefix:
        engine.generate(input_ids=prefix, sampling_params=sampling)
    times, hits = [], set()
    for n in range(repeats + 1):
        prompt = prefix + [draw.randrange(3, 30_000) for _ in range(new)]
        started = time.perf_counter()
        answer = engine.generate(input_ids=prompt, sampling_params=sampling)
        # the first one may meet a batch size for the first time
        if n:
            times.append((time.perf_counter() - started) * 1e3)
            hits.add(answer["meta_info"]["cached_tokens"])
    assert hits == {cached}, f"expected {cached} cached tokens, got {hits}: --prefills takes whole pages of 128"
    times.sort()
    name = f"{new}+{cached} time to first token"
    return [
        (name, statistics.median(times), "ms"),
        (f"{name}, p20", times[len(times) // 5], "ms"),
        (f"{name}, p80", times[len(times) * 4 // 5], "ms"),
    ]


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
    """Measure one cache in this process and print one JSON line."""
    import sglang

    arguments = engine_arguments(args)
    started = time.perf_counter()
    engine = sglang.Engine(**arguments)
    rows: list[tuple[str, float, str]] = [("start-up", time.perf_counter() - started, "s")]
    rows.append(("pool", engine.get_server_info()["max_total_num_tokens"], "tokens"))
    if used := memory_used():
        rows.append(("memory used before the first request", used, "MiB"))
    if args.shapes or args.prefills:
        # builds and first launches are no part of any figure
        engine.generate(input_ids=[[5] * 300], sampling_params={"temperature": 0, "max_new_tokens": 4})
    for seed, shape in enumerate(args.shapes):
        batch, context = (int(n) for n in shape.split("x"))
        if batch * context <= WARMED_UP:
            measure_shape(engine, batch, context, seed=1000 + seed)
        rows += measure_shape(engine, batch, context, seed)
    for shape in args.prefills:
        rows += measure_prefill(engine, *(int(n) for n in shape.split("+")), args.repeats)
    if used := memory_used():
        rows.append(("memory used after all requests", used, "MiB"))
    answers = greedy_answers(engine, arguments["model_path"]) if args.prompts else {}
    engines.report_result({"rows": rows, "answers": answers})
    engine.shutdown()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="smollm2, qwen3-8b-dummy or a folder, default %(default)s")
    parser.add_argument("--caches", nargs="+", default=["bf16", "kvarn"], choices=engines.CACHES)
    parser.add_argument("--shapes", nargs="*", default=[], help="BATCHxCONTEXT ...")
    parser.add_argument("--prefills", nargs="*", default=[], help="NEW+CACHED ..., CACHED a multiple of 128")
    parser.add_argument("--repeats", type=int, default=7, help="requests of each prefill, default %(default)s")
    parser.add_argument("--prompts", action="store_true", help="compare greedy answers with those of the first cache")
    parser.add_argument("--dtype", default="bfloat16", help="of the model on a GPU, default %(default)s")
    parser.add_argument("--mem-fraction", type=float, default=0.8, help="of a GPU, default %(default)s")
    parser.add_argument("--max-requests", type=int, default=64, help="requests at a time, default %(default)s")
    parser.add_argument("--bf16-backend", default="triton", help="of bf16 and fp8: triton, flashinfer, ...")
    parser.add_argument("--no-prefill-graph", action="store_true", help="start faster, prefill without CUDA graphs")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one cache, default %(default)s")
    parser.add_argument("--csv", type=Path, help="append rows to this file")
    parser.add_argument("--one", choices=engines.CACHES, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.one:
        run_one(args)
        return
    check_columns(args.csv, COLUMNS)
    common = engines.device_facts() | {"commit": commit(), "model": args.model, "mem_fraction": args.mem_fraction}
    baseline: dict[str, list[int]] | None = None
    written = []
    for cache in args.caches:
        result = engines.run_alone(cache, args.timeout)
        if result is None:
            continue
        rows = result["rows"]
        if baseline is None:
            baseline = result["answers"]
        else:
            for name, tokens in result["answers"].items():
                equal = engines.agreement(baseline[name], tokens)
                rows.append((f"equal tokens of {len(baseline[name])}: {name}", equal, ""))
        backend = args.bf16_backend if cache in engines.STOCK else "kvarn"
        for quantity, value, unit in rows:
            print(f"{cache:26} {quantity:50} {value:14,.3f} {unit}", flush=True)
            row = {"cache": cache, "backend": backend, "quantity": quantity, "value": value, "unit": unit}
            written.append(common | row)
    if args.csv and written:
        append(args.csv, COLUMNS, written)


if __name__ == "__main__":
    main()
