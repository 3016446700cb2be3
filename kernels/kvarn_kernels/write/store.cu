// SPDX-License-Identifier: Apache-2.0
// Store the newest tokens of a chunk in the rings, for sm_80 and newer; the contract of store.py. The constants in
// capitals that are not set here come from chunk_cuda.py.

#include "write/ring_row.cuh"

// one warp for each new token that its ring has room for and each KV head, the newest first
extern "C" __global__ void __launch_bounds__(32 * WARPS)
kvarn_store_chunk(const u32* __restrict__ k, const u32* __restrict__ v, u8* __restrict__ records,
                  const int* __restrict__ ring_pages, const int* __restrict__ prefix_lens,
                  const int* __restrict__ seq_lens, const int* __restrict__ qo_indptr) {
  const int back = blockIdx.y * WARPS + threadIdx.x / 32;
  store_token(blockIdx.x, blockIdx.z, back, threadIdx.x % 32, k, v, records, ring_pages, prefix_lens, seq_lens,
              qo_indptr);
}
