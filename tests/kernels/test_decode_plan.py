# SPDX-License-Identifier: Apache-2.0
"""The plan of a decode step: splits of one share, in the order of requests, never more than the workspace holds."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from builders import DEVICE, PAGE, int32
from hypothesis import given, settings
from hypothesis import strategies as st
from kvarn_kernels.batch import DecodeBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import decode, decode_plan, decode_sm90
from kvarn_kernels.shape import AttentionShape

PRESETS = ["kvarn", "kvarn_canonical"]
MAX_PAGES = 400
LENGTH = st.one_of(st.integers(1, 3 * PAGE), st.integers(1, MAX_PAGES * PAGE))


def make_workspace(max_batch, heads, head_dim, max_pages, config, device) -> decode_plan.DecodeWorkspace:
    """Return the workspace of an H100."""
    shape = AttentionShape(*heads, head_dim, torch.bfloat16)
    resident = decode_sm90.resident_programs(head_dim, 8, H100)
    return decode_plan.make_workspace(shape, config, device, max_batch, max_pages, resident)


def plan(
    lengths: list[int],
    config: KVarNConfig,
    heads=(32, 8),
    head_dim=128,
    starts: list[int] | None = None,
    window: int = 0,
):
    """Return (splits of each request, workspace) of a step; the workspace serves twice the batch."""
    workspace = make_workspace(2 * len(lengths), heads, head_dim, MAX_PAGES, config, DEVICE)
    if window:
        workspace = workspace.with_plan(window)
    workspace.split_requests.fill_(-1)
    workspace.split_indptr.fill_(-1)
    size = len(lengths)
    batch = DecodeBatch(
        ring_pages=torch.zeros(size, 1, dtype=torch.int32, device=DEVICE),
        seq_lens=int32(*lengths),
        page_table=torch.zeros(size, MAX_PAGES, dtype=torch.int32, device=DEVICE),
        store_pages=int32(*[0] * size),
        exact_starts=int32(*(starts or [0] * size)),
    )
    decode_plan.plan_decode(batch, workspace, config)
    indptr = workspace.split_indptr.tolist()
    assert indptr[0] == 0 and set(indptr[size + 1 :]) <= {-1}
    return [end - begin for begin, end in pairwise(indptr[: size + 1])], workspace


def units(length: int, config: KVarNConfig, start: int = 0, window: int = MAX_PAGES * PAGE) -> int:
    """Return the work of a request, counted token by token."""
    position = length - 1
    exact = min(max(position // PAGE - config.window_pages, start // PAGE), position // PAGE)
    oldest = min(token // PAGE for token in range(length) if token > position - window)
    exact, records = max(exact, oldest), max(exact - oldest, 0)
    chunks = {(token - exact * PAGE) // decode_plan.RING_CHUNK.value for token in range(exact * PAGE, length)}
    return records + decode_plan.RING_UNITS.value * len(chunks)


@pytest.mark.parametrize("preset", PRESETS)
@given(lengths=st.lists(LENGTH, min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_splits_follow_each_other_and_fit_the_workspace(preset, lengths):
    config = KVarNConfig.from_preset(preset)
    counts, workspace = plan(lengths, config)
    assert min(counts) >= 1
    owners = [b for b, count in enumerate(counts) for _ in range(count)]
    assert workspace.split_requests.tolist()[: len(owners)] == owners
    assert len(owners) <= workspace.max_splits[len(lengths) - 1] <= len(workspace.split_requests)


@given(lengths=st.lists(LENGTH, min_size=1, max_size=9))
@settings(max_examples=40, deadline=None)
def test_no_smaller_share_fits(lengths):
    config = KVarNConfig.from_preset("kvarn")
    counts, workspace = plan(lengths, config)
    size, work = len(lengths), [units(n, config) for n in lengths]

    def splits(mean: float) -> list[int]:
        wanted = decode_plan.wanted_splits(size, workspace.programs, workspace.resident, mean)
        wanted = min(wanted, workspace.max_splits[size - 1])
        share = next(s for s in range(decode_plan.MIN_SPLIT_UNITS, 10**6) if sum(-(-u // s) for u in work) <= wanted)
        return [-(-u // share) for u in work]

    # where two numbers of waves are estimated alike, the float32 of the device may prefer the other
    assert counts in [splits(sum(work) / size * (1 + error)) for error in (0, -1e-5, 1e-5)]


def test_short_requests_that_fill_the_gpu_are_not_cut():
    """2,048 programs of 256 requests are 5.2 waves; twice as many would pay what a split costs besides once more."""
    config = KVarNConfig.from_preset("kvarn")
    counts, workspace = plan([236] * 256, config)
    assert counts == [1] * 256
    assert decode_plan.wanted_splits(256, workspace.programs, workspace.resident) > 2 * 256
    counts, _ = plan([236] * 255 + [200 * PAGE], config)
    assert counts[:255] == [1] * 255 and counts[255] > 20


def test_long_requests_get_no_more_splits_than_the_workspace_holds():
    counts, workspace = plan([MAX_PAGES * PAGE] * 9, KVarNConfig.from_preset("kvarn"))
    programs, resident = workspace.programs, workspace.resident
    assert 90 < sum(counts) <= workspace.max_splits[8] < decode_plan.wanted_splits(9, programs, resident, MAX_PAGES)


def test_splits_of_canonical_presets_depend_on_the_request_only():
    config = KVarNConfig.from_preset("kvarn_canonical")
    alone = [plan([n], config)[0][0] for n in (1, 900, 17 * PAGE, 300 * PAGE)]
    together, _ = plan([5, 1, 900, 17 * PAGE, 40_000, 300 * PAGE], config)
    assert [together[n] for n in (1, 2, 3, 5)] == alone
    assert alone == [-(-units(n, config) // decode_plan.FIXED_SPLIT_UNITS) for n in (1, 900, 17 * PAGE, 300 * PAGE)]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("window", [1, 100, PAGE + 1, 1000, 20 * PAGE])
def test_pages_that_have_left_the_window_are_no_work(preset, window):
    config = KVarNConfig.from_preset(preset)
    share = decode_plan.FIXED_SPLIT_UNITS if config.fixed_order else decode_plan.MIN_SPLIT_UNITS
    for length in (1, window, window + 1, 3 * PAGE, 40 * PAGE + 70, 64 * PAGE):
        (count,), workspace = plan([length], config, window=window)
        assert count == -(-units(length, config, window=window) // share), length
        assert count <= workspace.max_splits[0]


def test_tokens_of_the_prefix_are_no_ring():
    config, length = KVarNConfig.from_preset("kvarn"), 40 * PAGE + 70
    # 40 pages and 2 chunks of 64 tokens where the last page came from the prefix cache, else 39 pages and 4 chunks
    for start in (0, 39 * PAGE, 40 * PAGE):
        (count,), _ = plan([length], config, starts=[start])
        assert count == -(-units(length, config, start) // decode_plan.MIN_SPLIT_UNITS)
    assert units(length, config, 40 * PAGE) == 40 + 2 * 2 != units(length, config, 0) == 39 + 4 * 2


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("heads", [(32, 8), (9, 3), (8, 1), (64, 4)])
def test_waves_are_full_or_as_many_as_requests(heads, head_dim):
    config = KVarNConfig.from_preset("kvarn")
    workspace = make_workspace(300, heads, head_dim, MAX_PAGES, config, torch.device("meta"))
    programs = heads[1] * -(-heads[0] // heads[1] // 8)
    resident = decode_sm90.resident_programs(head_dim, 8, H100)
    for size, wanted in enumerate(workspace.max_splits, 1):
        last = wanted * programs % resident
        assert wanted == size or last == 0 or last > resident - programs, size
    assert len(workspace.partial_lse) == max(workspace.max_splits)


@pytest.mark.parametrize("max_pages", [1, 3, 64, 1024])
@pytest.mark.parametrize("preset", PRESETS)
def test_the_split_buffer_holds_every_batch_size(preset, max_pages):
    """A small batch may have more splits than a large one; other ports sized the buffer for the large one."""
    config = KVarNConfig.from_preset(preset)
    workspace = make_workspace(65, (8, 2), 64, max_pages, config, torch.device("meta"))
    assert all(size <= most <= len(workspace.partial_out) for size, most in enumerate(workspace.max_splits, 1))
    assert len(workspace.split_requests) == len(workspace.partial_lse) == len(workspace.partial_out)
    assert len(workspace.split_indptr) == 66


def test_gpus_without_the_cuda_kernel_run_more_programs_at_once():
    sizes = {"shared_memory": 163 << 10, "shared_of_multiprocessor": 164 << 10}
    a100 = replace(H100, capability=(8, 0), multiprocessors=108, **sizes)
    hopper = decode_plan.wanted_splits(1, 8, decode_sm90.resident_programs(128, 8, H100))
    assert decode_plan.wanted_splits(1, 8, decode.resident_programs(a100)) == 108 * 8 // 8 > hopper
