// SPDX-License-Identifier: Apache-2.0
// The PTX of decode_sm90.cu as C++, beside cuda_on_cpu.h: bulk copies land late and in any order, a buffer holds NaN
// until then, and a barrier phase is only known as odd or even, as on the device.
#pragma once
#include <cassert>
#include <map>

alignas(128) static u8 dynamic_shared[1 << 18];

inline void fail(const char* what) {
  failure = "thread " + std::to_string(threadIdx.x) + " " + what;
  yield();
}

struct Phase {
  unsigned number = 0;  // phases completed
  bool armed = false, emptied = false;
  int bytes = 0;        // to come
};
struct Copy {
  u8* target;
  const u8* source;
  int bytes;
  u64* barrier;
  int due;
};
inline std::map<u64*, Phase> phases;
inline std::vector<Copy> copies;
inline std::mt19937 delays;

inline void land() {
  for (size_t n = 0; n < copies.size();) {
    Copy& copy = copies[n];
    if (copy.due-- > 0) {
      n++;
      continue;
    }
    std::memcpy(copy.target, copy.source, copy.bytes);
    Phase& phase = phases[copy.barrier];
    phase.bytes -= copy.bytes;
    if (phase.armed && phase.bytes == 0) {
      phase.armed = phase.emptied = false;
      phase.number++;
    }
    copies.erase(copies.begin() + n);
  }
}

inline void mbarrier_init(u64* bar) { phases[bar] = Phase(); }

inline void mbarrier_wait(u64* bar, u32 parity) {
  for (int n = 0; phases[bar].number % 2 == parity; n++) {
    if (n > 100000) fail("waits for a record for ever");
    land();
    yield();
  }
}

inline void expect(u64* bar, int bytes) {
  Phase& phase = phases[bar];
  if (phase.armed) fail("orders a record into a buffer that waits for another");
  phase.armed = true;
  phase.bytes += bytes;
}

// the first copy of a phase empties its buffer
inline void copy(u8* target, const u8* source, int bytes, u64* bar) {
  Phase& phase = phases[bar];
  if (!phase.armed) fail("copies what nobody waits for");
  assert(bytes % 16 == 0);
  if (!phase.emptied) {
    const int before = (target - dynamic_shared) % BUFFER;
    std::memset(target - before, 0xFF, BUFFER);  // the whole buffer
    phase.emptied = true;
  }
  copies.push_back({target, source, bytes, bar, schedule_seed ? (int)(delays() % 3000) : 0});
}

inline u32 shared_address(const void* p) { return (u32)((const u8*)p - dynamic_shared); }
template <class T>
T load_shared(u32 a) { T v; std::memcpy(&v, dynamic_shared + a, sizeof(T)); return v; }
inline uint4 lds128(u32 a) { assert(a % 16 == 0); return load_shared<uint4>(a); }
inline uint2 lds64(u32 a) { assert(a % 8 == 0); return load_shared<uint2>(a); }
// called with what a thread has stored to shared memory
inline void (*stored)(u32 address, int bytes) = nullptr;
template <class T>
void store_shared(u32 a, T v) {
  assert(a % sizeof(T) == 0);
  std::memcpy(dynamic_shared + a, &v, sizeof(T));
  if (stored) stored(a, sizeof(T));
}
inline void sts128(u32 a, uint4 v) { store_shared(a, v); }
inline void sts32(u32 a, u32 v) { store_shared(a, v); }
inline u32 lds32(u32 a) { return load_shared<u32>(a); }
inline float lds_half(u32 a) { return from_half(load_shared<unsigned short>(a)); }

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
inline float exp2_fast(float x) { return std::exp2(x); }
inline u32 __byte_perm(u32 x, u32 y, u32 selector) {
  const u64 bytes = (u64)y << 32 | x;
  u32 result = 0;
  for (int n = 0; n < 4; n++) result |= (u32)(bytes >> 8 * (selector >> 4 * n & 7) & 0xFF) << 8 * n;
  return result;
}
inline void __threadfence_block() {}
inline void fence_init() {}

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
