# SPDX-License-Identifier: Apache-2.0
"""Sliding windows in a world: SGLang's pool of them, on the device and in host memory, and what it must hold.

What a token has in a layer with a sliding window is a tag here, made of the tokens up to it, so that whoever reads a
window of other tokens, or of another request, sees that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import host_pools_on_cpu
import torch
from history import PAGE, extend_hashes
from prefix_cache import calls
from sglang_kvarn import compat

# what a rejected draft stores, the tag of no token
REJECTED = -1


@dataclass(frozen=True)
class Slide:
    """What a step does to the sliding windows of one request.

    Attributes:
        places: slots in SGLang's pool of them, of all tokens and the rejected drafts behind, 0 for what it no longer
            keeps; tags: of all tokens.
        start: the first new token; request: for messages.
    """

    places: torch.Tensor
    tags: torch.Tensor
    start: int
    request: str


def tags_of(hashes: list[int]) -> torch.Tensor:
    """Return the tags of tokens from the hashes of the prefixes that end with them: int64 [T], 63 bits each."""
    return torch.tensor([h >> 1 for h in hashes])


class KeptWindows:
    """Hold the sliding windows of one world.

    Attributes:
        pool: SGLang's pool of records and sliding windows; layers: that have these; size: tokens before a query.
    """

    def __init__(self, records: Any, pages: int, layers: list[int], size: int) -> None:
        host_pools_on_cpu.install()
        self.layers, self.size, self.host, self._device = layers, size, None, None
        shape = records.head_num, records.head_dim, records.head_dim
        self.pool = compat.resolve("sglang_kvarn.mixed_pool.MixedPool")(records, pages * PAGE, layers, shape)

    def attach(self, tree: Any, device: Any) -> None:
        """Take host memory, and let copies of sliding windows be operations of the simulated device."""
        self._device, self.host = device, calls.host_windows(tree)
        device.delay(self.host, "backup_from_device_all_layer", "host windows")
        device.delay(self.host, "load_to_device_per_layer", "windows")

    def memory(self, layer: int) -> torch.Tensor:
        """Return what a layer stores, int64 [slots], behind what SGLang has a step wait for."""
        return _tags(self.pool.get_key_buffer(layer))

    def run(self, slides: list[Slide], layer: int, memory: torch.Tensor) -> None:
        """Run a layer with a sliding window of a step: store what is new, and check what its windows hold."""
        for slide in slides:
            own, seen = slide.tags ^ layer, max(slide.start - self.size, 0)
            places, rejected = slide.places.split([len(own), len(slide.places) - len(own)])
            memory[places[slide.start :]] = own[slide.start :]
            memory[rejected] = REJECTED
            assert torch.equal(memory[places[seen:]], own[seen:]), (
                f"request {slide.request}: sliding window of layer {layer}"
            )

    def check(self, tree: Any) -> None:
        """Windows of the prefix tree are those of its tokens, on the device and in host memory."""
        if not calls.shows_nodes(tree) or (self.host and not calls.is_settled(tree, self._device)):
            return
        held: list[int] = []
        table = tree.token_to_kv_pool_allocator.full_to_swa_index_mapping
        device = [_tags(buffer) for buffer in self.pool.swa_kv_pool.k_buffer]
        host = [_tags(buffer) for buffer in self.host.k_data_refs] if self.host else []
        for path, start, full, slots in calls.nodes_with_windows(tree):
            own = tags_of(extend_hashes(0, path)[start:])
            found = {"device": (device, None if full is None else table[full]), "host": (host, slots)}
            for name, (buffers, places) in found.items():
                for layer, buffer in zip(self.layers, buffers, strict=True) if places is not None else ():
                    assert torch.equal(buffer[places.long()], own ^ layer), f"{name} memory: window of layer {layer}"
            held += [] if slots is None else slots.tolist()
        if self.host:
            free = torch.cat([self.host.free_slots, *self.host.release_slots]).tolist()
            assert sorted(free + held) == list(range(self.host.size)), "every slot of the host is free, or in the tree"


def _tags(buffer: torch.Tensor) -> torch.Tensor:
    """Return the first 64 bits of every slot of a buffer [slots, heads, channels] in 32 bits."""
    return buffer.view(torch.int64)[:, 0, 0]
