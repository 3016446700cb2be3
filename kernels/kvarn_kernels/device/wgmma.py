# SPDX-License-Identifier: Apache-2.0
"""What the sources that include device/wgmma.cuh are compiled with."""

from __future__ import annotations

# products of a warpgroup exist on capability 9.0 alone
CAPABILITY, ARCHITECTURE = (9, 0), "90a"


def product_operands(columns: int) -> dict[str, str]:
    """Return the operands of the instruction for so many columns: its sums, then 4 registers, a descriptor, a flag.

    Those of SHARED have a descriptor in the place of the registers.
    """
    sums = columns // 2
    return {
        "WGMMA_SHAPE": f'"m64n{columns}k16"',
        "WGMMA_SUMS": '"{' + ",".join(f"%{n}" for n in range(sums)) + '}"',
        "WGMMA_A": '"{' + ",".join(f"%{sums + n}" for n in range(4)) + '}"',
        "WGMMA_B": f'"%{sums + 4}"',
        "WGMMA_ADD": f'"%{sums + 5}"',
        "WGMMA_SHARED_A": f'"%{sums}"',
        "WGMMA_SHARED_B": f'"%{sums + 1}"',
        "WGMMA_SHARED_ADD": f'"%{sums + 2}"',
        "WGMMA_OUTPUTS": ", ".join(f'"+f"(d[{n}])' for n in range(sums)),
    }
