# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a refusal: of a command the last line and exit code 1, of the library a ValueError."""

from __future__ import annotations

import subprocess
import sys

import pytest
from sglang_kvarn.cpu import platform

# less than the ring of a request, which only a scheduler knows
TOO_FEW = 1280
COMMAND = "-m sglang.launch_server --kv-cache-dtype kvarn --dtype float32 --skip-tokenizer-init --model-path"


needs_no_gpu = pytest.mark.skipif(not platform.is_active(), reason="for a machine without a GPU")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (
            "--speculative-algorithm NGRAM",
            "--speculative-ngram-max-bfs-breadth 10 cannot be combined with --kv-cache-dtype kvarn, because the tokens "
            "of an accepted branch would have to move to other places of a page: "
            "set --speculative-ngram-max-bfs-breadth 1",
        ),
        (f"--max-total-tokens {TOO_FEW}", f"tokens, not {TOO_FEW:,}, because a running request keeps its newest"),
    ],
    ids=["argument", "scheduler"],
)
@needs_no_gpu
def test_a_command_ends_with_the_sentence_and_exit_code_1(model, flags, sentence):
    command = [sys.executable, *COMMAND.split(), model, *flags.split()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    lines = result.stderr.splitlines()
    assert result.returncode == 1 and sentence in lines[-1], result.stderr[-3000:]
    assert not any(line.startswith("Traceback") for line in lines)


LIBRARY = """
import sys
import sglang

if __name__ == "__main__":
    try:
        sglang.Engine(model_path=sys.argv[1], kv_cache_dtype="kvarn", dtype="float32", skip_tokenizer_init=True,
                      max_total_tokens=int(sys.argv[2]))
    except ValueError as error:
        print(error)
"""


@needs_no_gpu
def test_a_program_gets_the_sentence_of_a_scheduler_as_a_value_error_and_can_end(model, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(LIBRARY)
    command = [sys.executable, str(program), model, str(TOO_FEW)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0 and f"tokens, not {TOO_FEW:,}, because" in result.stdout.splitlines()[-1]
