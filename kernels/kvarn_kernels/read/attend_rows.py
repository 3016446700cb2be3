# SPDX-License-Identifier: Apache-2.0
"""What the sources that include read/attend_rows.cuh are compiled with, and what their blocks take of a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.device.wgmma import product_operands
from kvarn_kernels.record.cuda_constants import format_constants

HEAD_DIMS = (64, 128)
# buffers of a block: of records, and of the keys and values of tiles
STAGES, BUFFERS = 3, 2
# bytes of shared memory of a block that the driver keeps, and of its tables besides those of rows and exact tokens
RESERVED_BYTES, TABLE_BYTES = 1024, 384


@dataclass(frozen=True)
class Warps:
    """Say how the warpgroups of a block share its work.

    Attributes:
        rows: of a block, 64 for each warpgroup that attends, besides the two that write.
        writer_registers, reader_registers: of a thread that writes, and of one that attends.
    """

    rows: int
    writer_registers: int
    reader_registers: int

    @property
    def threads(self) -> int:
        """Threads of a block."""
        return 256 + 2 * self.rows


def table_bytes(rows: int, head_dim: int) -> int:
    """Return the bytes of the tables of a block."""
    # addresses of the exact keys of a tile and of its values
    return 4 * rows + 2 * 8 * head_dim + TABLE_BYTES


def row_constants(
    warps: Warps, config: KVarNConfig, head_dim: int, num_kv_heads: int, group: int, is_bf16: bool, ring_pages: int
) -> dict[str, Any]:
    """Return the constants of read/attend_rows.cuh; group: query heads of a KV head."""
    shared = format_constants((config.k_bits, config.v_bits), head_dim, num_kv_heads, is_bf16, ring_pages)
    return shared | {
        "GROUP": group,
        "WINDOW": config.window_pages,
        "BLOCK_ROWS": warps.rows,
        # tokens of a tile, channels of a head
        "BLOCK_COLUMNS": head_dim,
        "THREADS": warps.threads,
        "STAGES": STAGES,
        "BUFFERS": BUFFERS,
        "BUFFER": shared["RECORD"],
        # fp16: queries, keys and values
        "SHARED_BYTES": STAGES * shared["RECORD"] + 2 * head_dim * (warps.rows + 2 * BUFFERS * head_dim),
        "WRITER_REGISTERS": warps.writer_registers,
        "READER_REGISTERS": warps.reader_registers,
        **product_operands(head_dim),
    }
