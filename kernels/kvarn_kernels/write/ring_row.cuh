// SPDX-License-Identifier: Apache-2.0
// Where an extend step stores its newest tokens: rows of rings, D keys and D values of the model's dtype.

#include "device/fragments.cuh"

constexpr int ROW_WORDS = D / 2;

// A warp copies the token that comes `back` tokens before the last one of a request, of a KV head, if it is new and the
// ring has room for it; k and v [T, HK, D].
__device__ __forceinline__ void store_token(int request, int head, int back, int lane, const u32* __restrict__ k,
                                            const u32* __restrict__ v, u8* __restrict__ records,
                                            const int* __restrict__ ring_pages, const int* __restrict__ prefix_lens,
                                            const int* __restrict__ seq_lens, const int* __restrict__ qo_indptr) {
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
