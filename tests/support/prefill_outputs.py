# SPDX-License-Identifier: Apache-2.0
"""Attention layers of extend steps as behind SGLang's prefill graphs, which need a GPU: their output has a place."""

from __future__ import annotations

import functools

from sglang_kvarn import compat


def install() -> None:
    """Give every layer of an extend step a place for its output, and hand on what is there."""
    attention = compat.resolve("sglang.srt.layers.radix_attention.RadixAttention")
    forward = attention.forward

    @functools.wraps(forward)
    def in_place(self, q, k, v, forward_batch, *args, **kwargs):
        if not forward_batch.forward_mode.is_extend():
            return forward(self, q, k, v, forward_batch, *args, **kwargs)
        output = q.new_full((q.shape[0], self.tp_q_head_num * self.head_dim), float("nan"))
        forward_batch._attn_output = output
        try:
            result = forward(self, q, k, v, forward_batch, *args, **kwargs)
        finally:
            forward_batch._attn_output = None
        # another tensor would be copied
        assert result.data_ptr() == output.data_ptr(), "the output is where SGLang wants it"
        return output

    attention.forward = in_place
