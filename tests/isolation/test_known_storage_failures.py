# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
from history import PAGE
from host_tier import HostOptions
from prefix_cache import calls
from storage_tier import Folder
from streams import COPIES_FIRST, FORWARD_FIRST
from world import ROWS, World, prefill, tokens, use_plain_allocation_kernels

ORDERS = [COPIES_FIRST, FORWARD_FIRST, 0, 1, 2]

@pytest.fixture(autouse=True)
def plain_allocation(monkeypatch) -> None:
    use_plain_allocation_kernels(monkeypatch)

def stored(order, path, core="python"):
    return World("kvarn", host=HostOptions(60, "write_through", order, core, Folder(path)), rings=ROWS)

@pytest.mark.parametrize("core", calls.cores)
def test_first(tmp_path, core):
    for n, order in enumerate(ORDERS):
        (path := tmp_path / str(n)).mkdir()
        world = stored(order, path, core)
        prefill(world, tokens(3 * PAGE + 5, 1))
        world.settle()
        world.check_accounts()
        assert len(world.tier.storage.folder.names()) == 3
        assert world.flush()
        world.check_accounts()
        again = world.admit(tokens(3 * PAGE + 5, 1))
        world.settle()
        world.extend(1000)
        assert (again.exact_start, world.storage_hits, world.host_hits) == (3 * PAGE, 1, 1)
        world.settle()
        world.check_accounts()
        print(world.tier.storage.folder.names())
