// SPDX-License-Identifier: Apache-2.0
// The rotation of single rows: a warp holds a row of D channels, a lane ROW_CHANNELS of them, one after the other. Needs D,
// BF16 and ROTATION_SCALE, 1 / sqrt(D).

#include "device/fragments.cuh"

constexpr int ROW_CHANNELS = D / 32;

// a pair in the model's dtype
__device__ __forceinline__ u32 model_pair(float low, float high) {
  return BF16 ? pack_bf16(low, high) : pack_half(low, high);
}

// x = x H, in float32
__device__ __forceinline__ void rotate(float (&x)[ROW_CHANNELS], int lane) {
#pragma unroll
  for (int bit = 1; bit < ROW_CHANNELS; bit *= 2)
#pragma unroll
    for (int n = 0; n < ROW_CHANNELS; n++)
      if (!(n & bit)) {
        const float difference = x[n] - x[n | bit];
        x[n] += x[n | bit];
        x[n | bit] = difference;
      }
#pragma unroll
  for (int bit = 1; bit < 32; bit *= 2)
#pragma unroll
    for (int n = 0; n < ROW_CHANNELS; n++) {
      const float other = __shfl_xor_sync(0xffffffffu, x[n], bit);
      x[n] = lane & bit ? other - x[n] : x[n] + other;
    }
#pragma unroll
  for (int n = 0; n < ROW_CHANNELS; n++) x[n] *= ROTATION_SCALE;
}

// x = row H of a row in the model's dtype
__device__ __forceinline__ void rotate_row(float (&x)[ROW_CHANNELS], const u32* row, int lane) {
#pragma unroll
  for (int n = 0; n < ROW_CHANNELS; n += 2) {
    const u32 pair = row[(ROW_CHANNELS * lane + n) / 2];
    x[n] = BF16 ? __int_as_float(pair << 16) : low_half(pair);
    x[n + 1] = BF16 ? __int_as_float(pair & 0xFFFF0000u) : high_half(pair);
  }
  rotate(x, lane);
}
