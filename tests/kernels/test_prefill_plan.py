# SPDX-License-Identifier: Apache-2.0
"""The plan against the position rule, token by token."""

from itertools import pairwise

import pytest
import torch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.prefill_plan import PagedCall, own_call, query_pages, segments

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


def keys_of(call: PagedCall, n: int, page_size: int) -> list[tuple[int, int]]:
    """Return (page index, offset) of the keys of pseudo-request n."""
    pages = call.kv_indices[call.kv_indptr[n] : call.kv_indptr[n + 1]].tolist()
    keys = [(page, offset) for page in pages for offset in range(page_size)]
    return keys[: len(keys) - page_size + int(call.last_page_len[n])]


def expected_keys(b: int, position: int, prefix: int, config: KVarNConfig) -> list[tuple[int, int, str]]:
    """Return (request, position, source) of every key of a new token."""
    exact_page = max(position // PAGE - config.window_pages, 0)
    return [
        (b, j, "record" if j < exact_page * PAGE else "window" if j < prefix else "own")
        for j in range(position + 1)
    ]


@pytest.mark.parametrize("capacity", [1, 2, 3, 1000])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_plan_reads_every_key_once_from_where_the_position_rule_says(batch, capacity, preset):
    config = KVarNConfig.from_preset(preset)
    queries = query_pages(*batch, config)
    new = [(b, i) for b, (prefix, seq) in enumerate(zip(*batch, strict=True)) for i in range(prefix, seq)]
    own = own_call(queries)
    read: dict[int, list[tuple[int, int, str]]] = {}
    # the first and the last query of each query page; no call tells those between apart
    for n, (begin, end) in enumerate(pairwise(own.qo_indptr.tolist())):
        assert len({(b, i // PAGE) for b, i in new[begin:end]}) == 1
        keys = [(*new[token], "own") for token, _ in keys_of(own, n, 1)]
        for row in {begin, end - 1}:
            read[row] = keys[: len(keys) - end + row + 1]
    for part in segments(queries, capacity, PAGE):
        assert len(part.pages) <= capacity
        call, bounds = part.call, (part.call.qo_indptr + part.begin).tolist()
        assert (call.kv_indptr.diff() > 0).all() and bounds[-1] == part.end
        seen = torch.ones(part.end - part.begin, dtype=torch.bool) if part.seen is None else part.seen
        assert seen[0] and seen[-1] and len(seen) == part.end - part.begin
        for n, (begin, end) in enumerate(pairwise(bounds)):
            keys = keys_of(call, n, PAGE)
            assert all(entry < len(part.pages) for entry, _ in keys)
            sources = [
                (
                    int(part.requests[entry]),
                    int(part.pages[entry]) * PAGE + offset,
                    "window" if entry < part.num_windows else "record",
                )
                for entry, offset in keys
            ]
            assert seen[begin - part.begin] == seen[end - 1 - part.begin]
            for row in {begin, end - 1} if seen[begin - part.begin] else ():
                read[row] += sources
    for row, keys in read.items():
        b, position = new[row]
        assert sorted(keys) == expected_keys(b, position, batch[0][b], config)


def test_plan_of_the_documented_example():
    queries = query_pages([300], [500], KVarNConfig.from_preset("kvarn"))
    assert queries.queries.tolist() == [84, 116]
    assert queries.pages.tolist() == [1, 2, 0, 1] and queries.num_windows == 2
    (part,) = segments(queries, 100, PAGE)
    assert part.call.kv_indptr.tolist() == [0, 3, 6]
    assert part.call.kv_indices.tolist() == [2, 0, 1, 2, 3, 1]
    assert part.call.last_page_len.tolist() == [44, 44]
    assert own_call(queries).kv_indptr.tolist() == [0, 84, 284]


def test_plan_of_a_first_page_has_no_past():
    assert segments(query_pages([0, 0], [PAGE, 1], KVarNConfig.from_preset("kvarn")), 10, PAGE) == []
