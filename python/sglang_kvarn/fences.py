# SPDX-License-Identifier: Apache-2.0
"""What copies wait for that run beside the forward pass. Hooks into SGLang's controllers of these copies.

    written out  A page enters the prefix cache when its last token is known, while the step that encodes it may still
                 run: the copy waits for the forward pass.
    loaded       A page that was freed may still be written by a step of its last owner, as a record or as a ring: the
                 copy waits for the forward pass; and a layer waits for its pages before it reads (`pool.layer_cache`).
    received     The same, where another server writes: it is told of pages once no step of their last owner can still
                 write to them. That server knows no stream of this one, so the scheduler waits.

The first two are HiCache. SGLang waits for the forward pass itself there from 0.5.23 on. In 0.5.16 a copy to the host
waits for an event that a decode graph records before it runs, and a copy from it for nothing.
"""

from __future__ import annotations

from typing import Any

from sglang_kvarn import rings


def _wait_for_forward(controller: Any, name: str) -> None:
    pool = controller.mem_pool_device
    if rings.of_pool(pool) is None or pool.forward_stream is None:
        return
    # from 0.5.23 on the streams are not the controller's
    if (stream := getattr(controller, name, None)) is not None:
        stream.wait_stream(pool.forward_stream)


def before_writing(controller: Any, *args: Any, **kwargs: Any) -> None:
    """Let pages be copied after the step that encodes them. Hook before ``HiCacheController.start_writing``."""
    _wait_for_forward(controller, "write_stream")


def before_loading(controller: Any, *args: Any, **kwargs: Any) -> None:
    """Let pages be overwritten after what may write them. Hook before ``HiCacheController.start_loading``."""
    _wait_for_forward(controller, "load_stream")


def before_receiving(queue: Any, *args: Any, **kwargs: Any) -> None:
    """Tell no sender of pages that a step may still write. Hook before ``DecodePreallocQueue._send_kv_metadata``."""
    records = rings.records_of(queue.token_to_kv_pool)
    if records is not None and records.slab.is_cuda:
        records.forward_stream.synchronize()
