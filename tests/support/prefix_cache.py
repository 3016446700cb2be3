# SPDX-License-Identifier: Apache-2.0
"""The prefix cache of the installed SGLang, and the calls of its scheduler that differ between versions.

`RadixCalls` is 0.5.16 with RadixCache, `UnifiedCalls` 0.5.23 with UnifiedRadixCache; `calls` is the one that applies.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang_kvarn import compat

PAGE = 128


class RadixCalls:
    """Requests carry their prefix slots and lengths; the tree locks by node."""

    def publish_arguments(self) -> None:
        """Publish the few server arguments that SGLang's pools read."""
        arguments = SimpleNamespace(page_size=PAGE, speculative_algorithm=None, strip_thinking_cache=False)
        compat.resolve("sglang.srt.server_args.set_global_server_args_for_scheduler")(arguments)

    def set_drafts(self, drafts: int) -> None:
        """Say whether requests verify drafts, for which SGLang allocates more than they fill."""
        arguments = compat.resolve("sglang.srt.runtime_context.get_server_args")()
        arguments.speculative_algorithm = "NGRAM" if drafts else None

    # where SGLang has what a node of its tree keeps of tokens
    _components = "sglang.srt.mem_cache.unified_cache_components"

    @property
    def _kinds(self):
        """Return SGLang's names of what a node has of its tokens."""
        return compat.resolve(f"{self._components}.ComponentType")

    # SGLang may begin a load for a request and then not add the request to the batch
    rejects_after_load = True
    # trees with host memory that SGLang has
    cores = ("python",)

    def make_tree(self, rows, allocator, host=None, sliding=0):
        """Return an empty prefix cache over these pools.

        Args:
            host: host memory behind it, if there is any (HostOptions).
            sliding: tokens before a query in the sliding windows that it keeps too, 0 for none.
        """
        if sliding:
            return self._make_sliding_tree(rows, allocator, sliding)
        if host is None:
            return compat.resolve("sglang.srt.mem_cache.radix_cache.RadixCache")(self._parameters(rows, allocator))
        parameters = self._parameters(rows, allocator, tp_cache_group=self._one_rank())
        arguments = SimpleNamespace(**self._host_arguments(allocator, host), served_model_name="world")
        return compat.resolve("sglang.srt.mem_cache.hiradix_cache.HiRadixCache")(parameters, arguments)

    def _make_sliding_tree(self, rows, allocator, sliding: int):
        more = {"tree_components": (self._kinds.FULL, self._kinds.SWA), "sliding_window_size": sliding}
        cache = compat.resolve("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache")
        return cache(self._parameters(rows, allocator, **more))

    def evict_sliding(self, tree, req, end: int) -> None:
        """Free what left the sliding window of a request that has so many tokens."""
        compat.resolve("sglang.srt.mem_cache.common.free_swa_out_of_window_slots")(
            req,
            end,
            sliding_window_size=tree.sliding_window_size,
            page_size=PAGE,
            req_to_token_pool=tree.req_to_token_pool,
            token_to_kv_pool_allocator=tree.token_to_kv_pool_allocator,
        )

    @staticmethod
    def _one_rank() -> SimpleNamespace:
        """Return what stands for a group of processes that is this process alone."""
        return SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def _host_arguments(self, allocator, host) -> dict[str, object]:
        return {
            # the host pool has a page more than the ratio gives
            "hicache_ratio": (host.pages - 0.5) * PAGE / allocator.get_kvcache().size,
            "hicache_size": 0,
            "hicache_mem_layout": "page_first",
            "hicache_io_backend": "kernel",
            "hicache_write_policy": host.policy,
            "hicache_storage_backend": None,
            "hicache_storage_backend_extra_config": None,
            "hicache_storage_prefetch_policy": "best_effort",
            "extra_metric_labels": None,
        }

    def controller(self, tree):
        """Return what copies pages between the device and the host."""
        return tree.cache_controller

    def host_pool(self, tree):
        """Return our host pool."""
        return tree.cache_controller.mem_pool_host

    def set_fences(self, controller, stream) -> None:
        """Do what SGLang's scheduler does so that copies wait for the forward pass."""

    def set_fence(self, controller, stream, left_out: str) -> None:
        """Do so, but not for the copies of one direction, "write" or "load"."""

    def queued_copies(self, controller) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the memory and the slots to which copies go that SGLang has planned and not begun."""
        for operation in controller.load_queue:
            yield "device", operation.device_indices
        for operation in controller.write_queue:
            yield "host", operation.host_indices

    def is_settled(self, tree, device) -> bool:
        """Return whether no copy is planned, and nothing is queued on the device that makes them."""
        return device.is_idle() and not any(self.queued_copies(self.controller(tree)))

    def shows_nodes(self, tree) -> bool:
        """Return whether `nodes` can be called."""
        return True

    def nodes(self, tree) -> Iterator[tuple[list[int], int, torch.Tensor | None, torch.Tensor | None]]:
        """Yield of every node the tokens from the root to its end, how many are before it, and its slots in both."""
        for node, path, start in self._walk(tree):
            yield path, start, *self._values(node)

    def nodes_with_windows(self, tree) -> Iterator[tuple[list[int], int, torch.Tensor | None, torch.Tensor | None]]:
        """Yield of every node the tokens from the root to its end, and how many are before it.

        Besides, where it has windows: its slots on the device, of the records, and those of its windows on the host.
        """
        for node, path, start in self._walk(tree):
            windows = node.component_data[self._kinds.SWA]
            full = node.component_data[self._kinds.FULL].value if windows.value is not None else None
            yield path, start, full, windows.host_value

    def _walk(self, tree) -> Iterator[tuple[Any, list[int], int]]:
        """Yield every node, the tokens from the root to its end, and how many are before it."""
        stack = [(child, []) for child in self._root(tree).children.values()]
        while stack:
            node, before = stack.pop()
            path = before + list(node.key.token_ids)
            stack += [(child, path) for child in node.children.values()]
            yield node, path, len(before)

    def _root(self, tree):
        return tree.root_node

    def _values(self, node) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        return node.value, node.host_value

    def host_hit(self, req) -> int:
        """Return the tokens of a matched prefix that are in host memory only."""
        return req.host_hit_length

    def needs_load(self, req) -> bool:
        """Return whether some of a matched prefix, or what belongs to it, is in host memory only."""
        return bool(self.host_hit(req))

    def load_back(self, adder, req) -> int:
        """Plan to load what a request found in host memory, as PrefillAdder.add_one_req does; return the tokens."""
        params = compat.resolve("sglang.srt.mem_cache.base_prefix_cache.InitLoadBackParams")
        slots, req.last_node = adder.tree_cache.init_load_back(
            params(best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req)
        )
        req.prefix_indices = torch.cat([req.prefix_indices, slots])
        req.cache_protected_len = len(req.prefix_indices)
        return len(slots)

    def flush_copies(self, tree) -> None:
        """Begin the copies to the host that the result of a step has planned."""

    def copies_run(self, tree) -> bool:
        """Return whether SGLang knows of copies that are not done, so that it would refuse to empty the cache."""
        stored = tree.enable_storage and (tree.ongoing_prefetch or tree.ongoing_backup)
        return bool(tree.ongoing_write_through or tree.ongoing_load_back or stored)

    # whether there may be files behind host memory
    stores = False

    def prefetch(self, tree, req) -> None:
        """Begin to read from files what a request does not find in memory, as SGLang does when it queues one."""

    def prefetched(self, tree, req) -> bool:
        """Return whether a request need not wait for files any more."""
        return True

    def pop_stored(self, tree, req) -> int:
        """Return, once, how many tokens were read from files for a request."""
        return 0

    def abort_prefetch(self, tree, req) -> None:
        """Forget a request that waits, and what it has read."""

    def _parameters(self, rows, allocator, **more):
        return compat.resolve("sglang.srt.mem_cache.cache_init_params.CacheInitParams")(
            disable=False,
            req_to_token_pool=rows,
            token_to_kv_pool_allocator=allocator,
            page_size=PAGE,
            **more,
        )

    def cached_slots(self, tree) -> torch.Tensor:
        """Return the slots that the tree holds."""
        if getattr(tree, "cache_controller", None) is not None:
            return torch.cat([torch.empty(0), *(device for _, _, device, _ in self.nodes(tree) if device is not None)])
        return tree.all_values_flatten() if tree.root_node.children else torch.empty(0)

    def row(self, req) -> int | None:
        """Return the row of a request, None while it has none."""
        return req.req_pool_idx

    def prefix_len(self, req) -> int:
        """Return the tokens of a request that are in its row or in the tree."""
        return len(req.prefix_indices)

    def committed(self, req) -> int:
        """Return the tokens whose keys and values are stored."""
        return req.kv_committed_len

    def allocated(self, req) -> int:
        """Return the tokens that a request has slots for."""
        return req.kv.kv_allocated_len

    def set_allocated(self, req, end: int) -> None:
        """Note that a request has slots up to here."""
        req.kv.kv_allocated_len = end

    def protected(self, req) -> int:
        """Return the tokens of a row that the tree owns."""
        return req.cache_protected_len

    def prefix_slots(self, tree, rows, req) -> torch.Tensor:
        """Return the slots of the prefix; called before rows are allocated."""
        return req.prefix_indices

    def lock(self, tree, req) -> None:
        """Keep the matched prefix of a request from eviction."""
        req.swa_uuid_for_lock = tree.inc_lock_ref(req.last_node).swa_uuid_for_lock

    def set_extend_range(self, req, start: int, end: int) -> None:
        """Choose the tokens of a request's next chunk."""
        req.set_extend_range(start, end)

    def extend_range(self, req) -> tuple[int, int]:
        """Return the tokens of a request's chunk."""
        return tuple(req.extend_range)

    def note_extend(self, req, end: int) -> None:
        """Note that slots up to here are allocated and will be written by this forward pass."""
        if req.kv is None:
            kv_info = compat.resolve("sglang.srt.managers.schedule_batch.ReqKvInfo")
            req.kv = kv_info(kv_allocated_len=end, swa_evicted_seqlen=0)
        req.kv.kv_allocated_len = req.kv_committed_len = end

    def note_decode(self, req) -> None:
        """Note one more slot."""
        req.kv.kv_allocated_len += 1
        req.kv_committed_len += 1

    def note_accepted(self, req, end: int) -> None:
        """Note that drafts up to here are accepted."""
        req.kv_committed_len = end

    def cache_unfinished(self, tree, req, *, chunked: bool) -> None:
        """Put the full pages of a request into the tree, between two chunks or after the last."""
        tree.cache_unfinished_req(req, chunked=chunked)

    def release(self, tree, req, *, insert: bool) -> None:
        """Give back row and pages."""
        compat.resolve("sglang.srt.mem_cache.common.release_kv_cache")(req, tree, is_insert=insert)


