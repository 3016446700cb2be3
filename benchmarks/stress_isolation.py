# SPDX-License-Identifier: Apache-2.0
"""Many tenants on one small server: does any of them see another, and does every answer stay the same?

    python benchmarks/stress_isolation.py [--requests 500] [--tenants 32] [--model tiny|smollm2|DIR]
        [--preset kvarn] [--faults running|all] [--json FILE]
    python benchmarks/stress_isolation.py --url http://HOST:PORT --alone-url http://HOST:PORT ...

Without --url it starts two servers: one that answers every prompt alone, and one with a pool so small that it evicts
and retracts all the time; all requests draw from these prompts. Prompts carry secrets and share prefixes in a tree;
some clients disconnect or abort. Greedy answers must be those of the same prompt alone until a near tie
(`stress.oracle.NEAR_TIE`: matrix products round by batch, and inputs that round differently may get other codes), and
none may hold another's secret. "Alone" knows what a prefix-cache hit reads (`stress.oracle.Oracle`). --allow bounds
the answers that may differ beyond a near tie, as they do in 16-bit models.

Exit status 1 if an answer differs beyond --allow, a secret leaked, a request hung, a fault was not survived
or --limit has passed. `compare_isolation.py` runs it once per cache.
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
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import engines
import httpx
import kvarn_kernels
import sglang_kvarn
from kvarn_kernels.config import KVarNConfig
from rich.console import Console
from sglang_kvarn.demo import server as servers
from stress import faults
from stress.load import Answer, Load, run
from stress.oracle import NEAR_TIE, Oracle, flush
from stress.tenants import Prompt, contains, text_prompts, token_prompts

ROOT = Path(__file__).resolve().parents[1]
CONSOLE = Console(stderr=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="tiny", help="tiny (random weights), smollm2, or a folder")
    parser.add_argument("--preset", default="kvarn", help="value of --kv-cache-dtype")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--tenants", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=3, help="prompts of each tenant")
    parser.add_argument("--new-tokens", type=int, nargs="+", default=[8, 24, 40, 64])
    parser.add_argument("--rows", type=int, default=8, help="--max-running-requests of the server under load")
    parser.add_argument("--pool", type=int, default=3072, help="--max-total-tokens of it")
    parser.add_argument("--retract-every", type=int, default=9, help="decode steps; 0: only without memory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--allow", type=int, default=0, help="answers that may differ from those alone")
    parser.add_argument(
        "--faults",
        choices=("none", "running", "all"),
        default="none",
        help="also those of a running server, SIGTERM last; all: and a start without enough memory",
    )
    parser.add_argument("--url", help="a running server to load; --rows and --pool are then its own")
    parser.add_argument("--alone-url", help="a running server for the answers alone; default: --url, first")
    parser.add_argument("--server-args", default="", help="more flags of the servers that are started")
    parser.add_argument(
        "--at-once", action="store_true", help="start both servers together; needs cores and a small memory fraction"
    )
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="of the load, after which no request is sent any more"
    )
    parser.add_argument("--limit", type=int, default=3600, help="seconds until the run ends as failed")
    parser.add_argument("--json", type=Path, help="write the result here")
    return parser.parse_args()


def model_folder(name: str, work: Path) -> str:
    """Return the folder of the model, made on the way."""
    if name == "tiny":
        sys.path.insert(0, str(ROOT / "tests" / "engine"))
        import tiny_model

        return tiny_model.save(work)
    return engines.model_folder(name)


def server_flags(args: argparse.Namespace, folder: str) -> list[str]:
    """Return the flags that both servers have."""
    flags = ["--model-path", folder, "--kv-cache-dtype", args.preset, "--dtype", args.dtype]
    flags += ["--random-seed", "0", "--skip-server-warmup", "--log-level", "warning"]
    flags += ["--skip-tokenizer-init"] if args.model == "tiny" else []
    return flags + args.server_args.split()


def fingerprint() -> str:
    """Return the hash of both packages: servers that run different code would differ in every answer."""
    digest = hashlib.sha256()
    for package in (kvarn_kernels, sglang_kvarn):
        for folder in package.__path__:
            for file in sorted(Path(folder).rglob("*.py")):
                digest.update(file.read_bytes())
    return digest.hexdigest()


@contextlib.contextmanager
def launched(flags: list[str], *environment: str) -> Iterator[servers.Server]:
    """Launch a server on a free port, with more environment variables; its `wait` is the caller's."""
    port = servers.choose_port(None)
    # env(1) becomes the server: the process id stays
    server = servers.Server(["env", *environment, *servers.launch_command(flags, port)], port)
    try:
        yield server
    finally:
        server.stop()


