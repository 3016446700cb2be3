# SPDX-License-Identifier: Apache-2.0
"""Apply plausible bugs to a copy of the packages, one at a time, and show that the tests catch each.

    python tests/mutations.py [name ...]     # all of them take some minutes on 2 cores

Exit status 1 if a bug survives; 2 if one no longer applies to the code, or a test fails without any.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIMIT_SECONDS = 600
KERNELS, PLUGIN = "kernels/kvarn_kernels", "python/sglang_kvarn"

FUZZ = "tests/isolation/test_fuzz.py::test_every_read_is_of_the_requests_own_history"
KNOWN = "tests/isolation/test_known_failures.py"
KNOWN_KERNELS = "tests/isolation/test_known_kernel_failures.py"
DECODE, EXTEND = "tests/kernels/test_decode.py", "tests/kernels/test_extend.py"
ENCODE, TORCH = "tests/kernels/test_encode.py", "tests/kernels/test_torch_form.py"

_ROTATE = (
    "    rotate_step(q, k, v, batch.workspace.rotated_q,"
    " cache.ring_k, cache.ring_v, batch.rows, batch.seq_lens)\n"
)
_ENCODE = "    encode_from_ring(cache, batch.rows, batch.seq_lens, batch.store_pages, config)\n"


@dataclass(frozen=True)
class Mutation:
    """Describe one bug.

    Attributes:
        name: what goes wrong; file: where; old, new: the text and its replacement, old occurs once.
        tests: the tests that are to fail.
    """

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


MUTATIONS = (
    Mutation(
        "ring slot of the next position (torch form)",
        f"{KERNELS}/torch_form.py",
        "slots = (batch.seq_lens.long() - 1) % config.ring_len",
        "slots = batch.seq_lens.long() % config.ring_len",
        (FUZZ,),
    ),
    Mutation(
        "ring slot of the next position (kernel)",
        f"{KERNELS}/rotate.py",
        "mask=valid, other=1).to(tl.int64) - 1",
        "mask=valid, other=1).to(tl.int64)",
        (DECODE,),
    ),
    Mutation(
        "ring of the batch index, not of the row",
        f"{KERNELS}/decode.py",
        "row = tl.load(rows_ptr + b)",
        "row = b",
        (DECODE,),
    ),
    Mutation(
        "ring one page too short",
        f"{KERNELS}/config.py",
        "return (self.window_pages + 1) * self.tile_size",
        "return max(1, self.window_pages) * self.tile_size",
        (FUZZ,),
    ),
    Mutation(
        "exact start of a reused row not reset",
        f"{PLUGIN}/tail.py",
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = [req for req in reqs if compat.request_row(req) is None and compat.prefix_len(req)]",
        (FUZZ,),
    ),
    Mutation(
        "exact start moved by every chunk",
        f"{PLUGIN}/tail.py",
        "fresh = [req for req in reqs if compat.request_row(req) is None]",
        "fresh = list(reqs)",
        (FUZZ,),
    ),
    Mutation(
        "prefix hit read from the ring of the row's last owner",
        f"{PLUGIN}/tail.py",
        "[compat.prefix_len(req) for req in fresh]",
        "[0 for req in fresh]",
        (FUZZ,),
    ),
    Mutation(
        "page encoded one token early (torch form)",
        f"{KERNELS}/torch_form.py",
        "if seq_len % config.tile_size == 0:",
        "if (seq_len + 1) % config.tile_size == 0:",
        (FUZZ,),
    ),
    Mutation(
        "page encoded one token late (kernel)",
        f"{KERNELS}/encode.py",
        "            if seq_len % G == 0:",
        "            if seq_len % G == 1:",
        (ENCODE, DECODE),
    ),
    Mutation(
        "page encoded before its last token is stored",
        f"{KERNELS}/store.py",
        _ROTATE + _ENCODE,
        _ENCODE + _ROTATE,
        (DECODE,),
    ),
    Mutation(
        "page table read when the step runs, not when it is prepared",
        f"{PLUGIN}/metadata.py",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n        return batch",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n"
        "        slots = self._first_slots\n"
        "        table = property(lambda b: (slots[b.rows] >> PAGE_SHIFT).int())\n"
        "        late = object.__new__(type('Late', (DecodeBatch,), {'page_table': table}))\n"
        "        late.__dict__.update(batch.__dict__)\n"
        "        return late",
        (FUZZ,),
    ),
    Mutation(
        "exact starts read when the step runs",
        f"{PLUGIN}/metadata.py",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n        return batch",
        "        batch.page_table.bitwise_right_shift_(PAGE_SHIFT)\n"
        "        late = property(lambda b: exact_starts[b.rows])\n"
        "        late = object.__new__(type('Late', (DecodeBatch,), {'exact_starts': late}))\n"
        "        late.__dict__.update(batch.__dict__)\n"
        "        return late",
        (FUZZ,),
    ),
    Mutation(
        "page to encode into kept from an earlier step",
        f"{PLUGIN}/metadata.py",
        "batch.store_pages[: len(slots)].copy_(slots).bitwise_right_shift_(PAGE_SHIFT)",
        "kept = batch.store_pages[: len(slots)]\n"
        "        kept.copy_(torch.where(kept > 0, kept, slots.int() >> PAGE_SHIFT))",
        (FUZZ,),
    ),
    Mutation(
        "padded rows keep the pages of an earlier step",
        f"{PLUGIN}/metadata.py",
        "batch.store_pages[len(slots) :].zero_()",
        "pass",
        (KNOWN,),
    ),
    Mutation(
        "padded rows keep the requests of an earlier step",
        f"{PLUGIN}/metadata.py",
        "batch.rows.copy_(forward_batch.req_pool_indices[:size])",
        "real = forward_batch.req_pool_indices[:size]\n"
        "        batch.rows.copy_(torch.where(real > 0, real, batch.rows))",
        (KNOWN,),
    ),
    Mutation(
        "window one page too short",
        f"{KERNELS}/torch_form.py",
        "max(page - config.window_pages, exact_start // config.tile_size)",
        "max(page - config.window_pages + 1, exact_start // config.tile_size)",
        (FUZZ,),
    ),
    Mutation(
        "window one page too long (decode kernel)",
        f"{KERNELS}/decode.py",
        "tl.maximum(page - WINDOW, tl.load(exact_starts_ptr + b) // G)",
        "tl.maximum(page - WINDOW - 1, tl.load(exact_starts_ptr + b) // G)",
        (DECODE,),
    ),
    Mutation(
        "exact start ignored (extend kernel)",
        f"{KERNELS}/extend.py",
        "tl.maximum(page - WINDOW, tl.load(exact_starts_ptr + b) // G)",
        "tl.maximum(page - WINDOW, 0)",
        (EXTEND,),
    ),
    Mutation(
        "first token of a tile attended twice (decode kernel)",
        f"{KERNELS}/attend.py",
        "(t > 0)[None, :]",
        "(t >= 0)[None, :]",
        (DECODE,),
    ),
    Mutation(
        "first token of a tile attended twice (extend kernel)",
        f"{KERNELS}/extend.py",
        "(first + y > 0)[None, :]",
        "(first + y >= 0)[None, :]",
        (EXTEND,),
    ),
    Mutation(
        "record without its header",
        f"{KERNELS}/tile.py",
        "return HEADER | (HEADER_BF16 if is_bf16 else 0)",
        "return 0",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "record of KV head 0 for every head (decode kernel)",
        f"{KERNELS}/decode.py",
        "record = records_ptr + (page_id * HK + head) * RECORD",
        "record = records_ptr + page_id * HK * RECORD",
        (DECODE,),
    ),
    Mutation(
        "first rows of KV head 0 for every head (extend kernel)",
        f"{KERNELS}/extend.py",
        "k_ptrs = firsts_ptr + (page_ids * HK + head) * (RECORD // 2) + FIRST",
        "k_ptrs = firsts_ptr + page_ids * HK * (RECORD // 2) + FIRST",
        (EXTEND,),
    ),
    Mutation(
        "ring written before the chunk is attended",
        f"{KERNELS}/ops.py",
        "    rotated_q, rotated_k, rotated_v = rotate_extend(q, k, v)\n",
        "    rotated_q, rotated_k, rotated_v = rotate_extend(q, k, v)\n"
        "    store_extend(rotated_k, rotated_v, cache, batch)\n",
        (EXTEND,),
    ),
    Mutation(
        "first token of a chunk taken from the ring (extend kernel)",
        f"{KERNELS}/extend.py",
        "in_ring = j < prefix_len",
        "in_ring = j <= prefix_len",
        (EXTEND,),
    ),
    Mutation(
        "page on the prompt's end not encoded (torch form)",
        f"{KERNELS}/torch_form.py",
        "first, last = prefix_len // size, seq_len // size",
        "first, last = prefix_len // size, (seq_len - 1) // size",
        (FUZZ,),
    ),
    Mutation(
        "query page of the chunk's end for all its queries (torch form)",
        f"{KERNELS}/torch_form.py",
        "n = record_pages(start, exact_start, config) * size",
        "n = record_pages(prefix_len, exact_start, config) * size",
        (FUZZ,),
    ),
    Mutation(
        "splits beyond the last one weighed",
        f"{KERNELS}/merge.py",
        'mask=narrow(valid, split < S), other=float("-inf"))',
        "mask=narrow(valid, split < S), other=0.0)",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "splits of the largest batch merged",
        f"{KERNELS}/merge.py",
        "batch.workspace.num_splits[batch_size - 1]",
        "batch.workspace.num_splits[-1]",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "split buffer sized for the largest batch only",
        f"{KERNELS}/decode.py",
        "max(b * num_splits(b, num_kv_heads, max_pages, config) for b in range(1, max_batch + 1))",
        "max_batch * num_splits(max_batch, num_kv_heads, max_pages, config)",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "canonical splits planned by the batch",
        f"{KERNELS}/decode.py",
        "    if config.is_canonical:\n        return triton",
        "    if batch_size == 0:\n        return triton",
        (DECODE,),
    ),
)


def apply(mutation: Mutation, folder: Path) -> None:
    """Write the mutated file into the copy.

    Raises:
        ValueError: the old text is not there exactly once.
    """
    path = folder / mutation.file
    text = (ROOT / mutation.file).read_text()
    if text.count(mutation.old) != 1:
        raise ValueError(
            f"expected {mutation.old!r} once in {mutation.file}, found it {text.count(mutation.old)} times: "
            f"rewrite the mutation {mutation.name!r}"
        )
    path.write_text(text.replace(mutation.old, mutation.new))


def run_tests(folder: Path, tests: tuple[str, ...]) -> tuple[int | None, str]:
    """Run tests on the copy; return pytest's exit status (None: out of time) and the first failing test."""
    environment = os.environ | {
        "PYTHONPATH": f"{folder / 'kernels'}:{folder / 'python'}",
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        "KVARN_FUZZ_SEED": "1",
        "KVARN_FUZZ_STEPS": "3000",
        "KVARN_FUZZ_SHRINK": "0",
    }
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-W", "ignore", "-p", "no:cacheprovider", *tests]
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return None, f"no result in {LIMIT_SECONDS} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].split(" ")[1].split("::")[-1] if failed else done.stdout[-200:].strip()


