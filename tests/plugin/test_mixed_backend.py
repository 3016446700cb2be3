# SPDX-License-Identifier: Apache-2.0
"""The attention backend of a model with sliding windows: which of its two parts does what."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from sglang_kvarn.mixed_backend import MixedBackend

SLIDING_IDS = [0, 2]


class Part:
    """A backend that notes what it is called for."""

    needs_cpu_seq_lens, max_context_len = False, 4096

    def __init__(self, name: str) -> None:
        self.token_to_kv_pool, self.req_to_token_pool = f"pool of {name}", f"rows of {name}"
        self.called: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, method: str) -> Any:
        return lambda *args, **kwargs: self.called.append((method, args))


@pytest.fixture
def parts() -> tuple[Part, Part, MixedBackend]:
    """Return the backends of records and of sliding windows, and the one made of both."""
    full, sliding = Part("full"), Part("sliding")
    return full, sliding, MixedBackend(full, sliding, SLIDING_IDS)


def test_a_layer_is_attended_by_the_backend_that_knows_its_cache(parts):
    full, sliding, mixed = parts
    for layer_id in range(4):
        mixed.forward("q", "k", "v", SimpleNamespace(layer_id=layer_id), "batch")
    by_part = [[args[3].layer_id for _, args in part.called] for part in (full, sliding)]
    assert by_part == [[1, 3], SLIDING_IDS]


@pytest.mark.parametrize(
    ("method", "args"),
    [
        ("init_forward_metadata", ("batch",)),
        ("init_forward_metadata_out_graph", ("batch",)),
        ("init_forward_metadata_in_graph", ("batch",)),
        ("init_cuda_graph_state", (8, 16)),
        ("on_after_cuda_graph_warmup", ()),
    ],
)
def test_both_backends_are_told_of_a_step(parts, method, args):
    full, sliding, mixed = parts
    getattr(mixed, method)(*args)
    assert full.called == sliding.called == [(method, args)]


def test_sglang_finds_the_pool_of_both_and_the_rows_of_requests(parts):
    # SGLang gives the backend that it made for the windows the pool of both
    assert (parts[2].token_to_kv_pool, parts[2].req_to_token_pool) == ("pool of sliding", "rows of full")
