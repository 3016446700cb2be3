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
# of the tests of one bug; without any bug all of them run
LIMIT_SECONDS, LIMIT_SECONDS_OF_ALL = 600, 3600
KERNELS, PLUGIN = "kernels/kvarn_kernels", "python/sglang_kvarn"

FUZZ = "tests/isolation/test_fuzz.py::test_every_read_is_of_the_requests_own_history"
KNOWN = "tests/isolation/test_known_failures.py"
KNOWN_KERNELS = "tests/isolation/test_known_kernel_failures.py"
DECODE, EXTEND = "tests/kernels/test_decode.py", "tests/kernels/test_extend.py"
DECODE_ON_CPU = "tests/kernels/test_decode_on_cpu.py"
DECODE_PLAN = "tests/kernels/test_decode_plan.py"
PREFILL, PREFILL_PLAN = "tests/kernels/test_prefill.py", "tests/kernels/test_prefill_plan.py"
LAUNCH, WARM_UP = "tests/kernels/test_launch.py", "tests/kernels/test_warm_up.py"
DEQUANTISE = "tests/kernels/test_dequantise.py"
ENCODE, REFERENCE = "tests/kernels/test_encode.py", "tests/kernels/test_reference.py"
TORCH = "tests/kernels/test_torch_form.py"
POSITION = "tests/kernels/test_position_rule.py"
TAIL = "tests/plugin/test_tail.py"
BALANCE, BALANCE_LAYERS = "tests/plugin/test_balance.py", "tests/plugin/test_balanced_layers.py"
BALANCE_ENGINE = "tests/engine/test_hard_model.py"
INTERPRETED_ENGINE = "tests/engine/test_interpreted_kernels.py"
WINDOW_ENGINE = "tests/engine/test_scheduling.py::test_a_window_preset_reads_the_cached_prefix_from_records"

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
        "a RoPE pair with two factors",
        f"{PLUGIN}/balance.py",
        "if self.partners is not None:",
        "if False:",
        (f"{BALANCE}::test_no_weight_grows_beyond_its_dtype",),
    ),
    Mutation(
        "a factor that takes a weight beyond its dtype",
        f"{PLUGIN}/balance.py",
        "torch.minimum(torch.maximum(ideal, -shrink), grow)",
        "ideal",
        (f"{BALANCE}::test_no_weight_grows_beyond_its_dtype",),
    ),
    Mutation(
        "a value bias that is added nowhere",
        f"{PLUGIN}/backend.py",
        "add_(bias[:, None])",
        "add_(0 * bias[:, None])",
        (BALANCE_ENGINE,),
    ),
    Mutation(
        "an update into balanced weights",
        f"{PLUGIN}/balanced_layers.py",
        "        chosen.take_out(weights)\n",
        "        pass\n",
        (BALANCE_LAYERS,),
    ),
    Mutation(
        "a retracted request that finds its own pages",
        f"{PLUGIN}/tail.py",
        "return None if first is None else min(result, first)",
        "return None",
        (TAIL,),
    ),
    Mutation(
        "a second admission that moves the limit",
        f"{PLUGIN}/tail.py",
        "if not hasattr(req, _FIRST_PREFIX):",
        "if True:",
        (TAIL,),
    ),
    Mutation(
        "a limit for presets whose hits read as misses",
        f"{PLUGIN}/tail.py",
        "if self._hit_reads_as_miss:",
        "if False:",
        (TAIL,),
    ),
    Mutation(
        "the first half of 256 channels rotated twice",
        f"{KERNELS}/rotate.py",
        "rotated = rotate_block(x, signs_ptr, begin, D, COLS)",
        "rotated = rotate_block(x, signs_ptr, 0, D, COLS)",
        ("tests/kernels/test_rotate.py",),
    ),
    Mutation(
        "the first half of 256 channels merged twice",
        f"{KERNELS}/merge.py",
        "unrotate(x, signs_ptr, column, D, COLS)",
        "unrotate(x, signs_ptr, 0, D, COLS)",
        (DECODE,),
    ),
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
        "[compat.prefix_len(req) for req in reqs]",
        "[0 for req in reqs]",
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
        f"{KERNELS}/decode_plan.py",
        "tl.maximum(page - WINDOW, exact_start // G)",
        "tl.maximum(page - WINDOW - 1, exact_start // G)",
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
        "    if batch.prefill is not None:\n",
        "    store_extend(rotated_k, rotated_v, cache, batch)\n    if batch.prefill is not None:\n",
        (EXTEND, PREFILL),
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
        'lse = tl.load(partial_lse_ptr + at, mask=exists, other=float("-inf"))',
        "lse = tl.load(partial_lse_ptr + at, mask=exists, other=0.0)",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "last split of a request not merged",
        f"{KERNELS}/merge.py",
        "mask=valid, other=0) - begin",
        "mask=valid, other=0) - begin - 1",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "split buffer sized for the largest batch only",
        f"{KERNELS}/decode.py",
        "splits = max(most)",
        "splits = most[-1]",
        (KNOWN_KERNELS,),
    ),
    Mutation(
        "canonical splits planned by the batch",
        f"{KERNELS}/decode_plan.py",
        "return CANONICAL_SPLIT_UNITS if config.is_canonical else 0",
        "return 0",
        (DECODE,),
    ),
    Mutation(
        "last page of a request read to its end",
        f"{KERNELS}/prefill_plan.py",
        "last_page_len=end - number * page,",
        "last_page_len=np.full_like(end, page),",
        (PREFILL_PLAN,),
    ),
    Mutation(
        "no exact window (prefill plan)",
        f"{KERNELS}/prefill_plan.py",
        "records = np.maximum(number - config.window_pages, 0)",
        "records = number",
        (PREFILL_PLAN, PREFILL),
    ),
    Mutation(
        "queries without a past merge the key that stands in",
        f"{KERNELS}/prefill_merge.py",
        "exists = valid & (tl.load(seen_ptr + part // HQ, mask=valid, other=0) != 0)",
        "exists = valid",
        (PREFILL,),
    ),
    Mutation(
        "parts of a prefill step merged without their weights",
        f"{KERNELS}/prefill_merge.py",
        "a, b = tl.exp2(m - top), tl.exp2(lse - top)",
        "a, b = tl.exp2(m - top), tl.exp2(m - top)",
        (PREFILL,),
    ),
    Mutation(
        "part of a prefill step merged into the first tokens",
        f"{KERNELS}/prefill_merge.py",
        "at = r + begin * HQ",
        "at = r",
        (PREFILL,),
    ),
    Mutation(
        "splits of a prefill step leave the last records out",
        f"{KERNELS}/prefill_plan.py",
        "np.arange(splits + 1)[:, None] // splits",
        "np.arange(splits + 1)[:, None] // (splits + 1)",
        (PREFILL_PLAN,),
    ),
    Mutation(
        "a page between two splits of an extend step read by neither",
        f"{KERNELS}/extend.py",
        "exact_page * (split + 1) // splits",
        "exact_page * (split + 1) // splits - (split < splits - 1)",
        (EXTEND,),
    ),
    Mutation(
        "exact keys attended by every split of an extend step",
        f"{KERNELS}/extend.py",
        "exact_begin = tl.where(split == splits - 1, exact_begin, end)",
        "exact_begin = tl.where(split < splits, exact_begin, end)",
        (EXTEND,),
    ),
    Mutation(
        "extend steps of a canonical preset split",
        f"{KERNELS}/extend.py",
        "    if config.is_canonical:\n        return 1\n",
        "",
        (EXTEND,),
    ),
    Mutation(
        "a kernel of short turns built in the first request",
        f"{KERNELS}/warm_up.py",
        "steps += [(cached, 1, None), ",
        "steps += [",
        (WARM_UP,),
    ),
    Mutation(
        "new tokens of a request counted from the first row of the batch",
        f"{KERNELS}/dequantise.py",
        "token = tl.load(qo_indptr_ptr + b).to(tl.int64) + position - prefix_len",
        "token = position.to(tl.int64) - prefix_len",
        (PREFILL,),
    ),
    Mutation(
        "pages of a prefix hit read from the ring (workspace)",
        f"{KERNELS}/dequantise.py",
        "(slot < num_exact) & (page * G >= tl.load(exact_starts_ptr + b))",
        "slot < num_exact",
        (PREFILL,),
    ),
    Mutation(
        "values written out without their channel scale",
        f"{KERNELS}/dequantise.py",
        "signs * channel_scale[:, None]",
        "signs",
        (DEQUANTISE,),
    ),
    Mutation(
        "first row quantised (workspace)",
        f"{KERNELS}/dequantise.py",
        "if first == 0:",
        "if first == 1:",
        (DEQUANTISE,),
    ),
    Mutation(
        "record of KV head 0 for every head (workspace)",
        f"{KERNELS}/dequantise.py",
        "record = records_ptr + (page_id * HK + head) * RECORD",
        "record = records_ptr + page_id * HK * RECORD",
        (DEQUANTISE,),
    ),
    Mutation(
        "keys beyond the range of fp16 (workspace)",
        f"{KERNELS}/dequantise.py",
        "y = tl.minimum(tl.maximum(y, -65504.0), 65504.0)",
        "y = y * 1.0",
        (DEQUANTISE,),
    ),
    Mutation(
        "values addressed with the strides of the keys",
        f"{KERNELS}/dequantise.py",
        "source = v_ptr + token[:, None] * stride_v_token",
        "source = v_ptr + token[:, None] * stride_k_token",
        (PREFILL,),
    ),
    Mutation(
        "tokens after the end of a request read as its own (workspace)",
        f"{KERNELS}/dequantise.py",
        "((position >= prefix_len) & (position < tl.load(seq_lens_ptr + b)))[:, None]",
        "(position >= prefix_len)[:, None]",
        (DEQUANTISE,),
    ),
    Mutation(
        "queries of a page see its later tokens",
        f"{KERNELS}/prefill.py",
        "_plan_call(wrapper, segment.call, workspace, segment.causal)",
        "_plan_call(wrapper, segment.call, workspace, False)",
        (PREFILL,),
    ),
    Mutation(
        "unaligned tensor launched as an aligned one",
        f"{KERNELS}/launch.py",
        "x.data_ptr() & 15",
        "0",
        (LAUNCH,),
    ),
    Mutation(
        "segment planned on the wrapper of another",
        f"{KERNELS}/prefill.py",
        "wrapper = workspace.wrapper(n)",
        "wrapper = workspace.wrapper(0)",
        (PREFILL,),
    ),
    Mutation(
        "splits of equal size leave the last units out",
        f"{KERNELS}/decode.py",
        "per_split = tl.cdiv(units, tl.load(indptr_ptr + b + 1) - first)",
        "per_split = tl.maximum(units // (tl.load(indptr_ptr + b + 1) - first), 1)",
        (DECODE,),
    ),
    Mutation(
        "canonical splits one too few",
        f"{KERNELS}/decode_plan.py",
        "return batch_size * triton.cdiv(max_units(max_pages, config), CANONICAL_SPLIT_UNITS)",
        "return batch_size * (max_units(max_pages, config) // CANONICAL_SPLIT_UNITS)",
        (DECODE_PLAN,),
    ),
    Mutation(
        "ring chunk shared by two splits left out",
        f"{KERNELS}/decode_plan.py",
        "(tl.maximum(unit - exact_page, 0) + RING_UNITS - 1) // RING_UNITS * RING_CHUNK",
        "(tl.maximum(unit - exact_page, 0) + RING_UNITS - 1) // RING_UNITS * (RING_CHUNK - 1)",
        (DECODE,),
    ),
    Mutation(
        "top bits of the upper channels read as those of the lower ones",
        f"{KERNELS}/tile_io.py",
        "return words, tops >> (c // HALF)",
        "return words, tops",
        (f"{DECODE}::test_decode_matches_the_oracle_in_every_form",),
    ),
    Mutation(
        "top bits of the upper channels read as those of the lower ones (CUDA decode)",
        f"{KERNELS}/decode_sm90.cu",
        "tops[t][k] >>= is_upper;",
        "tops[t][k] >>= 0 * is_upper;",
        (f"{DECODE_ON_CPU}::test_every_form_matches_the_oracle",),
    ),
    Mutation(
        "top plane holds another bit (CUDA encode)",
        f"{KERNELS}/encode.cu",
        "word |= code >> 2 <<",
        "word |= code >> 1 <<",
        ("tests/kernels/test_encode_cuda.py::test_bytes_from_the_ring_are_those_of_the_oracle",),
    ),
    Mutation(
        "teams of warps share their record buffers (CUDA decode)",
        f"{KERNELS}/decode_sm90.cu",
        "const int buffer = team * STAGES + stage;",
        "const int buffer = stage;",
        (DECODE_ON_CPU,),
    ),
    Mutation(
        "next record ordered by the first warp that leaves a buffer (CUDA decode)",
        f"{KERNELS}/decode_sm90.cu",
        "% TILE_WARPS == TILE_WARPS - 1",
        "% TILE_WARPS == 0",
        (DECODE_ON_CPU,),
    ),
    Mutation(
        "plan of the step before (no plan)",
        f"{PLUGIN}/backend.py",
        "            ops.plan_decode(self._decode, self.config)\n",
        "",
        (INTERPRETED_ENGINE,),
    ),
    Mutation(
        "newest key not attended (decode kernel)",
        f"{KERNELS}/decode.py",
        "exact_page, G), position + 1)",
        "exact_page, G), position)",
        (DECODE,),
    ),
    Mutation(
        "own key not attended (extend kernel)",
        f"{KERNELS}/extend.py",
        "seen = j[None, :] <= position[:, None]",
        "seen = (j[None, :] < position[:, None]) | (j[None, :] == 0)",
        (EXTEND,),
    ),
    Mutation(
        "ring modulo off by one (decode store)",
        f"{KERNELS}/rotate.py",
        "position % RING_LEN",
        "position % (RING_LEN - 1)",
        (DECODE,),
    ),
    Mutation(
        "ring modulo off by one (extend store)",
        f"{KERNELS}/store.py",
        "tl.maximum(position, 0) % RING_LEN",
        "tl.maximum(position, 0) % (RING_LEN - 1)",
        (EXTEND,),
    ),
    Mutation(
        "ring modulo off by one (torch form)",
        f"{KERNELS}/torch_form.py",
        "end, device=ring.device) % ring.shape[1]]\n\n\ndef _attend",
        "end, device=ring.device) % (ring.shape[1] - 1)]\n\n\ndef _attend",
        (FUZZ,),
    ),
    Mutation(
        "ring written before the pages of the chunk are encoded (torch form)",
        f"{KERNELS}/torch_form.py",
        "    # positions first_exact .. seq_len - 1; the own page",
        "    for new, ring in zip(chunk, (cache.ring_k, cache.ring_v), strict=True):\n"
        "        _store_chunk(new, ring, row, prefix_len)\n"
        "    # positions first_exact .. seq_len - 1; the own page",
        (FUZZ,),
    ),
    Mutation(
        "ring written before the pages of the chunk are encoded (kernels)",
        f"{KERNELS}/ops.py",
        "    encode_from_chunk(rotated_k, rotated_v, cache, batch, config)\n",
        "    store_extend(rotated_k, rotated_v, cache, batch)\n"
        "    encode_from_chunk(rotated_k, rotated_v, cache, batch, config)\n",
        (EXTEND,),
    ),
    Mutation(
        "first row of a record that of the second token (kernel)",
        f"{KERNELS}/encode.py",
        "first = tl.arange(0, 1) + page * G",
        "first = tl.arange(0, 1) + page * G + 1",
        (ENCODE,),
    ),
    Mutation(
        "first row of a record quantised",
        f"{KERNELS}/reference/record.py",
        "    k[..., 0, :], v[..., 0, :] = _first_rows(record, config, head_dim)\n",
        "",
        (REFERENCE,),
    ),
    Mutation(
        "first token counted in the statistics (kernel)",
        f"{KERNELS}/encode.py",
        "    valid = (g > 0)[:, None] & (d >= 0)[None, :]\n    codes, scale, zero, cross = quantise_side(",
        "    valid = (g >= 0)[:, None] & (d >= 0)[None, :]\n    codes, scale, zero, cross = quantise_side(",
        (ENCODE,),
    ),
    Mutation(
        "full pages of later requests in a large batch not encoded",
        f"{KERNELS}/encode.py",
        "for request in range(begin, tl.minimum(begin + SLICES * BLOCK, batch_size), SLICES):",
        "for request in range(begin, tl.minimum(begin + SLICES, batch_size), SLICES):",
        (ENCODE,),
    ),
    Mutation(
        "page to encode into is that of the next token",
        f"{PLUGIN}/metadata.py",
        "batch.store_pages[: len(slots)].copy_(slots).",
        "batch.store_pages[: len(slots)].copy_(slots + 1).",
        (FUZZ,),
    ),
    Mutation(
        "padded rows keep the lengths of an earlier step",
        f"{PLUGIN}/metadata.py",
        "batch.seq_lens.copy_(forward_batch.seq_lens[:size])",
        "batch.seq_lens[: len(forward_batch.out_cache_loc)].copy_("
        "forward_batch.seq_lens[: len(forward_batch.out_cache_loc)])",
        (KNOWN,),
    ),
    Mutation(
        "exact starts by place in the batch, not by row",
        f"{PLUGIN}/metadata.py",
        "exact_starts=exact_starts.index_select(0, rows)",
        "exact_starts=exact_starts[1 : size + 1]",
        (FUZZ,),
    ),
    Mutation(
        "pages of the first request's length for the whole batch",
        f"{PLUGIN}/metadata.py",
        "req_to_token[:, : max(seq_host) : PAGE_SIZE]",
        "req_to_token[:, : seq_host[0] : PAGE_SIZE]",
        (FUZZ,),
    ),
    Mutation(
        "exact starts never noted",
        f"{PLUGIN}/pool.py",
        "    pool.tail.attach(req_to_token_pool)\n",
        "",
        (WINDOW_ENGINE,),
    ),
    Mutation(
        "last block of a chunk not filled up (torch form)",
        f"{KERNELS}/torch_form.py",
        "rest = -seq_len % QUERY_BLOCK",
        "rest = 0",
        (POSITION,),
    ),
    Mutation(
        "tile of queries begins with the chunk (extend kernel)",
        f"{KERNELS}/extend.py",
        "start = (prefix_len // BLOCK_Q + num_tiles - 1 - tl.program_id(0) // splits) * BLOCK_Q",
        "start = prefix_len + (num_tiles - 1 - tl.program_id(0) // splits) * BLOCK_Q",
        (POSITION,),
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


def run_tests(folder: Path, tests: tuple[str, ...], limit: int = LIMIT_SECONDS) -> tuple[int | None, str]:
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
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=limit
        )
    except subprocess.TimeoutExpired:
        return None, f"no result in {limit} s"
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return done.returncode, failed[0].split(" ")[1].split("::")[-1] if failed else done.stdout[-200:].strip()


def main(names: list[str]) -> int:
    """Run the chosen mutations (all by default) and print one line for each."""
    chosen = [m for m in MUTATIONS if not names or m.name in names]
    survived, stale = [], []
    with tempfile.TemporaryDirectory(prefix="kvarn-mutations-") as temporary:
        folder = Path(temporary)
        for name in ("kernels", "python", "tests", "benchmarks", "pyproject.toml"):
            source = ROOT / name
            ignored = shutil.ignore_patterns("__pycache__", ".hypothesis", "results")
            shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(
                source, folder / name
            )
        tests = tuple(sorted({t for m in chosen for t in m.tests}))
        status, detail = run_tests(folder, tests, LIMIT_SECONDS_OF_ALL)
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
