# SPDX-License-Identifier: Apache-2.0
"""What a real server says about its cache over HTTP."""

from __future__ import annotations

import re

import httpx
from rich.console import Console
from sglang_kvarn import report
from sglang_kvarn.demo import server as servers

from benchmarks.common.tiny_model import prompt

FLAGS = "--kv-cache-dtype kvarn_k2v2_g128 --dtype float32 --skip-tokenizer-init --skip-server-warmup --enable-metrics"
FLAGS += " --max-total-tokens 8192 --max-running-requests 3 --log-level warning"
FLAGS += " --enable-hierarchical-cache --hicache-ratio 3"


def test_server_info_and_metrics_carry_the_sizes_of_the_cache(model):
    port = servers.choose_port(None)
    server = servers.Server(servers.launch_command(["--model-path", str(model), *FLAGS.split()], port), port)
    try:
        server.wait(Console(stderr=True))

        def get(path: str) -> httpx.Response:
            response = httpx.get(f"{server.url}/{path}", timeout=60, trust_env=False)
            response.raise_for_status()
            return response

        body = {"input_ids": prompt(300, seed=1), "sampling_params": {"temperature": 0, "max_new_tokens": 2}}
        httpx.post(f"{server.url}/generate", json=body, timeout=120, trust_env=False).raise_for_status()
        facts = get("server_info").json()["internal_states"][0]["kvarn"]
        metrics = dict(re.findall(r'sglang:kvarn_(\w+)\{preset="kvarn_k2v2_g128"\} (\S+)', get("metrics").text))
    finally:
        server.stop()
    # 300 tokens: two full pages stay in the prefix cache, and are copied to host memory
    assert facts.pop("host_pages_in_use") == 2 and facts["host_tokens"] == 3 * 8192 + 128
    assert facts.pop("pages_in_use") == 2 and facts.pop("preset") == "kvarn_k2v2_g128"
    assert facts["pool_tokens"] == 8192 and facts["max_requests"] == 3
    assert facts["bytes_per_token"] > 0 and facts["ring_tokens"] > 0
    # the request has ended, and its ring is back in the pool
    assert facts.pop("rings_in_use") == 0
    assert {name: float(value) for name, value in metrics.items()} == facts and facts.keys() == report.GAUGES.keys()
