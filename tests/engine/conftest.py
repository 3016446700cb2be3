# SPDX-License-Identifier: Apache-2.0
"""Real engines on the CPU: spawned scheduler, overlap loop, radix tree, paged allocator, chunking."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from forked_engines import forked, stop_others
from sglang_kvarn import compat
from sglang_kvarn.cpu import platform

from benchmarks.common import tiny_model

OPTIONS = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "kv_cache_dtype": "kvarn_canonical",
    # 4,096 tokens and the rings of 4 requests
    "max_total_tokens": 14_336,
    "max_running_requests": 4,
    "chunked_prefill_size": 256,
    "random_seed": 0,
    "custom_sigquit_handler": tiny_model.fail,
}


@pytest.fixture(scope="module", autouse=True)
def servers() -> Iterator[None]:
    """Stop what forks the processes of engines in an environment that a file of tests made."""
    yield
    stop_others()


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Return the folder of the tiny model."""
    return tiny_model.save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def start_engine(model):
    """Return a context manager that runs an engine as a user would start it, on the CPU; its processes are forked."""
    platform.prepare_environment()
    if not platform.is_active():
        pytest.skip("these tests are for a machine without a GPU")

    @contextmanager
    def start(**options) -> Iterator:
        with forked():
            engine = compat.resolve("sglang.Engine")(**({"model_path": model} | OPTIONS | options))
            try:
                yield engine
            finally:
                engine.shutdown()

    return start


@pytest.fixture
def stored(monkeypatch, tmp_path) -> dict[str, str]:
    """Return the options of an engine with files behind host memory, in the folder `pages`."""
    monkeypatch.setenv("SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR", str(tmp_path / "pages"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))
    return {"hicache_storage_backend": "file", "hicache_storage_prefetch_policy": "wait_complete"}
