# SPDX-License-Identifier: Apache-2.0
"""The flags of a load and of the server under it."""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.common import cli

# the ones with one value, which compare_isolation hands on to stress_isolation
LOAD = (
    *("model", "dtype", "requests", "tenants", "prompts_per_tenant", "load_seconds"),
    *("max_running_requests", "max_total_tokens", "seed"),
)


def add_load(
    to: argparse.ArgumentParser,
    *,
    model: str,
    dtype: str,
    requests: int,
    prompts_per_tenant: int,
    new_tokens: list[int],
    max_running_requests: int,
    max_total_tokens: int,
    server_args: str,
) -> None:
    """Add what is sent and to which server; the arguments are the defaults."""
    cli.add_model(to, model)
    to.add_argument("--dtype", default=dtype, help="Data type of the model.")
    to.add_argument("--requests", type=int, default=requests, metavar="N", help="Requests in all.")
    to.add_argument("--tenants", type=int, default=32, metavar="N", help="Tenants, each with a secret.")
    text = "Prompts of each tenant, from which its requests are drawn."
    to.add_argument("--prompts-per-tenant", type=int, default=prompts_per_tenant, metavar="N", help=text)
    text = "Lengths of answers, from which each request draws one."
    to.add_argument("--new-tokens", type=int, nargs="+", default=new_tokens, metavar="N", help=text)
    text = "Seconds of the load, after which no request is sent any more."
    to.add_argument("--load-seconds", type=float, default=float("inf"), metavar="S", help=text)
    cli.add_max_running_requests(to, max_running_requests)
    cli.add_hicache(to)
    text = "Folder of files behind the host memory of every loaded server; that is twice the pool without --hicache."
    to.add_argument("--hicache-files", type=Path, metavar="DIR", help=f"{text} Without it none.")
    text = "Tokens of the pool, so few that it evicts and retracts."
    to.add_argument("--max-total-tokens", type=int, default=max_total_tokens, metavar="N", help=text)
    cli.add_seed(to, "the order of requests")
    to.add_argument("--server-args", default=server_args, help="More flags of every server; without it none.")
