# SPDX-License-Identifier: Apache-2.0
"""Page tables and lengths that the kernels get, against a plain computation from SGLang's slots."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn.metadata import DecodeBuffers, extend_batch
from sglang_kvarn.rings import Rings

ROWS, CONTEXT = 6, 1028


@pytest.fixture
def slots():
    """req_to_token of 6 rows: position p of row r lies in page 10 r + p // 128 at p % 128."""
    positions = torch.arange(CONTEXT)
    rows = torch.arange(ROWS)[:, None]
    return ((10 * rows + positions // 128) * 128 + positions % 128).int()


def decode_step(rows: list[int], seq_lens: list[int], slots: torch.Tensor) -> SimpleNamespace:
    """Return a ForwardBatch of a decode step."""
    last = [int(slots[r, n - 1]) for r, n in zip(rows, seq_lens, strict=True)]
    return SimpleNamespace(
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(seq_lens),
        out_cache_loc=torch.tensor(last),
    )


def rings(*starts: int) -> Rings:
    """Return rings of two pages for 6 rows, 100 + r and 200 + r for row r, and their exact starts."""
    made = Rings(ROWS, 2, "cpu", hit_reads_as_miss=False)
    made.pages.copy_(torch.arange(ROWS)[:, None] + torch.tensor([100, 200]))
    made.pages[0] = 0
    made.exact_starts[: len(starts)] = torch.tensor(starts, dtype=torch.int32)
    return made


def test_fill_describes_a_decode_step(slots):
    rows, seq_lens = [4, 1, 2], [385, 1, 256]
    batch = DecodeBuffers(ROWS, slots, rings(0, 128, 256, 0, 384, 0)).fill(decode_step(rows, seq_lens, slots))
    assert batch.ring_pages.tolist() == [[100 + r, 200 + r] for r in rows] and batch.seq_lens.tolist() == seq_lens
    assert batch.store_pages.tolist() == [43, 10, 21]
    assert batch.exact_starts.tolist() == [384, 128, 256]
    for table, row, length in zip(batch.page_table, rows, seq_lens, strict=True):
        pages = -(-length // 128)
        assert table[:pages].tolist() == [10 * row + p for p in range(pages)]
    tensors = (batch.ring_pages, batch.seq_lens, batch.page_table, batch.store_pages, batch.exact_starts)
    assert [t.dtype for t in tensors] == [torch.int32] * 5 and batch.ring_pages.is_contiguous()


def test_fill_writes_the_same_memory_every_step(slots):
    buffers = DecodeBuffers(ROWS, slots, rings())
    first = buffers.fill(decode_step([1, 2], [130, 5], slots))
    second = buffers.fill(decode_step([5, 3], [7, 900], slots))
    for name in ("ring_pages", "seq_lens", "store_pages", "page_table", "exact_starts"):
        assert getattr(first, name).data_ptr() == getattr(second, name).data_ptr()
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert first.ring_pages.tolist() == [[105, 205], [103, 203]]


def test_a_row_that_is_given_away_after_fill_does_not_change_the_step(slots):
    table = rings()
    batch = DecodeBuffers(ROWS, slots, table).fill(decode_step([1, 2], [130, 5], slots))
    table.pages[1], table.exact_starts[1] = 7, 128
    assert batch.ring_pages[0].tolist() == [101, 201] and batch.exact_starts[0] == 0


@pytest.mark.parametrize("padded_slots", [True, False])
def test_fill_takes_padded_graph_rows(slots, padded_slots):
    # a replay of SGLang 0.5.16 pads rows and lengths but hands out_cache_loc on as it is
    buffers = DecodeBuffers(ROWS, slots, rings())
    slots[0] = 0
    buffers.fill(decode_step([1, 2, 3, 4], [128, 128, 128, 128], slots))
    step = decode_step([3, 0, 0, 0], [200, 1, 1, 1], slots)
    if not padded_slots:
        step.out_cache_loc = step.out_cache_loc[:1]
    batch = buffers.fill(step)
    assert batch.ring_pages.tolist() == [[103, 203], [0, 0], [0, 0], [0, 0]]
    assert batch.store_pages.tolist() == [31, 0, 0, 0]
    assert batch.page_table[1:].eq(0).all() and batch.num_tokens == 4


def verify_step(rows: list[int], seq_lens: list[int], drafts: int, slots: torch.Tensor) -> SimpleNamespace:
    """Return a ForwardBatch of a verify step; its lengths count no draft."""
    windows = [slots[r, n : n + drafts] for r, n in zip(rows, seq_lens, strict=True)]
    return SimpleNamespace(
        batch_size=len(rows),
        req_pool_indices=torch.tensor(rows),
        seq_lens=torch.tensor(seq_lens),
        out_cache_loc=torch.cat(windows).long(),
    )


@pytest.mark.parametrize("drafts", [1, 4])
def test_fill_describes_a_verify_step_as_a_row_for_each_draft(slots, drafts):
    # the window of the first request goes over the end of a page
    rows, seq_lens = [4, 2], [382, 20]
    buffers = DecodeBuffers(ROWS * drafts, slots, rings(0, 0, 0, 0, 256, 0))
    buffers.fill(decode_step([1, 2, 3], [130, 5, 9], slots))
    batch = buffers.fill(verify_step(rows, seq_lens, drafts, slots), drafts)
    ends = [(row, n + i + 1) for row, n in zip(rows, seq_lens, strict=True) for i in range(drafts)]
    assert (batch.num_tokens, batch.drafts) == (2 * drafts, drafts)
    assert batch.seq_lens.tolist() == [end for _, end in ends]
    assert batch.store_pages.tolist() == [10 * row + (end - 1) // 128 for row, end in ends]
    assert batch.exact_starts.tolist() == [256] * drafts + [0] * drafts
    assert batch.ring_pages.tolist() == [[104, 204]] * drafts + [[102, 202]] * drafts
    for n, row in enumerate(r for r in rows for _ in range(drafts)):
        assert batch.page_table[n, :3].tolist() == [10 * row + p for p in range(3)]


@pytest.mark.parametrize("padded_slots", [True, False])
def test_padded_requests_of_a_verify_step_stay_on_page_0(slots, padded_slots):
    buffers = DecodeBuffers(12, slots, rings())
    slots[0] = 0
    buffers.fill(verify_step([1, 2, 3], [127, 127, 127], 4, slots), 4)
    step = verify_step([3, 0, 0], [126, 1, 1], 4, slots)
    if not padded_slots:
        step.out_cache_loc = step.out_cache_loc[:4]
    batch = buffers.fill(step, 4)
    assert batch.seq_lens.tolist() == [127, 128, 129, 130] + [2, 3, 4, 5] * 2
    assert batch.store_pages.tolist() == [30, 30, 31, 31] + [0] * 8
    assert batch.ring_pages[4:].eq(0).all() and batch.page_table[4:].eq(0).all()


def test_a_prompt_of_padding_stays_on_page_0(slots):
    # a prefill graph of DP attention lets a rank without requests run one, from SGLang 0.5.23 on
    slots[0] = 0
    step = SimpleNamespace(
        batch_size=1,
        req_pool_indices=torch.tensor([0]),
        extend_prefix_lens=torch.tensor([0]),
        extend_seq_lens=torch.tensor([512], dtype=torch.int32),
        extend_prefix_lens_cpu=[0],
        extend_seq_lens_cpu=[512],
    )
    batch = extend_batch(step, slots, rings())
    assert batch.ring_pages.eq(0).all() and batch.page_table.tolist() == [[0] * 4] and batch.num_tokens == 512


def test_extend_batch_describes_mixed_lengths(slots):
    prefix, new, rows = [0, 300, 128], [200, 1, 257], [1, 5, 2]
    step = SimpleNamespace(
        batch_size=3,
        req_pool_indices=torch.tensor(rows),
        extend_prefix_lens=torch.tensor(prefix, dtype=torch.int32),
        extend_seq_lens=torch.tensor(new, dtype=torch.int32),
        extend_prefix_lens_cpu=prefix,
        extend_seq_lens_cpu=new,
    )
    batch = extend_batch(step, slots, rings(0, 0, 128, 0, 0, 0))
    assert batch.ring_pages.tolist() == [[101, 201], [105, 205], [102, 202]]
    assert batch.seq_lens.tolist() == batch.seq_lens_host == [200, 301, 385]
    assert batch.prefix_lens.tolist() == batch.prefix_lens_host == prefix
    assert batch.qo_indptr.tolist() == [0, 200, 201, 458]
    assert batch.exact_starts.tolist() == [0, 0, 128]
    assert batch.page_table.tolist() == [[10, 11, 12, 13], [50, 51, 52, 53], [20, 21, 22, 23]]
    assert {t.dtype for t in (batch.seq_lens, batch.qo_indptr, batch.page_table)} == {torch.int32}
