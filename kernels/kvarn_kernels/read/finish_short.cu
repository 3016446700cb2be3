// SPDX-License-Identifier: Apache-2.0
// What follows the attention of a short extend step, for sm_90: results of splits are merged and rotated back, and the
// newest tokens are stored in the rings, which the attention and the encoder read before. A warp has a row of D channels.
// The constants in capitals that are not set here come from finish_short.py.

#include "device/early_start.cuh"
#include "record/hadamard.cuh"
#include "write/ring_row.cuh"

constexpr int LOADS = 4;  // of results, that are on their way together
constexpr int SINKS_FLOAT = 1, SINKS_BF16 = 2;  // SINKS: what attention sinks are, 3 in fp16, 0 where there are none
#define MINUS_INF __int_as_float(0xff800000)

// all lanes get it
__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, n));
  return x;
}
__device__ __forceinline__ float sum_of_warp(float x) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) x += __shfl_xor_sync(0xffffffffu, x, n);
  return x;
}

// the attention sink of a query head, of base 2
__device__ __forceinline__ float sink_of(const void* sinks, int head) {
  const float log2_e = 1.4426950408889634f;
  if (SINKS == SINKS_FLOAT) return ((const float*)sinks)[head] * log2_e;
  const u32 x = ((const unsigned short*)sinks)[head];
  return (SINKS == SINKS_BF16 ? __int_as_float(x << 16) : low_half(x)) * log2_e;
}

// A row, a query head of a token: results [T, splits, HQ, D], lse [T, splits, HQ] of base 2, -inf where there is none;
// out [T, HQ, D]. There are at most 32 splits, a lane has the weight of one.
__device__ __forceinline__ void merge_row(long long row, int splits, int lane, const float* __restrict__ results,
                                          const float* __restrict__ lse, const void* __restrict__ sinks,
                                          u32* __restrict__ out) {
  const int head = row % HQ;
  const long long first = row / HQ * splits * HQ + head;  // the row of the first split
  const float mine = lane < splits ? lse[first + (long long)lane * HQ] : MINUS_INF;
  float largest = largest_of_warp(mine);
  if (largest == MINUS_INF) largest = 0.f;
  const float weight = exp2_fast(mine - largest);
  float total = sum_of_warp(weight);
  if (SINKS) total += exp2_fast(sink_of(sinks, head) - largest);
  float x[ROW_CHANNELS] = {};
  for (int begin = 0; begin < splits; begin += LOADS) {
    float loaded[LOADS][ROW_CHANNELS];
#pragma unroll
    for (int n = 0; n < LOADS; n++) {
      const float* from = results + (first + (long long)min(begin + n, splits - 1) * HQ) * D + ROW_CHANNELS * lane;
#pragma unroll
      for (int i = 0; i < ROW_CHANNELS; i += 2) {
        const float2 pair = *(const float2*)(from + i);
        loaded[n][i] = pair.x, loaded[n][i + 1] = pair.y;
      }
    }
#pragma unroll
    for (int n = 0; n < LOADS; n++) {
      // of splits that are not there 0
      const float share = __shfl_sync(0xffffffffu, weight, (begin + n) % 32);
#pragma unroll
      for (int i = 0; i < ROW_CHANNELS; i++) x[i] = fmaf(loaded[n][i], share, x[i]);
    }
  }
  const float factor = total == 0.f ? 0.f : 1.f / total;
#pragma unroll
  for (int i = 0; i < ROW_CHANNELS; i++) x[i] *= factor;
  rotate(x, lane);
#pragma unroll
  for (int i = 0; i < ROW_CHANNELS; i += 2)
    out[row * ROW_WORDS + (ROW_CHANNELS * lane + i) / 2] = model_pair(x[i], x[i + 1]);
}

// Rows of all tokens, then `newest` tokens of each request, the newest first, of each KV head.
extern "C" __global__ void __launch_bounds__(32 * WARPS)
kvarn_finish_short(const float* __restrict__ results, const float* __restrict__ lse, const u8* __restrict__ sinks,
                   u32* __restrict__ out, const u32* __restrict__ k, const u32* __restrict__ v,
                   u8* __restrict__ records, const int* __restrict__ ring_pages, const int* __restrict__ prefix_lens,
                   const int* __restrict__ seq_lens, const int* __restrict__ qo_indptr, int splits, int rows,
                   int newest, int requests) {
  const int lane = threadIdx.x % 32;
  const long long unit = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  wait_for_previous();
  if (unit < rows) {
    merge_row(unit, splits, lane, results, lse, sinks, out);
    return;
  }
  const long long token = (unit - rows) / HK;
  if (token >= (long long)requests * newest) return;
  store_token(token / newest, (unit - rows) % HK, token % newest, lane, k, v, records, ring_pages, prefix_lens, seq_lens,
              qo_indptr);
}