def judge(oracle: Oracle, answers: list[Answer]) -> dict:
    """Compare every answer, also the part that a dropped client read, with the answer alone."""
    prompts = oracle.prompts
    secrets = {prompt.tenant: prompt.secret for prompt in prompts}
    differing, near_ties, leaks, hung = [], [], [], []
    for n, answer in enumerate(answers):
        ids = answer.output_ids
        complete = answer.kind != "plain" or len(ids) == answer.new_tokens
        if answer.error or not complete:
            hung.append(f"{n}: {answer.error or f'{len(ids)} of {answer.new_tokens} tokens'}")
        first, margin = oracle.compare(answer)
        if first is not None:
            where = {"prompt": answer.prompt, "kind": answer.kind, "first": first, "margin": round(margin, 4)}
            (differing if margin >= NEAR_TIE else near_ties).append(where)
        mine = prompts[answer.prompt].tenant
        if answer.output:
            leaks += [
                (n, t) for t, secret in secrets.items() if t != mine and contains(answer.output, secret)
            ]
    meta = [a.output["meta_info"] for a in answers if a.output]
    plain = sorted(a.seconds for a in answers if a.kind == "plain" and not a.error)
    return {
        "requests": len(answers),
        "plain": len(plain),
        "disconnected": sum(a.kind == "disconnect" for a in answers),
        "aborted": sum(a.kind == "abort" for a in answers),
        "tokens": sum(len(a.output_ids) for a in answers),
        "prefix hits": sum(m.get("cached_tokens", 0) > 0 for m in meta),
        "cached tokens": sum(m.get("cached_tokens", 0) for m in meta),
        "retractions": sum(m.get("num_retractions", 0) for m in meta),
        "seconds p50": round(median(plain), 2) if plain else None,
        "seconds p95": round(quantiles(plain, n=20)[-1], 2) if len(plain) > 1 else None,
        "seconds max": round(plain[-1], 2) if plain else None,
        "differing at a near tie": len(near_ties),
        "near ties": near_ties[:20],
        "differing": len(differing),
        "differing answers": differing[:20],
        "differing prompts": len({where["prompt"] for where in differing + near_ties}),
        "leaked secrets": len(leaks),
        "leaks": leaks[:20],
        "failed": len(hung),
        "failures": hung[:20],
    }


def under_load(args: argparse.Namespace, url: str, oracle: Oracle) -> dict:
    """Run the load and judge it."""
    load = Load(oracle.prompts, args.requests, tuple(args.new_tokens), seed=args.seed)
    start = time.monotonic()
    answers = asyncio.run(run(url, load, args.seconds))
    seconds = time.monotonic() - start
    return judge(oracle, answers) | {
        "seconds": round(seconds, 1),
        "requests per second": round(len(answers) / seconds, 2),
    }


def run_faults(args: argparse.Namespace, server, oracle: Oracle) -> list:
    """Run the faults on the server that the load ran on; the last one ends it."""
    url, prompts = server.url, oracle.prompts
    found = [
        asyncio.run(faults.oversized_prompt(url, prompts, oracle, args.pool)),
        asyncio.run(faults.more_requests_than_rows(url, prompts, oracle, args.rows)),
        asyncio.run(faults.disconnects_in_prefill(url, prompts, oracle, args.rows)),
        asyncio.run(faults.terminate_under_load(url, prompts, oracle, server)),
    ]
    return found


def hits_differ(preset: str) -> bool:
    """Whether a prefix-cache hit reads other values than a miss with this cache."""
    return preset.startswith("kvarn") and not KVarNConfig.from_preset(preset).is_canonical


