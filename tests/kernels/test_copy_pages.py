# SPDX-License-Identifier: Apache-2.0
"""Copies of pages between device and host: bytes, the pages that are named and no others."""

import pytest
import torch
from builders import DEVICE
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.transfer.copy_pages import StagedWrite, copy_pages, copy_pages_by_torch

FORMS = {"triton": copy_pages, "torch": copy_pages_by_torch}
if torch.cuda.is_available():
    del FORMS["torch"]
LAYERS, DEVICE_PAGES, HOST_PAGES = 3, 7, 11


def memory(row_bytes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random device memory, [P, L, row] of a slab whose layers are apart, and host memory of whole pages."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randint(256, (DEVICE_PAGES + HOST_PAGES, LAYERS, row_bytes), generator=generator, dtype=torch.uint8)
    device = draw[:DEVICE_PAGES].transpose(0, 1).contiguous().to(DEVICE).transpose(0, 1)
    host = draw[DEVICE_PAGES:].clone()
    return device, host.pin_memory() if DEVICE.type == "cuda" else host


def slots(*pages: int, page_size: int = 128, place: int = 0) -> torch.Tensor:
    """Return of each page the slot at a place, a view of all slots of the pages."""
    ids = torch.tensor(pages, dtype=torch.int64, device=DEVICE)
    return (ids[:, None] * page_size + torch.arange(page_size, device=DEVICE)).flatten()[place::page_size]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("preset", ["kvarn", "kvarn_k4v3_g128", "kvarn_k2v2_g128"])
@pytest.mark.parametrize(("head_dim", "heads"), [(64, 1), (128, 2), (256, 1)])
def test_named_pages_are_copied_both_ways_and_no_others(form, preset, head_dim, heads):
    row_bytes = heads * KVarNConfig.from_preset(preset).record_bytes(head_dim)
    device, host = memory(row_bytes, seed=head_dim)
    before_device, before_host = device.clone(), host.clone()
    form(device, host, slots(5, 0, 3), slots(10, 2, 0), 128)
    form(host[:, 1:2], device[:, 1:2], slots(4, 2), slots(6, 1), 128)
    expected_host = before_host.clone()
    expected_host[[10, 2, 0]] = before_device[[5, 0, 3]].cpu()
    assert torch.equal(host, expected_host)
    expected_device = before_device.clone()
    # by layer; page 2 of the host holds what was page 0
    expected_device[[6, 1], 1] = expected_host[[4, 2], 1].to(DEVICE)
    assert torch.equal(device, expected_device)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(("page_size", "places"), [(128, (0, 0)), (128, (127, 64)), (1, (0, 0)), (96, (95, 1))])
def test_any_slot_of_a_page_names_it(form, page_size, places):
    device, host = memory(64, seed=2)
    expected = host.clone()
    expected[[1, 9]] = device[[6, 2]].cpu()
    source, target = (
        slots(*pages, page_size=page_size, place=place) for pages, place in zip([(6, 2), (1, 9)], places, strict=True)
    )
    form(device, host, source, target, page_size)
    assert torch.equal(host, expected)
    # contiguous, as they come from another device
    host[[1, 9]] = 0
    form(device, host, source.clone(), target.clone(), page_size)
    assert torch.equal(host, expected)


@pytest.mark.parametrize("room", [1, 2, 3, 9])
@pytest.mark.parametrize(
    "targets", [(10, 2, 0), (4, 5, 6), (0, 1, 9), (8, 2, 3), (3, 2, 1), (7,), ()], ids=lambda pages: str(pages)
)
def test_staged_writes_copy_the_named_pages_whatever_fits(room, targets):
    row_bytes = 48
    device, host = memory(row_bytes, seed=room)
    expected, sources = host.clone(), (5, 0, 3)[: len(targets)]
    if targets:
        expected[list(targets)] = device[list(sources)].cpu()
    write = StagedWrite(LAYERS, row_bytes, DEVICE, staging_bytes=room * LAYERS * row_bytes + 1)
    write(device, host, slots(*sources), slots(*targets, place=5).cpu(), 128)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host, expected)


def test_staged_writes_need_room_for_one_page_at_least():
    device, host = memory(64, seed=3)
    before = device.cpu()
    write = StagedWrite(LAYERS, 64, DEVICE, staging_bytes=1)
    write(device, host, slots(1, 4), slots(8, 9).cpu(), 128)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.equal(host[[8, 9]], before[[1, 4]])


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_nothing_is_copied_where_no_page_is_named(form):
    device, host = memory(64, seed=1)
    before = host.clone()
    form(device, host, slots(), slots(), 128)
    assert torch.equal(host, before)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        ((2, 3, 64), (2, 3, 48), r"rows of one size, got \(3, 64\) and \(3, 48\)"),
        ((2, 3, 40), (2, 3, 40), "multiples of 16 bytes, got 40 with"),
    ],
)
def test_rows_that_do_not_fit_are_refused(form, source, target, message):
    source, target = (torch.zeros(size, dtype=torch.uint8, device=DEVICE) for size in (source, target))
    with pytest.raises(ValueError, match=message):
        form(source, target, slots(0), slots(1), 128)