class UnifiedCalls(RadixCalls):
    """Lengths are in the request's ReqKvInfo, prefix slots in the tree or the row; the tree locks by receipt."""

    def publish_arguments(self) -> None:
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
            args = compat.resolve("sglang.srt.server_args.ServerArgs")(model_path=folder, page_size=PAGE)
            args.resolve_once()
        compat.resolve("sglang.srt.server_args.set_global_server_args_for_scheduler")(args)

    _components = "sglang.srt.mem_cache.unified_cache.components"
    rejects_after_load = False
    cores = ("python", "rust")

    def make_tree(self, rows, allocator, host=None, sliding=0):
        if sliding and host is None:
            return self._make_sliding_tree(rows, allocator, sliding)
        kind, cache = self._kinds, compat.resolve("sglang.srt.mem_cache.unified_radix_cache.UnifiedRadixCache")
        if host is None:
            return cache(self._parameters(rows, allocator, tree_components=(kind.FULL,)))
        more: dict[str, object] = {"tree_components": (kind.FULL,)}
        if sliding:
            more = {"tree_components": (kind.FULL, kind.SWA), "sliding_window_size": sliding}
        if hasattr(rows, "mamba_pool"):
            more = {"tree_components": (kind.FULL, kind.MAMBA), "enable_mamba_extra_buffer": True}
            # SGLang asks the configuration of a model
            component = compat.resolve("sglang.srt.mem_cache.unified_cache.components.mamba")
            component.mamba_cache_chunk_size, component.mamba_checkpoint_grid = lambda: PAGE, lambda tree_page: PAGE
        parameters = self._parameters(
            rows, allocator, tp_cache_group=self._one_rank(), tree_core_backend=host.core, **more
        )
        compat.override_argument(None, **self._host_arguments(allocator, host))
        tree = cache(parameters)
        tree.init_hicache(compat.resolve("sglang.srt.runtime_context.get_server_args")(), parameters)
        return tree

    def evict_sliding(self, tree, req, end: int) -> None:
        tree.evict_sliding_windows(req, end, eviction_interval=1)

    def host_pool(self, tree):
        return tree.cache_controller.mem_pool_host.anchor_entry.host_pool

    @property
    def _pools(self):
        """Return SGLang's names of host pools."""
        return compat.resolve("sglang.srt.mem_cache.hicache_storage.PoolName")

    def host_states(self, tree):
        """Return SGLang's host pool of states."""
        return tree.host_pool_group.get_pool(self._pools.MAMBA)

    def host_windows(self, tree):
        """Return SGLang's host pool of sliding windows."""
        return tree.host_pool_group.get_pool(self._pools.SWA)

    def needs_load(self, req) -> bool:
        return req.needs_host_load_back()

    def nodes_with_states(self, tree) -> Iterator[tuple[list[int], dict[str, torch.Tensor | None]]]:
        """Yield of every node the tokens from the root to its end, and the slot of its state in both memories."""
        for node, path, _ in self._walk(tree):
            data = node.component_data[self._kinds.MAMBA]
            yield path, {"device": data.value, "host": data.host_value}

    def set_fences(self, controller, stream) -> None:
        controller.write_fence_stream = controller.load_fence_stream = stream

    def set_fence(self, controller, stream, left_out: str) -> None:
        name = {"write": "load", "load": "write"}[left_out]
        setattr(controller, f"{name}_fence_stream", stream)

    def shows_nodes(self, tree) -> bool:
        return "rust" not in type(tree.tree_core).__module__

    def _root(self, tree):
        return tree.tree_core.root_node

    def _values(self, node) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        data = node.component_data[self._kinds.FULL]
        return data.value, data.host_value

    def load_back(self, adder, req) -> int:
        with adder._lock_node(req.best_match_node, lock_host=True):
            params = compat.resolve("sglang.srt.mem_cache.base_prefix_cache.InitLoadBackParams")
            loaded, req.last_node = adder.tree_cache.init_load_back(
                params(best_match_node=req.best_match_node, host_hit_length=req.host_hit_length, req=req)
            )
        req.host_loaded_length = loaded
        req.prefix_len += loaded
        req.kv.cache_protected_len = req.prefix_len
        return loaded

    stores = True

    def prefetch(self, tree, req) -> None:
        scheduler = SimpleNamespace(tree_cache=tree, enable_hicache_storage=True, enable_lmcache=False)
        compat.resolve("sglang.srt.managers.scheduler.Scheduler")._prefetch_kvcache(scheduler, req)

    def prefetched(self, tree, req) -> bool:
        return tree.check_prefetch_progress(req.cache_request_handle)

    def pop_stored(self, tree, req) -> int:
        return tree.pop_prefetch_loaded_span(req.cache_request_handle)[0]

    def abort_prefetch(self, tree, req) -> None:
        tree.release_aborted_request(req.cache_request_handle)

    def flush_copies(self, tree) -> None:
        tree.flush_pending_backups()

    def cached_slots(self, tree) -> torch.Tensor:
        return tree.all_values_flatten()

    def row(self, req) -> int | None:
        return req.kv.req_pool_idx

    def prefix_len(self, req) -> int:
        return req.prefix_len

    def committed(self, req) -> int:
        return req.kv.kv_committed_len

    def protected(self, req) -> int:
        return req.kv.cache_protected_len

    def prefix_slots(self, tree, rows, req) -> torch.Tensor:
        if req.kv.holds_kv:
            return rows.req_to_token[req.kv.req_pool_idx, : req.prefix_len].long()
        return tree.prefix_device_indices(req) if req.prefix_len else torch.empty(0, dtype=torch.int64)

    def lock(self, tree, req) -> None:
        req.lock = tree.lock(req.last_node)

    def set_extend_range(self, req, start: int, end: int) -> None:
        assert start == req.prefix_len, "a chunk begins where the last one ended"
        req.extend_end = end

    def extend_range(self, req) -> tuple[int, int]:
        return req.prefix_len, req.extend_end

    def note_extend(self, req, end: int) -> None:
        req.kv.kv_allocated_len = req.kv.kv_committed_len = end

    def note_decode(self, req) -> None:
        req.kv.kv_allocated_len += 1
        req.kv.kv_committed_len += 1

    def note_accepted(self, req, end: int) -> None:
        req.kv.kv_committed_len = end

    def set_drafts(self, drafts: int) -> None:
        compat.override_argument(None, speculative_algorithm="NGRAM" if drafts else None)

    def cache_unfinished(self, tree, req, *, chunked: bool) -> None:
        compat.resolve("sglang.srt.mem_cache.common.checkpoint_kv_cache")(req, tree)

    def release(self, tree, req, *, insert: bool) -> None:
        if insert:
            finished = compat.resolve("sglang.srt.managers.schedule_batch.FINISH_LENGTH")
            req.finished_reason = finished(len(req.output_ids))
        compat.resolve("sglang.srt.mem_cache.common.release_kv_cache")(req, tree, checkpoint=insert)


calls = RadixCalls() if compat.version().startswith("0.5.16") else UnifiedCalls()
