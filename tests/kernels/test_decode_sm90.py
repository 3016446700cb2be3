# SPDX-License-Identifier: Apache-2.0
"""The CUDA form of decode: compiled by NVRTC without a GPU, every format, next to nothing in local memory.

Its results are tested where it runs: `test_decode.py` and `test_graph.py` on a GPU of capability 9.0 or later.
"""

from dataclasses import replace

import pytest
from cubin import compiled, registers_and_stack
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device import nvrtc
from kvarn_kernels.device.gpu import H100
from kvarn_kernels.read import decode_sm90
from kvarn_kernels.record import tile

# preset, head_dim, KV heads, query heads per KV head, bfloat16
FORMS = [
    ("kvarn", 128, 8, 4, True),
    ("kvarn", 128, 8, 4, False),
    ("kvarn_canonical", 128, 4, 7, True),
    ("kvarn", 64, 3, 3, False),
    ("kvarn", 256, 1, 8, True),
    ("kvarn_k4v4_g128", 128, 8, 4, True),
    ("kvarn_k4v4_g128", 64, 2, 1, True),
    ("kvarn_k4v3_g128", 128, 8, 4, True),
    ("kvarn_k4v3_g128", 64, 3, 3, False),
    ("kvarn_k4v3_g128", 256, 1, 8, True),
    ("kvarn_k3v2_g128", 128, 8, 4, True),
    ("kvarn_k3v2_g128", 64, 3, 3, False),
    ("kvarn_k3v2_g128", 256, 1, 8, True),
    ("kvarn_k2v2_g128", 128, 8, 12, True),
    ("kvarn_k2v2_g128", 64, 8, 6, True),
    ("kvarn_k2v2_g128", 256, 2, 4, True),
]


def code_of(form: tuple, capability: str, drafts: int = 1, sliding_window: int = 0) -> bytes:
    preset, *rest = form
    config = KVarNConfig.from_preset(preset)
    defines = decode_sm90.constants(config, *rest, config.ring_pages(rest[0], 2, drafts), drafts, sliding_window)
    return compiled(nvrtc.source(decode_sm90.SOURCE, defines), "kvarn_decode", capability)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(str(x) for x in form))
def test_decode_sm90_compiles_into_registers(form, tmp_path):
    registers, stack = registers_and_stack(code_of(form, "90"), tmp_path)
    blocks = decode_sm90.MIN_BLOCKS[form[1], decode_sm90.column_tiles(form[1], form[3], 1)]
    # at 128 registers two values of the prologue may be spilled; the loop over tiles has none to spare for more
    assert registers * decode_sm90.THREADS * blocks <= 65536 and stack <= 16, (registers, stack)


@pytest.mark.parametrize("form", [*FORMS[:1], *FORMS[3:5], FORMS[8]], ids=lambda form: "-".join(str(x) for x in form))
def test_decode_in_a_sliding_window_compiles_into_registers(form, tmp_path):
    registers, stack = registers_and_stack(code_of(form, "90", sliding_window=1024), tmp_path)
    blocks = decode_sm90.MIN_BLOCKS[form[1], decode_sm90.column_tiles(form[1], form[3], 1)]
    # the oldest token that a column sees takes a few registers more
    assert registers * decode_sm90.THREADS * blocks <= 65536 and stack <= 48, (registers, stack)


@pytest.mark.parametrize("drafts", [4, 8])
@pytest.mark.parametrize("form", FORMS[:1] + FORMS[3:8] + FORMS[-3:], ids=lambda form: "-".join(str(x) for x in form))
def test_verify_compiles_into_registers(form, drafts, tmp_path):
    registers, stack = registers_and_stack(code_of(form, "90", drafts), tmp_path)
    blocks = decode_sm90.MIN_BLOCKS[form[1], decode_sm90.column_tiles(form[1], form[3], drafts)]
    # what a column sees takes a few registers more
    assert registers * decode_sm90.THREADS * blocks <= 65536 and stack <= 48, (registers, stack)


def test_decode_sm90_compiles_for_blackwell():
    assert code_of(FORMS[0], "100")


@pytest.mark.parametrize("preset", sorted({preset for preset, *_ in FORMS} - {"kvarn_canonical"}))
@pytest.mark.parametrize(("head_dim", "tiles"), list(decode_sm90.MIN_BLOCKS))
def test_decode_sm90_fits_the_shared_memory_of_an_h100(preset, head_dim, tiles):
    config, drafts = KVarNConfig.from_preset(preset), 4 * tiles - 3
    defines = decode_sm90.constants(config, head_dim, 8, 4, True, config.ring_pages(head_dim, 2, drafts), drafts)
    # 227 KiB for all resident blocks of a multiprocessor, 1 KiB of each is reserved
    assert defines["COLUMN_TILES"] == tiles
    assert (decode_sm90.shared_bytes(defines) + 2048) * decode_sm90.MIN_BLOCKS[head_dim, tiles] <= 228 * 1024
    assert defines["RECORD"] % 16 == 0 and defines["RECORD"] == tile.record_bytes(
        head_dim, config.k_bits, config.v_bits
    )


# compute capability, KiB of shared memory of a multiprocessor (CUDA C programming guide, table of capabilities)
@pytest.mark.parametrize(
    ("capability", "shared", "serves"),
    [((8, 0), 164, False), ((8, 9), 100, False), ((9, 0), 228, True), ((10, 0), 228, True), ((12, 0), 100, False)],
    ids=str,
)
def test_decode_sm90_serves_gpus_with_the_shared_memory_that_it_plans_with(capability, shared, serves):
    sizes = {"shared_memory": (shared - 1) << 10, "shared_of_multiprocessor": shared << 10}
    assert decode_sm90.runs_on(replace(H100, capability=capability, **sizes)) is serves
