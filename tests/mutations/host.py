# SPDX-License-Identifier: Apache-2.0
"""Bugs of host memory behind the prefix cache: copies of the wrong pages, copies that wait for too little."""

from __future__ import annotations

from .mutation import Mutation
from .paths import (
    ADMISSION,
    BACKEND,
    BALANCED_LAYERS,
    COMPAT,
    COPY_PAGES,
    FENCES,
    HOST_POOL,
    PLUGIN,
    POOL,
    REFUSALS,
    RINGS,
    TEST_BALANCED_LAYERS,
    TEST_COPY_PAGES,
    TEST_HOST_POOL,
    TEST_KNOWN_HOST,
    TEST_KNOWN_STORAGE,
    TEST_REFUSALS,
)

# a controller as SGLang 0.5.16 has it, in every version
_FENCE = f"{TEST_KNOWN_HOST}::test_a_controller_with_streams_of_its_own_copies_after_the_forward_pass"
_WRITTEN = f"{TEST_KNOWN_HOST}::test_a_page_is_copied_to_the_host_after_the_step_that_encodes_it"
_READ = f"{TEST_KNOWN_HOST}::test_a_prefix_from_the_host_is_read_as_one_that_never_left"
# these need an SGLang with storage
_FILES = f"{TEST_KNOWN_STORAGE}::test_a_prefix_from_files_is_read_as_one_that_never_left"
_DAMAGED = f"{TEST_KNOWN_STORAGE}::test_a_damaged_file_is_a_miss"
_FOREIGN = f"{TEST_KNOWN_STORAGE}::test_files_of_another_preset_or_of_other_factors_are_misses"
_RING = f"{TEST_KNOWN_HOST}::test_a_prefix_in_host_memory_stays_while_memory_is_made_for_the_ring_of_its_request"
_ATTACH = f"{TEST_REFUSALS}::test_a_running_server_attaches_what_it_could_start_with"

