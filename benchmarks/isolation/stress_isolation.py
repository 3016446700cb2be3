# SPDX-License-Identifier: Apache-2.0
"""Many tenants on one small server: does any of them see another, and does every answer stay the same?

    python -m benchmarks.isolation.stress_isolation --requests 500 --cache kvarn --faults running --result FILE
    python -m benchmarks.isolation.stress_isolation --url http://HOST:PORT --alone-url http://HOST:PORT ...

Without --url it starts two servers: one that answers every prompt alone, and one with a pool so small that it evicts
and retracts all the time; all requests draw from these prompts. Prompts carry secrets and share prefixes in a tree;
some clients disconnect or abort. Greedy answers must be those of the same prompt alone until a near tie
(`oracle.NEAR_TIE`: matrix products round by batch, and inputs that round differently may get other codes), and
none may hold another's secret. "Alone" knows what a prefix-cache hit reads (`oracle.Oracle`). --allow bounds
the answers that may differ beyond a near tie, as they do in 16-bit models.

Exit status 1 if an answer differs beyond --allow, a secret leaked, a request hung, a fault was not survived
or --timeout has passed. `compare_isolation` runs it once per cache.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import kvarn_kernels
import sglang_kvarn
from kvarn_kernels.config import KVarNConfig
from sglang_kvarn.demo.server import Server

from benchmarks.common import caches, cli, launch, models
from benchmarks.common.caches import STOCK
from benchmarks.isolation import faults, flags
from benchmarks.isolation.judge import judge
from benchmarks.isolation.load import Load, run
from benchmarks.isolation.oracle import Oracle, flush
from benchmarks.isolation.tenants import Prompt, text_prompts, token_prompts


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = cli.parser(__doc__)
    text = f"Cache of both servers: {', '.join(caches.CACHES)}."
    parser.add_argument("--cache", default="kvarn", choices=caches.CACHES, metavar="C", help=text)
    flags.add_load(
        parser,
        model=models.TINY,
        dtype="float32",
        requests=500,
        prompts_per_tenant=3,
        new_tokens=[8, 24, 40, 64],
        max_running_requests=8,
        # the rings of 5 requests of the tiny model and 3,072 tokens, so that requests wait and prefixes are evicted
        max_total_tokens=9472,
        server_args="",
    )
    text = "Decode steps after which requests are retracted; with 0 only where memory runs out."
    parser.add_argument("--retract-every", type=int, default=9, metavar="N", help=text)
    text = "Answers that may differ from those alone."
    parser.add_argument("--allow", type=int, default=0, metavar="N", help=text)
    text = "Also faults: running are those of a running server, SIGTERM last; all adds a start without enough memory."
    parser.add_argument("--faults", choices=("none", "running", "all"), default="none", help=text)
    text = "Running server to load, whose requests and pool are its own; without it servers are started."
    parser.add_argument("--url", help=text)
    text = "Running server for the answers alone; without it --url gives them first."
    parser.add_argument("--alone-url", help=text)
    text = "Start both servers together, which needs cores and a small memory fraction."
    parser.add_argument("--at-once", action="store_true", help=text)
    cli.add_timeout(parser, 3600, "the whole run, which fails after them")
    text = "Write the result to this file, too, as one JSON object; without it the result is printed only."
    parser.add_argument("--result", type=Path, metavar="FILE", help=text)
    return parser.parse_args(arguments)


def server_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags that both servers have."""
    own = models.arguments(args.model) | caches.arguments(args.cache)
    own |= {"dtype": args.dtype, "random_seed": 0, "skip_server_warmup": True, "log_level": "warning"}
    if args.model in models.TINY_ONES:
        own["skip_tokenizer_init"] = True
    return launch.flags(own) + args.server_args.split()


def fingerprint() -> str:
    """Return the hash of both packages: servers that run different code would differ in every answer."""
    digest = hashlib.sha256()
    for package in (kvarn_kernels, sglang_kvarn):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


def under_load(args: argparse.Namespace, url: str, oracle: Oracle) -> dict:
    """Run the load and judge it."""
    load = Load(oracle.prompts, args.requests, tuple(args.new_tokens), seed=args.seed)
    start = time.monotonic()
    answers = asyncio.run(run(url, load, args.load_seconds))
    seconds = time.monotonic() - start
    return judge(oracle, answers) | {
        "seconds": round(seconds, 1),
        "requests per second": round(len(answers) / seconds, 2),
    }


def run_faults(args: argparse.Namespace, server: Server, oracle: Oracle) -> list[faults.Fault]:
    """Run the faults on the server that the load ran on; the last one ends it."""
    url, prompts = server.url, oracle.prompts
    found = [
        asyncio.run(faults.oversized_prompt(url, prompts, oracle, args.max_total_tokens)),
        asyncio.run(faults.more_requests_than_rows(url, prompts, oracle, args.max_running_requests)),
        asyncio.run(faults.disconnects_in_prefill(url, prompts, oracle, args.max_running_requests)),
        asyncio.run(faults.terminate_under_load(url, prompts, oracle, server)),
    ]
    return found