def make_prompts(args: argparse.Namespace, folder: str) -> list[Prompt]:
    """Return the prompts as token ids, so that the oracle can cut them at pages."""
    if args.model == "tiny":
        return token_prompts(args.tenants, args.prompts)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = text_prompts(args.tenants, args.prompts)
    return [Prompt(p.tenant, {"input_ids": tokenizer(p.payload["text"])["input_ids"]}, p.secret) for p in found]


def ask_all(oracle: Oracle) -> None:
    """Ask for the answer of every prompt with an empty prefix cache, before anything loads the machine."""
    for prompt in range(len(oracle.prompts)):
        oracle.alone(prompt)
    CONSOLE.print(f"{len(oracle.prompts)} answers alone", highlight=False)


def end_at(limit: int) -> None:
    """End this run and its servers after so many seconds, or on SIGTERM."""

    def stop(signum: int, frame: object) -> None:
        raise SystemExit(f"expected to be done within {limit} s: raise --limit, or see where it hangs")

    signal.signal(signal.SIGALRM, stop)
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    signal.alarm(limit)


def main() -> int:
    args = arguments()
    end_at(args.limit)
    longest = max(args.new_tokens)
    # threads that spin for each other stall two servers' worth of processes on few cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    result: dict = {"preset": args.preset, "model": args.model, "dtype": args.dtype, "seed": args.seed}
    found: list[faults.Fault] = []
    with tempfile.TemporaryDirectory(prefix="kvarn-stress-") as work:
        folder = model_folder(args.model, Path(work))
        prompts = make_prompts(args, folder)
        window = hits_differ(args.preset)
        if args.url:
            oracle = Oracle(args.alone_url or args.url, prompts, longest, window and args.alone_url is not None)
            ask_all(oracle)
            with httpx.Client(base_url=args.url, timeout=60, trust_env=False) as client:
                flush(client)
            result |= under_load(args, args.url, oracle)
        else:
            flags = server_flags(args, folder)
            quiet = ["--max-running-requests", "2", "--max-total-tokens", "8192"]
            quiet += [] if window else ["--disable-radix-cache"]
            small = ["--max-running-requests", str(args.rows), "--max-total-tokens", str(args.pool)]
            small += ["--chunked-prefill-size", "256", "--enable-mixed-chunk"]
            # as many requests as fit right now: memory runs out while they decode, and some are retracted
            small += ["--schedule-conservativeness", "0"]
            retract = [f"SGLANG_TEST_RETRACT_INTERVAL={args.retract_every}", "SGLANG_TEST_RETRACT=1"]
            start = partial(launched, [*flags, *small], *(retract if args.retract_every else []))
            code = fingerprint()
            with contextlib.ExitStack() as stack:
                early = stack.enter_context(start()) if args.at_once else None
                # it stays: what a hit is answered is asked when one was seen
                quiet_server = stack.enter_context(launched([*flags, *quiet]))
                quiet_server.wait(CONSOLE)
                oracle = Oracle(quiet_server.url, prompts, longest, window)
                ask_all(oracle)
                server = early or stack.enter_context(start())
                server.wait(CONSOLE)
                if fingerprint() != code:
                    raise SystemExit(
                        "expected the same code in both servers, it changed in between: run again"
                    )
                result |= under_load(args, server.url, oracle)
                if args.faults != "none":
                    found = run_faults(args, server, oracle)
            if args.faults == "all":
                port = servers.choose_port(None)
                found.append(faults.out_of_memory_at_start(servers.launch_command(flags, port)))
    result["faults"] = {fault.name: {"passed": fault.passed, "seen": fault.seen} for fault in found}
    text = json.dumps(result, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    # ties are rare: more than one answer in 50 that takes the other way is no rounding
    ties = result["differing at a near tie"] > max(2, args.requests // 50)
    bad = ties or result["differing"] > args.allow or result["leaked secrets"] or result["failed"]
    return int(bool(bad) or not all(fault.passed for fault in found))


if __name__ == "__main__":
    sys.exit(main())