MUTATIONS = (
    Mutation(
        "copies to the host that wait for no forward pass",
        FENCES,
        """_wait_for_forward(controller, "write_stream")""",
        """_wait_for_forward(controller, "written_stream")""",
        (_FENCE,),
    ),
    Mutation(
        "copies from the host that wait for no forward pass",
        FENCES,
        """_wait_for_forward(controller, "load_stream")""",
        """_wait_for_forward(controller, "loaded_stream")""",
        (_FENCE,),
    ),
    Mutation(
        "loads behind which the copies to the host wait",
        FENCES,
        """_wait_for_forward(controller, "load_stream")""",
        """_wait_for_forward(controller, "write_stream")""",
        (_FENCE,),
    ),
    Mutation(
        "a forward pass that waits for the copies",
        FENCES,
        "stream.wait_stream(pool.forward_stream)",
        "pool.forward_stream.wait_stream(stream)",
        (_FENCE,),
    ),
    Mutation(
        "copies of another cache that wait",
        FENCES,
        "if rings.of_pool(pool) is None or pool.forward_stream is None:",
        "if pool.forward_stream is None:",
        (_FENCE,),
    ),
    Mutation(
        "a layer that is read before its pages are loaded",
        POOL,
        "if self.layer_transfer_counter is not None:",
        "if False:",
        (_READ,),
    ),
    Mutation(
        "a layer that waits for the pages of the first one",
        POOL,
        "self.layer_transfer_counter.wait_until(number)",
        "self.layer_transfer_counter.wait_until(0)",
        (_READ,),
    ),
    Mutation(
        "a page copied to the page before its own",
        HOST_POOL,
        "self._device_pages, self.kv_buffer, *slots, self.page_size)",
        "self._device_pages, self.kv_buffer, slots[0], slots[1] - self.page_size, self.page_size)",
        (_WRITTEN,),
    ),
    Mutation(
        "the first page of a node copied in the place of all",
        HOST_POOL,
        "return slots[:: self.page_size].to(",
        "return slots[: len(slots) // self.page_size].to(",
        (_READ,),
    ),
    Mutation(
        "pages copied to the host from where they go",
        HOST_POOL,
        "self._firsts(device_indices), host_indices[:: self.page_size]\n",
        "self._firsts(host_indices), device_indices[:: self.page_size]\n",
        (_WRITTEN,),
    ),
    Mutation(
        "pages loaded from where they go",
        HOST_POOL,
        "slots = self._firsts(host_indices), self._firsts(device_indices)",
        "slots = self._firsts(device_indices), self._firsts(host_indices)",
        (_READ,),
    ),
    Mutation(
        "every load that of the first layer",
        HOST_POOL,
        "one = slice(layer_id, layer_id + 1)",
        "one = slice(0, 1)",
        (_READ,),
    ),
    Mutation(
        "a load that puts the last layer in the place of all",
        HOST_POOL,
        "self._load(self.kv_buffer[:, one], self._device_pages[:, one], *slots",
        "self._load(self.kv_buffer[:, -1:], self._device_pages[:, one], *slots",
        (_READ,),
    ),
    Mutation(
        "a tenth of the pages forgotten",
        HOST_POOL,
        "size = (self.page_num, self.layer_num, self._row_bytes)",
        "size = (self.page_num * 9 // 10, self.layer_num, self._row_bytes)",
        (_READ,),
    ),
    Mutation(
        "host memory of slots, not of pages",
        PLUGIN,
        """if rings.of_pool(getattr(source, "pool", source)) is None:""",
        "if True:",
        (_READ,),
    ),
    Mutation(
        "exact start without what came from the host",
        RINGS,
        "[compat.prefix_len(req) for req in reqs]",
        "[compat.prefix_len(req) - req.host_hit_length for req in reqs]",
        (_READ,),
    ),
    Mutation(
        "a ring that drops the prefix of its request from host memory",
        ADMISSION,
        "with adder._lock_node(req.last_node), compat.lock_host_prefix(adder, req):",
        "with adder._lock_node(req.last_node):",
        (_RING,),
    ),
    Mutation(
        "no lock of a prefix in host memory",
        COMPAT,
        """if getattr(adder.tree_cache, "cache_controller", None) is None:""",
        "if True:",
        (_RING,),
    ),
    Mutation(
        "layers of the target taken for layers of the source (copy kernel)",
        COPY_PAGES,
        "source_id * source_page + layer * source_layer",
        "source_id * source_page + layer * target_layer",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "the last words of a row not copied (copy kernel)",
        COPY_PAGES,
        "(WORDS + BLOCK - 1) // BLOCK",
        "WORDS // BLOCK",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "pages of the target in the order of the source (torch form of the copy)",
        COPY_PAGES,
        "target[target_slots // page_size]",
        "target[target_slots.sort().values // page_size]",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "slots of the target taken as if they lay like those of the source (copy kernel)",
        COPY_PAGES,
        "page.to(tl.int64) * stride_target_slots",
        "page.to(tl.int64)",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "a run of pages that goes on where it ended (staged write)",
        COPY_PAGES,
        "pages[n] != pages[n - 1] + 1",
        "pages[n] < pages[n - 1]",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "every part of a write to the pages of the first (staged write)",
        COPY_PAGES,
        "at = pages[start + first]",
        "at = pages[first]",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "every part of a write from the pages of the first (staged write)",
        COPY_PAGES,
        "own = source_slots[some]",
        "own = source_slots[: len(source_slots[some])]",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "pages of any other size (copy kernel)",
        COPY_PAGES,
        "PAGE=page_size,",
        "PAGE=128,",
        (TEST_COPY_PAGES,),
    ),
    Mutation(
        "stream of the forward pass not handed to the pool",
        BACKEND,
        'pool.forward_stream = getattr(model_runner, "forward_stream", None)',
        "pool.forward_stream = None",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "pages of a storage taken without their headers",
        HOST_POOL,
        "& 0xF == self._header).all()",
        "& 0xF == self._header).any()",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "keys of a storage without the balance of channels",
        HOST_POOL,
        "-{dtype}-{pool.balance_tag()}",
        "-{dtype}",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "no hash of the factors for the keys of a storage",
        BACKEND,
        "partial(balanced_layers.fingerprint, model_runner.model)",
        "str",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "any storage attached to a running server",
        REFUSALS,
        "elif recv_req.hicache_storage_backend not in _STORAGES:",
        "elif False:",
        (_ATTACH,),
    ),
    Mutation(
        "a storage without salts in its keys attached to a running server",
        REFUSALS,
        """    if not compat.salts_storage_keys():
        why""",
        """    if False:
        why""",
        (_ATTACH,),
    ),
    Mutation(
        "keys of a storage without the preset",
        HOST_POOL,
        "{pool.config.name}-v{tile.VERSION}",
        "v{tile.VERSION}",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "factors of values left out of what keys of a storage name",
        BALANCED_LAYERS,
        "for part in (chosen.keys, chosen.values, chosen.output_bias):",
        "for part in (chosen.keys, chosen.output_bias):",
        (TEST_BALANCED_LAYERS,),
    ),
    Mutation(
        "the page behind it written to a file",
        HOST_POOL,
        "page = self.kv_buffer[int(index) // self.page_size]",
        "page = self.kv_buffer[(int(index) // self.page_size + 1) % self.page_num]",
        (_FILES,),
    ),
    Mutation(
        "a file read into the page before it",
        HOST_POOL,
        "self.kv_buffer[int(index) // self.page_size] = page",
        "self.kv_buffer[int(index) // self.page_size - 1] = page",
        (_FILES,),
    ),
    Mutation(
        "headers of pages from files not looked at",
        HOST_POOL,
        "if not bool((page[:,",
        "if False and not bool((page[:,",
        (_DAMAGED,),
    ),
    Mutation(
        "size of pages from a storage not looked at",
        HOST_POOL,
        "if data_page.numel() != self.page_bytes:",
        "if False:",
        (TEST_HOST_POOL,),
    ),
    Mutation(
        "files of any preset in one (worlds)",
        HOST_POOL,
        "{pool.config.name}-v{tile.VERSION}",
        "v{tile.VERSION}",
        (_FOREIGN,),
    ),
    Mutation(
        "files of any balance of channels in one (worlds)",
        HOST_POOL,
        "-{dtype}-{pool.balance_tag()}",
        "-{dtype}",
        (_FOREIGN,),
    ),
)
