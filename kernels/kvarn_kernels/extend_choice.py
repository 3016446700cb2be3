# SPDX-License-Identifier: Apache-2.0
"""Who attends an extend step: one function, and the figures that its thresholds come from."""

from __future__ import annotations

from kvarn_kernels.batch import ExtendBatch
from kvarn_kernels.config import KVarNConfig
from kvarn_kernels.dense import paged_calls
from kvarn_kernels.device.gpu import Gpu
from kvarn_kernels.read import extend_sm90
from kvarn_kernels.record.tile import TILE_SIZE
from kvarn_kernels.shape import AttentionShape

# Triton reads records; so does extend_sm90.cu, for few tokens; a library reads what is written in 16 bits
RECORDS, SHORT, DENSE = "records", "short", "dense"

# One layer of 32/8 heads of 128 on H200s, us, with everything around the attention (rotation, encode, ring store), and
# FlashAttention 3 (FA3) alone on a bf16 cache; rows in benchmarks/results/prefill.csv.
#
#     new tokens x cached   Triton   dense by FA3   extend_sm90.cu   FA3 on bf16
#     32 x 2,048               102             43               22            22
#     32 x 8,064                               59               36            31
#     32 x 32,640              173            123               59            58
#     32 x 98,176                             323              131           128
#     64 x 32,640                             141               92            75
#     128 x 2,048              142             68               46            28
#     128 x 8,064              207             92               71            46
#     128 x 32,640             595            199              164           126
#     128 x 98,176           1,619            539              433           327
#     160 x 32,640                                             210
#     256 x 32,640                            324                            229
#     16 times 100 x 20,480                 2,034            1,464           979
#
# Of extend_sm90.cu every block of 128 rows, query heads for tokens, unpacks all records again, so it serves requests of
# few tokens: up to SHORT_BLOCKS, 128 tokens of the heads above, where dense steps catch up at about 160. It wants a
# prefix of SHORT_PAGES, which is not from a measurement: 32 tokens on 512 take 36 us. Partial results, of torch's
# allocator while a layer runs, take at most PARTIAL_BYTES.
SHORT_BLOCKS, SHORT_PAGES, PARTIAL_BYTES = 4, 8, 64 << 20
# Elsewhere a step of fewer than DENSE_TOKENS new tokens reads the records themselves, unless it is large: the time of
# the products grows with its work, that of the host does not. With FA3, new * cached tokens reach FA3_WORK. With
# FlashInfer, new * cached * query heads * head_dim reach DENSE_WORK; its wrappers cost the host more, and it cuts no
# contexts. The same on an H100 ("split" as in dense/segments.py):
#     128 on 8,192                      Triton 201 us      FlashInfer 209 us
#     128 on 32,768                            566 us                 654 us, split 372 us
#     128 on 98,304                            about 1,700 us         split 957 us
# The host needed 390 to 570 us a layer for Triton, about 600 for FlashInfer, and 1,020 to 1,280 us where it was split;
# a step waits for the slower of GPU and host, which meet at about 128 new tokens on 49,152.
DENSE_TOKENS, FA3_WORK, DENSE_WORK = 256, 1 << 18, 24 << 30


def extend_form(
    batch: ExtendBatch,
    shape: AttentionShape,
    config: KVarNConfig,
    gpu: Gpu,
    library: str,
    sliding_window: int = 0,
    *,
    has_short: bool,
) -> str:
    """Return RECORDS, SHORT or DENSE for a step.

    Args:
        library: who attends densely, one of `extend_dense.LIBRARIES`; empty where nobody does.
        sliding_window: tokens that a query of the layers reads, 0 for all.
        has_short: extend_sm90.cu runs on the GPU.
    """
    if has_short and not sliding_window and _is_short(batch, shape, config, gpu):
        return SHORT
    if not library:
        return RECORDS
    cached = max(batch.prefix_lens_host)
    pairs = batch.num_tokens * (min(cached, sliding_window) if sliding_window else cached)
    if library == paged_calls.FA3:
        is_large = pairs >= FA3_WORK
    else:
        is_large = pairs * shape.num_qo_heads * shape.head_dim >= DENSE_WORK
    return DENSE if batch.num_tokens >= DENSE_TOKENS or is_large else RECORDS


def _is_short(batch: ExtendBatch, shape: AttentionShape, config: KVarNConfig, gpu: Gpu) -> bool:
    blocks = extend_sm90.row_blocks(max(batch.new_tokens), shape.group)
    if blocks > SHORT_BLOCKS or max(batch.prefix_lens_host) // TILE_SIZE < SHORT_PAGES:
        return False
    is_small = extend_sm90.partial_bytes(batch, shape, config, gpu) <= PARTIAL_BYTES
    return is_small and extend_sm90.serves_step(batch, config)
