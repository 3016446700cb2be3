// SPDX-License-Identifier: Apache-2.0
// The PTX of device/ptx.cuh as C++, beside cuda_on_cpu.h: bulk copies land late and in any order, a buffer holds NaN
// until then, and a barrier phase is only known as odd or even, as on the device.
#pragma once
#include <cassert>
#include <map>

alignas(128) static u8 dynamic_shared[1 << 18];
#define DYNAMIC_SHARED(name) u8* name = dynamic_shared

inline void fail(const char* what) {
  failure = "thread " + std::to_string(threadIdx.x) + " " + what;
  yield();
}

struct Phase {
  unsigned number = 0;  // phases completed
  bool armed = false, emptied = false;
  int bytes = 0;        // to come
  int size = 1, arrived = 0;
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

inline void mbarrier_init(u64* bar, int arrivals = 1) {
  phases[bar] = Phase();
  phases[bar].size = arrivals;
}

inline void arrive(u64* bar) {
  Phase& phase = phases[bar];
  if (++phase.arrived < phase.size) return;
  phase.arrived = 0;
  phase.number++;
}

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
inline void sts16(u32 a, u32 v) { store_shared(a, (unsigned short)v); }
inline u32 lds32(u32 a) { return load_shared<u32>(a); }
inline float lds_half(u32 a) { return from_half(load_shared<unsigned short>(a)); }

inline void __threadfence_block() {}
inline void fence_init() {}