def main(names: list[str]) -> int:
    """Run the chosen mutations (all by default) and print one line for each."""
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survived, stale = [], []
    with tempfile.TemporaryDirectory(prefix="kvarn-mutations-") as temporary:
        folder = Path(temporary)
        for name in ("kernels", "python", "tests", "pyproject.toml"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", ".hypothesis")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(
                source, folder / name
            )
        status, detail = run_tests(folder, tuple(sorted({t for m in chosen for t in m.tests})))
        if status != 0:
            print(f"expected the tests to pass without a bug, got {detail}: mend them first")
            return 2
        for mutation in chosen:
            started = time.monotonic()
            try:
                apply(mutation, folder)
            except ValueError as error:
                stale.append(mutation)
                print(f"STALE     {mutation.name}: {error}", flush=True)
                continue
            status, detail = run_tests(folder, mutation.tests)
            shutil.copy(ROOT / mutation.file, folder / mutation.file)
            # 1 is "tests failed"; anything else would be no evidence
            caught = status == 1
            survived += [] if caught else [mutation]
            seconds = time.monotonic() - started
            print(
                f"{'caught' if caught else 'SURVIVED':9} {mutation.name} | {detail} | {seconds:.0f} s",
                flush=True,
            )
    caught_count = len(chosen) - len(survived) - len(stale)
    print(f"{caught_count} of {len(chosen)} caught, {len(survived)} survived, {len(stale)} stale")
    return 2 if stale else int(bool(survived))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
