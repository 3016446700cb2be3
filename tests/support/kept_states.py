# SPDX-License-Identifier: Apache-2.0
"""States of a hybrid model in a world: SGLang's pools of them, of the device and of the host, and what they must hold.

A state here is a number, the hash of the tokens behind which it stands, so that whoever goes on from a state of other
tokens, or of another request, sees that. A step moves the state of each request, and keeps a copy at the last end of a
page, as SGLang's scheduler plans it; the copies go into the prefix tree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import host_pools_on_cpu
import torch
from history import PAGE, extend_hashes
from prefix_cache import calls
from sglang_kvarn import compat

# beside the layers 1 and 3, which have records
LAYERS = (0, 2)


@dataclass(frozen=True)
class Move:
    """What a step does to the state of one request.

    Attributes:
        slot: of the state; before, after: hashes, 0 before the first token, where a state is zeros.
        kept: slot of the copy, None for none; at: its hash; request: for messages.
    """

    slot: int
    before: int
    after: int
    kept: int | None
    at: int
    request: str


class KeptStates:
    """Hold the states of one world.

    Attributes:
        rows: SGLang's rows of requests, with the pool of states; number: slots of it.
    """

    def __init__(self, number: int, rows: int, context: int) -> None:
        host_pools_on_cpu.install()
        utils = "sglang.srt.configs.mamba_utils"
        sizes = ("intermediate_size", "conv_dim", "ssm_state_size", "num_heads", "head_dim", "state_size")
        shape = compat.resolve(f"{utils}.Mamba2StateShape")(
            conv=[(1, 1)], temporal=(1, 1, 1), conv_kernel=2, **dict.fromkeys(sizes, 1)
        )
        dtype = compat.resolve(f"{utils}.Mamba2StateDType")(conv=torch.int64, temporal=torch.int64)
        params = compat.resolve(f"{utils}.Mamba2CacheParams")(shape=shape, dtype=dtype, layers=list(LAYERS))
        self.number = number
        self.rows = compat.resolve("sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool")(
            size=rows,
            mamba_size=number,
            mamba_spec_state_size=0,
            max_context_len=context,
            device="cpu",
            enable_memory_saver=False,
            cache_params=params,
            mamba_layer_ids=list(LAYERS),
            enable_mamba_extra_buffer=True,
        )

    def attach(self, tree: Any, device: Any) -> None:
        """Let copies of states be operations of the simulated device."""
        self._tree, self._device = tree, device
        self.host = calls.host_states(tree)
        device.delay(self.host, "backup_from_device_all_layer", "host states")
        device.delay(self.host, "load_to_device_per_layer", "states")
        for name in ("copy_from", "clear_slots"):
            device.delay(self.rows.mamba_pool, name, "states")

    def release_unadmitted(self, req: Any) -> None:
        """Give back the state that a match took for a request that is then not added, as SGLang's scheduler does."""
        req.kv.mamba_cow_src_index, req.kv.mamba_needs_clear = None, False
        if req.kv.holds_mamba:
            self.rows.mamba_allocator.free(req.kv.mamba_pool_idx.unsqueeze(-1))
            req.kv.mamba_pool_idx = None

    def make_room(self, reqs: list[Any]) -> None:
        """Evict states of the tree until requests that get a row find theirs, as SGLang does before it gives rows."""
        compat.resolve("sglang.srt.mem_cache.allocation.ensure_mamba_capacity")(self.rows, reqs, self._tree)

    def plan(self, requests: list[Any], spans: list[tuple[int, int]], decoding: list[bool]) -> tuple[list[Move], list]:
        """Return what a step does to states, and (from, to) of those from which requests begin; from None: of zeros."""
        moves, begun = [], []
        for request, (start, end), decodes in zip(requests, spans, decoding, strict=True):
            req, hashes = request.req, [0, *request.history.hashes]
            kv, edge = req.kv, end // PAGE * PAGE
            if not decodes:
                if kv.mamba_cow_src_index is not None or kv.mamba_needs_clear:
                    begun.append((kv.mamba_cow_src_index, kv.mamba_pool_idx.unsqueeze(0)))
                kv.mamba_cow_src_index, kv.mamba_needs_clear = None, False
                if req.mamba_branching_seqlen is not None and start < req.mamba_branching_seqlen < end:
                    edge = req.mamba_branching_seqlen
            kept = int(kv.mamba_ping_pong_track_buffer[kv.mamba_next_track_idx]) if edge > start else None
            before = hashes[start] if start else 0
            moves.append(Move(int(kv.mamba_pool_idx), before, hashes[end], kept, hashes[edge], req.rid))
            if kept is not None and not decodes:
                self._note(req, edge)
        return moves, begun

    def process(self, req: Any, start: int, end: int) -> None:
        """Note that a decode step has kept a copy, once its result is known."""
        if (edge := end // PAGE * PAGE) > start:
            self._note(req, edge)

    def _note(self, req: Any, edge: int) -> None:
        kv = req.kv
        kv.mamba_prev_track_seqlen, kv.mamba_last_track_seqlen = kv.mamba_last_track_seqlen, edge
        kv.mamba_last_track_idx = kv.mamba_next_track_idx
        kv.mamba_next_track_idx = self.rows.get_mamba_ping_pong_other_idx(kv.mamba_next_track_idx)

    def begin(self, begun: list) -> None:
        """Clear and copy the states from which requests of a step begin, behind what SGLang has the copy wait for."""
        if cleared := [target for source, target in begun if source is None]:
            self.rows.mamba_pool.clear_slots(torch.cat(cleared))
        if copied := [slots for slots in begun if slots[0] is not None]:
            self.rows.copy_mamba_state(*(torch.cat(slots) for slots in zip(*copied, strict=True)))

    @staticmethod
    def run(moves: list[Move], layer: int, memory: Any) -> None:
        """Run a layer of states of a step: check what each goes on from, and move it."""
        for move in moves:
            for part in (memory.temporal, *memory.conv):
                expected = _state(move.before, layer) if move.before else 0
                assert int(part[move.slot]) == expected, f"request {move.request}: state of layer {layer}"
                part[move.slot] = _state(move.after, layer)
                if move.kept is not None:
                    part[move.kept] = _state(move.at, layer)

    def check(self, requests: list[Any]) -> None:
        """Every slot is free, or in the tree, or of one request; states of the tree are those of their tokens."""
        free = self.rows.mamba_allocator.available_size()
        held = sum(request.req.kv.holds_mamba for request in requests)
        held += sum(2 for request in requests if request.req.kv.mamba_ping_pong_track_buffer is not None)
        cached = self._tree.mamba_evictable_size() + self._tree.mamba_protected_size()
        assert free + held + cached == self.number, (free, held, cached)
        if not calls.shows_nodes(self._tree) or not calls.is_settled(self._tree, self._device):
            return
        pool = self.rows.mamba_pool.mamba_cache
        memories = {
            "device": [pool.temporal, *pool.conv],
            "host": [part[:, :, 0].transpose(0, 1) for part in (self.host.temporal_buffer, *self.host.conv_buffer)],
        }
        for path, slots in calls.nodes_with_states(self._tree):
            state = extend_hashes(0, path)[-1]
            for memory, slot in slots.items():
                for part in memories[memory] if slot is not None else ():
                    found = [int(part[n, int(slot)]) for n in range(len(LAYERS))]
                    assert found == [_state(state, layer) for layer in LAYERS], f"{memory} memory: state {int(slot)}"


def _state(prefix: int, layer: int) -> int:
    # 63 bits
    return (prefix >> 1) ^ layer
