// SPDX-License-Identifier: Apache-2.0
// Store the newest tokens of a chunk in the rings, for sm_80 and newer; the contract of store.py. The constants in
// capitals that are not set here come from chunk_cuda.py.

#include "device/fragments.cuh"

constexpr int ROW_WORDS = D / 2;

// one warp for each new token that its ring has room for and each KV head, the newest first
extern "C" __global__ void __launch_bounds__(32 * WARPS)
kvarn_store_chunk(const u32* __restrict__ k, const u32* __restrict__ v, u8* __restrict__ records,
                  const int* __restrict__ ring_pages, const int* __restrict__ prefix_lens,
                  const int* __restrict__ seq_lens, const int* __restrict__ qo_indptr) {
  const int request = blockIdx.x, head = blockIdx.z, lane = threadIdx.x % 32;
  const int back = blockIdx.y * WARPS + threadIdx.x / 32;
  const int prefix_len = prefix_lens[request], position = seq_lens[request] - 1 - back;
  if (position < prefix_len || back >= RING_PAGES * RING_TOKENS) return;
  const long long row = ((long long)(qo_indptr[request] + position - prefix_len) * HK + head) * ROW_WORDS;
  const int page = ring_pages[request * RING_PAGES + position / RING_TOKENS % RING_PAGES];
  u32* to = (u32*)(records + ((long long)page * HK + head) * RECORD + position % RING_TOKENS * (4 * D));
  for (int n = lane; n < ROW_WORDS; n += 32) {
    to[n] = k[row + n];
    to[ROW_WORDS + n] = v[row + n];
  }
}
