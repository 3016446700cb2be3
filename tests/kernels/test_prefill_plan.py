# SPDX-License-Identifier: Apache-2.0
"""The plan against the position rule, token by token."""

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


def expected_keys(batch, config) -> list[list[tuple[int, int, str]]]:
    """Return (request, position, source) of every key of every new token, sorted."""
    out = []
    for b, (prefix, seq) in enumerate(zip(*batch, strict=True)):
        for i in range(prefix, seq):
            exact_page = max(i // PAGE - config.window_pages, 0)
            sources = [
                "record" if j < exact_page * PAGE else "window" if j < prefix else "own" for j in range(i + 1)
            ]
            out.append([(b, j, source) for j, source in enumerate(sources)])
    return out


@pytest.mark.parametrize("capacity", [1, 2, 3, 1000])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_canonical"])
def test_plan_reads_every_key_once_from_where_the_position_rule_says(batch, capacity, preset):
    config = KVarNConfig.from_preset(preset)
    queries = query_pages(*batch, config)
    new = [(b, i) for b, (prefix, seq) in enumerate(zip(*batch, strict=True)) for i in range(prefix, seq)]
    read: list[list[tuple[int, int, str]]] = [[] for _ in new]
    own = own_call(queries)
    for n, (begin, end) in enumerate(zip(own.qo_indptr[:-1], own.qo_indptr[1:], strict=True)):
        keys = keys_of(own, n, 1)
        for row in range(begin, end):
            visible = keys[: len(keys) - int(end) + row + 1]
            read[row] += [(*new[token], "own") for token, _ in visible]
    for part in segments(queries, capacity, PAGE):
        assert len(part.pages) <= capacity
        call = part.call
        assert (call.kv_indptr.diff() > 0).all() and int(call.qo_indptr[-1]) == part.end - part.begin
        seen = torch.ones(part.end - part.begin, dtype=torch.bool) if part.seen is None else part.seen
        assert seen[0] and seen[-1]
        for n, (begin, end) in enumerate(zip(call.qo_indptr[:-1], call.qo_indptr[1:], strict=True)):
            for row in range(begin, end):
                keys = [
                    (
                        int(part.requests[entry]),
                        int(part.pages[entry]) * PAGE + offset,
                        "window" if entry < part.num_windows else "record",
                    )
                    for entry, offset in keys_of(call, n, PAGE)
                ]
                assert max(entry for entry, _ in keys_of(call, n, PAGE)) < len(part.pages)
                if seen[row]:
                    read[part.begin + row] += keys
    assert [sorted(keys) for keys in read] == [sorted(keys) for keys in expected_keys(batch, config)]


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
