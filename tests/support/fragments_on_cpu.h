// SPDX-License-Identifier: Apache-2.0
// The PTX of device/fragments.cuh as C++, beside cuda_on_cpu.h.
#pragma once

template <u32 MASK>
inline u32 and_or(u32 x, u32 y) { return (x & MASK) | y; }
inline float low_half(u32 x) { return from_half(x & 0xFFFF); }
inline float high_half(u32 x) { return from_half(x >> 16); }
inline u32 pack_half(float low, float high) { return to_half(low) | (u32)to_half(high) << 16; }
inline u32 to_bf16(float f) {
  u32 x = __float_as_int(f);
  return f != f ? 0x7FFF : (x + 0x7FFF + (x >> 16 & 1)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return to_bf16(low) | to_bf16(high) << 16; }
inline u32 multiply_half(u32 a, u32 b) {
  return pack_half(low_half(a) * low_half(b), high_half(a) * high_half(b));
}
inline u32 add_half(u32 a, u32 b) { return pack_half(low_half(a) + low_half(b), high_half(a) + high_half(b)); }
inline u32 max_half(u32 a, u32 b) {
  return pack_half(std::fmax(low_half(a), low_half(b)), std::fmax(high_half(a), high_half(b)));
}
// a product of two fp16 numbers and its sum with a third fit a double
inline u32 fma_half(u32 a, u32 b, u32 c) {
  auto one = [](double x, double y, double z) { return (float)(x * y + z); };
  return pack_half(one(low_half(a), low_half(b), low_half(c)), one(high_half(a), high_half(b), high_half(c)));
}
inline float exp2_fast(float x) { return std::exp2(x); }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 bytes = (u64)y << 32 | x;
  u32 result = 0;
  for (int n = 0; n < 4; n++) result |= (u32)(bytes >> 8 * (selector >> 4 * n & 7) & 0xFF) << 8 * n;
  return result;
}

// registers of all lanes of a warp, two sets used in turn
inline u32 lanes[32][2][32][6];

// every lane's registers
template <int N>
u32 (&gather(const u32 (&mine)[N]))[32][6] {
  const int warp = threadIdx.x / 32;
  u32(&set)[32][6] = lanes[warp][block->warps[warp].generation % 2];
  for (int n = 0; n < N; n++) set[threadIdx.x % 32][n] = mine[n];
  wait(block->warps[warp]);
  return set;
}

inline u32 transpose(u32 x) {
  const u32 mine[1] = {x};
  const auto& all = gather(mine);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  auto element = [&](int row) { return all[4 * row + g / 2][0] >> 16 * (g % 2) & 0xFFFF; };
  return element(2 * q) | element(2 * q + 1) << 16;
}

template <bool IS_BF16>
void mma(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  const u32 mine[6] = {a0, a1, a2, a3, b0, b1};
  const auto& all = gather(mine);
  const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  auto value = [&](int owner, int reg, int k) {
    const u32 half = all[owner][reg] >> 16 * (k % 2) & 0xFFFF;
    return IS_BF16 ? __int_as_float(half << 16) : from_half(half);
  };
  for (int n = 0; n < 4; n++) {
    const int lower = n / 2, column = 2 * q + n % 2;
    float sum = c[n];
    for (int k = 0; k < 16; k++)
      sum += value(4 * g + k % 8 / 2, lower + 2 * (k / 8), k) * value(4 * column + k % 8 / 2, 4 + k / 8, k);
    d[n] = sum;
  }
}
inline void mma_half(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma<false>(c, a0, a1, a2, a3, b0, b1, c);
}
inline void mma_half(float (&d)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1, const float (&c)[4]) {
  mma<false>(d, a0, a1, a2, a3, b0, b1, c);
}
inline void mma_exact(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  mma<BF16>(c, a0, a1, a2, a3, b0, b1, c);
}