def hits_differ(cache: str) -> bool:
    """Whether a prefix-cache hit reads other values than a miss with this cache."""
    return cache not in STOCK and KVarNConfig.from_preset(cache).window_pages > 0


def make_prompts(args: argparse.Namespace) -> list[Prompt]:
    """Return the prompts as token ids, so that the oracle can cut them at pages."""
    if args.model in models.TINY_ONES:
        return token_prompts(args.tenants, args.prompts_per_tenant)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models.folder(args.model))
    found = text_prompts(args.tenants, args.prompts_per_tenant)
    return [Prompt(p.tenant, {"input_ids": tokenizer(p.payload["text"])["input_ids"]}, p.secret) for p in found]


def ask_all(oracle: Oracle) -> None:
    """Ask for the answer of every prompt with an empty prefix cache, before anything loads the machine."""
    for prompt in range(len(oracle.prompts)):
        oracle.alone(prompt)
    launch.CONSOLE.print(f"{len(oracle.prompts)} answers alone", highlight=False)


def end_at(timeout: float) -> None:
    """End this run and its servers after so many seconds, or on SIGTERM."""

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(f"expected to be done within {timeout:g} s: raise --timeout, or see where it hangs")

    launch.end_on_signals()
    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, timeout)


def load_given(args: argparse.Namespace, prompts: list[Prompt], window: bool) -> dict:
    """Load the server of --url."""
    alone = args.alone_url or args.url
    oracle = Oracle(alone, prompts, max(args.new_tokens), window and args.alone_url is not None)
    ask_all(oracle)
    with httpx.Client(base_url=args.url, timeout=60, trust_env=False) as client:
        flush(client)
    return under_load(args, args.url, oracle)


def load_own(args: argparse.Namespace, prompts: list[Prompt], window: bool) -> tuple[dict, list[faults.Fault]]:
    """Start two servers, load one of them, and return the result and the faults."""
    both = server_flags(args)
    quiet = {"max_running_requests": 2, "max_total_tokens": 14_336} | ({} if window else {"disable_radix_cache": True})
    small = {
        "max_running_requests": args.max_running_requests,
        "max_total_tokens": args.max_total_tokens,
        "chunked_prefill_size": 256,
        # as many requests as fit right now: memory runs out while they decode, and some are retracted
        "schedule_conservativeness": 0,
    } | caches.host_memory(args.hicache)
    if args.model != models.TINY_HYBRID:
        # refused beside states
        small["enable_mixed_chunk"] = True
    retract = [f"SGLANG_TEST_RETRACT_INTERVAL={args.retract_every}", "SGLANG_TEST_RETRACT=1"]
    environment = retract if args.retract_every else []
    if args.hicache_files is not None:
        small |= {"enable_hierarchical_cache": True, "hicache_storage_backend": "file"}
        # the default policy computes again what takes long to read, so that little would be read
        small["hicache_storage_prefetch_policy"] = "wait_complete"
        environment.append(f"SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR={args.hicache_files / args.cache}")

    def start() -> contextlib.AbstractContextManager[Server]:
        return launch.starting([*both, *launch.flags(small)], *environment)

    code, found = fingerprint(), list[faults.Fault]()
    with contextlib.ExitStack() as stack:
        early = stack.enter_context(start()) if args.at_once else None
        # it stays: what a hit is answered is asked when one was seen
        alone = stack.enter_context(launch.running([*both, *launch.flags(quiet)]))
        oracle = Oracle(alone.url, prompts, max(args.new_tokens), window)
        ask_all(oracle)
        server = early or stack.enter_context(start())
        server.wait(launch.CONSOLE)
        if fingerprint() != code:
            raise SystemExit("expected the same code in both servers, it changed in between: run again")
        result = under_load(args, server.url, oracle)
        if args.faults != "none":
            found = run_faults(args, server, oracle)
    if args.faults == "all":
        found.append(faults.out_of_memory_at_start(launch.server_command(both)[0]))
    return result, found


def main() -> int:
    args = parse()
    end_at(args.timeout)
    # threads that spin for each other stall two servers' worth of processes on few cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    prompts, window = make_prompts(args), hits_differ(args.cache)
    found = list[faults.Fault]()
    if args.url:
        judged = load_given(args, prompts, window)
    else:
        judged, found = load_own(args, prompts, window)
    result = {"cache": args.cache, "model": args.model, "dtype": args.dtype, "seed": args.seed} | judged
    result["faults"] = {fault.name: {"passed": fault.passed, "seen": fault.seen} for fault in found}
    text = json.dumps(result, indent=2)
    print(text)
    if args.result:
        args.result.write_text(text + "\n")
    # ties are rare: more than one answer in 50 that takes the other way is no rounding
    ties = result["differing at a near tie"] > max(2, args.requests // 50)
    bad = ties or result["differing"] > args.allow or result["leaked secrets"] or result["failed"]
    return int(bool(bad) or not all(fault.passed for fault in found))


if __name__ == "__main__":
    sys.exit(main())
