# SPDX-License-Identifier: Apache-2.0
"""The plan against the position rule, token by token."""

from itertools import pairwise

import pytest
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense.segments import (
    MAX_SPLITS,
    SPLIT_PAGES,
    PagedCall,
    fewest_pages,
    num_splits,
    query_pages,
    segments,
)

PAGE = 128
BATCHES = [
    ([0], [1]),
    ([0], [PAGE]),
    ([0], [5 * PAGE + 3]),
    ([3 * PAGE], [3 * PAGE + 1]),
    ([300], [500]),
    ([1000], [1001]),
    ([7 * PAGE], [9 * PAGE]),
    ([0, 300, 0, 129, 8 * PAGE], [400, 301, 1, 900, 11 * PAGE + 50]),
    ([PAGE - 1, 2 * PAGE], [PAGE, 2 * PAGE + 1]),
]


def keys_of(call: PagedCall, n: int) -> list[tuple[int, int]]:
    """Return (page index, offset) of the keys of pseudo-request n."""
    pages = call.kv_indices[call.kv_indptr[n] : call.kv_indptr[n + 1]].tolist()
    keys = [(page, offset) for page in pages for offset in range(PAGE)]
    return keys[: len(keys) - PAGE + int(call.last_page_len[n])]


def expected_keys(b: int, position: int, config: KVarNConfig, first: int = 0) -> list[tuple[int, int, str]]:
    """Return (request, position, source) of every key of a new token, from `first` on."""
    exact = max(position // PAGE - config.window_pages, 0) * PAGE
    return [(b, j, "record" if j < exact else "exact") for j in range(first, position + 1)]


@pytest.mark.parametrize("window", [1, PAGE, PAGE + 1, PAGE + 2, 300])
@pytest.mark.parametrize("room", [0, 1, 1000])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_plan_of_a_sliding_window_reads_it_in_one_call_and_no_page_before_it(batch, room, preset, window):
    config, capacity = KVarNConfig.from_preset(preset), fewest_pages(window) + room
    new = [(b, i) for b, (prefix, seq) in enumerate(zip(*batch, strict=True)) for i in range(prefix, seq)]
    queries, rows = query_pages(*batch, config, window), 0
    parts = segments(queries, capacity)
    assert num_splits(queries, 1, 10**6) == 1 and (room < 1000 or len(parts) == 1)
    for part in parts:
        assert part.causal and part.begin == rows and part.splits == 1 and len(part.pages) <= capacity
        rows, bounds = part.end, part.call.qo_indptr.tolist()
        for n, (begin, end) in enumerate(pairwise(bounds)):
            (b, first), (_, last) = new[part.begin + begin], new[part.begin + end - 1]
            assert last - first == end - 1 - begin and first // PAGE == last // PAGE
            found = [
                (
                    int(part.requests[entry]),
                    int(part.pages[entry]) * PAGE + offset,
                    "exact" if entry < part.num_exact else "record",
                )
                for entry, offset in keys_of(part.call, n)
            ]
            # in order and without a gap, so that a library finds the window of each query from the end
            oldest = max(first - window + 1, 0) // PAGE * PAGE
            assert found == expected_keys(b, last, config, oldest)
    assert rows == len(new)


@pytest.mark.parametrize("splits", [1, 2, 5])
@pytest.mark.parametrize("capacity", [2, 3, 5, 1000])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_plan_reads_every_key_once_from_where_the_position_rule_says(batch, capacity, preset, splits):
    config = KVarNConfig.from_preset(preset)
    new = [(b, i) for b, (prefix, seq) in enumerate(zip(*batch, strict=True)) for i in range(prefix, seq)]
    read: dict[int, list[tuple[int, int, str]]] = {}
    causal_rows = 0
    for part in segments(query_pages(*batch, config), capacity, splits):
        assert len(part.pages) <= capacity
        size, call, bounds = part.end - part.begin, part.call, part.call.qo_indptr.tolist()
        assert (call.kv_indptr.diff() > 0).all() and bounds[-1] == part.splits * size
        seen = part.seen
        assert seen.shape == (part.splits, size) and seen.any(0)[[0, -1]].all()
        if part.causal:
            # their results are written, not merged: no gap, no overlap, before all others
            assert part.begin == causal_rows and seen.all() and part.splits == 1
            causal_rows = part.end
        else:
            assert causal_rows == len(new) and part.splits == splits
        for n, (begin, end) in enumerate(pairwise(bounds)):
            rows = [part.begin + row % size for row in (begin, end - 1)]
            # no call tells the queries between the first and the last one apart
            assert rows[1] - rows[0] == end - 1 - begin
            assert len({(b, i // PAGE) for b, i in new[rows[0] : rows[1] + 1]}) == 1
            keys = keys_of(call, n)
            assert all(entry < len(part.pages) for entry, _ in keys)
            sources = [
                (
                    int(part.requests[entry]),
                    int(part.pages[entry]) * PAGE + offset,
                    "exact" if entry < part.num_exact else "record",
                )
                for entry, offset in keys
            ]
            assert seen.ravel()[begin] == seen.ravel()[end - 1]
            for row in set(rows) if seen.ravel()[begin] else ():
                hidden = rows[1] - row if part.causal else 0
                read.setdefault(row, []).extend(sources[: len(sources) - hidden])
    assert causal_rows == len(new)
    for row, keys in read.items():
        b, position = new[row]
        assert sorted(keys) == expected_keys(b, position, config)


def test_plan_cuts_the_records_of_a_query_page_into_equal_splits():
    queries = query_pages([40 * PAGE], [40 * PAGE + 3], KVarNConfig.from_preset("kvarn"))
    causal, records = segments(queries, 100, splits=4)
    assert causal.causal and causal.num_exact == len(causal.pages) == 2
    assert records.call.kv_indptr.diff().tolist() == [9, 10, 10, 10] and records.seen.all()
    assert records.call.qo_indptr.tolist() == [0, 3, 6, 9, 12]


def test_splits_fill_the_device_where_few_queries_read_much():
    def of(prefix, tokens, heads=32):
        config = KVarNConfig.from_preset("kvarn")
        return num_splits(query_pages([prefix], [prefix + tokens], config), heads, 132)

    long = (SPLIT_PAGES + 1) * PAGE
    assert [of(long, tokens) for tokens in (1, 128, 256, 384, 8192)] == [4, 4, 2, 1, 1]
    assert of(long - PAGE, 128) == 1 and of(0, 1) == 1
    # a rank of tensor parallelism
    assert of(long, 128, heads=2) == MAX_SPLITS


@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_plan_is_one_segment_where_the_workspace_is_large(batch):
    queries = query_pages(*batch, KVarNConfig.from_preset("kvarn"))
    (part,) = segments(queries, len(queries.pages))
    assert part.causal and len(part.pages) == len(queries.pages)


def test_plan_of_the_documented_example():
    queries = query_pages([300], [500], KVarNConfig.from_preset("kvarn"))
    assert queries.queries.tolist() == [84, 116]
    assert queries.pages.tolist() == [1, 2, 3, 0, 1] and queries.num_exact == 3
    (part,) = segments(queries, 100)
    assert part.call.kv_indptr.tolist() == [0, 3, 7]
    assert part.call.kv_indices.tolist() == [3, 0, 1, 3, 4, 1, 2]
    assert part.call.last_page_len.tolist() == [128, 116]


def test_plan_of_a_first_page_reads_no_record():
    (part,) = segments(query_pages([0, 0], [PAGE, 1], KVarNConfig.from_preset("kvarn")), 10)
    assert part.num_exact == 2 and part.pages.tolist() == [0, 0]
