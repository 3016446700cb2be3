// SPDX-License-Identifier: Apache-2.0
// The PTX of device/fragments.cuh as C++, beside cuda_on_cpu.h.
#pragma once

inline float half_to_float(u16 h) { return from_half(h); }
inline u32 pack_half(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
inline u32 to_bf16(float f) {
  u32 x = __float_as_int(f);
  return f != f ? 0x7FFF : (x + 0x7FFF + (x >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline u32 add_half(u32 a, u32 b) {
  return pack_half(from_half(a) + from_half(b), from_half(a >> 16) + from_half(b >> 16));
}
// a product of two fp16 numbers and its sum with a third fit a double
inline u32 fma_half(u32 a, u32 b, u32 c) {
  auto one = [](double x, double y, double z) { return to_half((float)(x * y + z)); };
  return one(from_half(a), from_half(b), from_half(c)) |
         (u32)one(from_half(a >> 16), from_half(b >> 16), from_half(c >> 16)) << 16;
}
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  u32 result = 0;
  for (int n = 0; n < 4; n++) result |= (u32)(bytes >> 8 * (selector >> 4 * n & 7) & 0xFF) << 8 * n;
  return result;
}

// registers of all lanes of a warp, two sets used in turn
inline u32 lanes[32][2][32][6];

inline void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  u32(&all)[32][6] = lanes[warp][block->warps[warp].generation % 2];
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  std::memcpy(all[lane], mine, sizeof(mine));
  wait(block->warps[warp]);
  auto value = [&](int owner, int reg, int k) { return from_half(all[owner][reg] >> 16 * (k % 2)); };
  for (int n = 0; n < 4; n++) {
    const int lower = n / 2, column = 2 * q + n % 2;
    for (int k = 0; k < 16; k++)
      c[n] += value(4 * g + k % 8 / 2, lower + 2 * (k / 8), k) * value(4 * column + k % 8 / 2, 4 + k / 8, k);
  }
}
