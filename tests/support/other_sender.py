# SPDX-License-Identifier: Apache-2.0
"""What a prefill server tells of itself, changed: a decode server then takes it for one with another cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx

HOST = "127.0.0.1"


@contextmanager
def tell(bootstrap_port: int, change: Callable[[dict[str, Any]], None]) -> Iterator[int]:
    """Answer in the place of the prefill server at a port; return the port of these answers.

    Args:
        change: what is told of the server, in place; where its ranks are stays true.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer = httpx.get(f"http://{HOST}:{bootstrap_port}{self.path}")
            body = answer.content
            if "prefill_dp_rank=-1" in self.path:
                told = answer.json()
                change(told)
                body = json.dumps(told).encode()
            self.send_response(answer.status_code)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer((HOST, 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address[1]
        server.shutdown()
