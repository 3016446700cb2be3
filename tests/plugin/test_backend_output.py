# SPDX-License-Identifier: Apache-2.0
"""Where the output of an attention layer goes: to the tensor that a prefill graph reads it from, if that fits."""

from types import SimpleNamespace

import pytest
import torch
from sglang_kvarn import compat


@pytest.fixture(scope="module")
def output_of():
    from sglang_kvarn.backend import _output

    return _output


def test_the_tensor_of_a_prefill_graph_is_written_in_place(output_of):
    q, wanted = torch.ones(5, 4, 64), torch.full((5, 256), 7.0)
    out = output_of(q, 5, compat.attention_output(SimpleNamespace(_attn_output=wanted)))
    assert out.shape == q.shape and out.data_ptr() == wanted.data_ptr()


@pytest.mark.parametrize(
    "wanted",
    [
        None,
        torch.zeros(6, 256),
        torch.zeros(5, 256, dtype=torch.float16),
        torch.zeros(5, 512)[:, :256],
    ],
    ids=["none", "other tokens", "another dtype", "rows apart"],
)
def test_what_does_not_fit_is_not_written(output_of, wanted):
    q = torch.ones(5, 8, 64)[:, 4:]
    out = output_of(q, 5, wanted)
    assert out.shape == q.shape and out.is_contiguous()
    assert wanted is None or out.data_ptr() != wanted.data_ptr()


def test_rows_that_pad_a_step_are_zeros(output_of):
    wanted = torch.full((5, 256), 7.0)
    out = output_of(torch.ones(5, 4, 64), 3, wanted)
    assert out.eq(0).all() and wanted.eq(7).all()


def test_a_step_outside_of_graphs_wants_no_tensor():
    assert compat.attention_output(SimpleNamespace()) is None
