// SPDX-License-Identifier: Apache-2.0
// Just enough of CUDA to run a kernel of this project as C++ in a test: each CUDA thread of a block is a coroutine,
// a shuffle or a barrier lets the others run until all have arrived.
#pragma once
#define CUDA_ON_CPU
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <ucontext.h>
#include <vector>

#define __device__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct Index { int x, y, z; };
struct uint2 { unsigned int x, y; };
struct int2 { int x, y; };
struct uint4 { unsigned int x, y, z, w; };
struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
inline int2 make_int2(int x, int y) { return {x, y}; }
inline uint2 make_uint2(unsigned int x, unsigned int y) { return {x, y}; }
inline uint4 make_uint4(unsigned int x, unsigned int y, unsigned int z, unsigned int w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline Index threadIdx, blockIdx, gridDim;

struct Barrier {
  int size, arrived = 0;
  unsigned generation = 0;
};

struct Block {
  std::vector<ucontext_t> threads;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  std::vector<uint64_t> slots;  // two per thread, used in turn
  std::vector<Barrier> warps;
  Barrier all;
  std::vector<Barrier> groups;  // of 128 threads, by the numbers of their barriers
  ucontext_t scheduler;
  std::function<void()> kernel;
  int any = 0;
};
// what a thread did that would hang or corrupt a GPU; ends the launch
inline std::string failure;
inline Block* block;
// 0: warps run in turn; else some of them stand still for a while, at random
inline unsigned schedule_seed = 0;

// a kernel that may still run when this one starts: what memory holds until a block waits for it, and from then on
struct Previous {
  uint8_t* memory;
  const uint8_t *before, *after;
  long bytes;
};
inline Previous previous{};
extern "C" __attribute__((used)) inline void start_beside(uint8_t* memory, const uint8_t* before, const uint8_t* after, long bytes) {
  previous = {memory, before, after, bytes};
}
inline void let_next_start() {}
inline void wait_for_previous() {
  if (previous.bytes) std::memcpy(previous.memory, previous.after, previous.bytes);
}

inline void yield() {
  const Index self = threadIdx;
  swapcontext(&block->threads[self.x], &block->scheduler);
  threadIdx = self;
}

inline void wait(Barrier& barrier) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == barrier.size) {
    barrier.arrived = 0;
    barrier.generation++;
    return;
  }
  for (int n = 0; barrier.generation == generation; n++) {
    if (n > 1000000) failure = "thread " + std::to_string(threadIdx.x) + " waits at a barrier for ever";
    yield();
  }
}

inline void __syncthreads() { wait(block->all); }
inline int __syncthreads_or(int value) {
  block->any |= value != 0;
  __syncthreads();
  const int result = block->any;
  __syncthreads();
  block->any = 0;
  return result;
}
inline void sync_group(int number) { wait(block->groups[number]); }

template <class T>
T exchange(T value, int source_lane) {
  Barrier& warp = block->warps[threadIdx.x / 32];
  // a thread may write its next value before the others have read this one
  const unsigned turn = warp.generation % 2;
  uint64_t raw = 0;
  std::memcpy(&raw, &value, sizeof(T));
  block->slots[2 * threadIdx.x + turn] = raw;
  wait(warp);
  raw = block->slots[2 * (threadIdx.x / 32 * 32 + source_lane) + turn];
  std::memcpy(&value, &raw, sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) { return exchange(value, threadIdx.x % 32 ^ mask); }
template <class T>
T __shfl_sync(unsigned, T value, int lane, int width = 32) {
  return exchange(value, threadIdx.x % 32 / width * width + lane);
}
inline void __syncwarp() { wait(block->warps[threadIdx.x / 32]); }
inline bool __any_sync(unsigned mask, bool value) {
  for (int n = 1; n < 32; n *= 2) value |= __shfl_xor_sync(mask, value, n);
  return value;
}
inline int __reduce_max_sync(unsigned mask, int value) {
  for (int n = 1; n < 32; n *= 2) value = std::max(value, __shfl_xor_sync(mask, value, n));
  return value;
}
inline unsigned atomicAdd(unsigned* target, unsigned value) { return (*target += value) - value; }
inline void atomicMax(int* target, int value) { *target = std::max(*target, value); }

inline float __int_as_float(int x) { float f; std::memcpy(&f, &x, 4); return f; }
inline int __float_as_int(float f) { int x; std::memcpy(&x, &f, 4); return x; }
inline double __hiloint2double(int high, int low) {
  uint64_t raw = (uint64_t)(uint32_t)high << 32 | (uint32_t)low;
  double d;
  std::memcpy(&d, &raw, 8);
  return d;
}
inline float from_half(unsigned short h) { _Float16 x; std::memcpy(&x, &h, 2); return x; }
inline unsigned short to_half(float f) { _Float16 x = f; unsigned short h; std::memcpy(&h, &x, 2); return h; }
inline float __fadd_rn(float a, float b) { return a + b; }
// towards zero, of a sum whose exact value a double holds
inline float __fadd_rz(float a, float b) {
  const double exact = (double)a + b;
  const float f = (float)exact;
  return std::fabs((double)f) > std::fabs(exact) ? std::nextafter(f, 0.0f) : f;
}
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline float __fsqrt_rn(float a) { return std::sqrt(a); }
using std::max;
using std::min;

inline void run_thread() {
  block->kernel();
  block->done[threadIdx.x] = true;
}

inline void launch(Index grid, int threads, std::function<void()> kernel) {
  gridDim = grid;
  for (int z = 0; z < grid.z; z++)
    for (int y = 0; y < grid.y; y++)
      for (int x = 0; x < grid.x; x++) {
        Block current;
        block = &current;
        if (previous.bytes) std::memcpy(previous.memory, previous.before, previous.bytes);
        blockIdx = {x, y, z};
        current.kernel = kernel;
        current.threads.resize(threads);
        current.done.resize(threads);
        current.slots.resize(2 * threads);
        current.warps.assign(threads / 32, Barrier{32});
        current.all.size = threads;
        current.groups.assign(16, Barrier{128});
        current.stacks.assign(threads, std::vector<char>(1 << 16));
        for (int n = 0; n < threads; n++) {
          ucontext_t& context = current.threads[n];
          getcontext(&context);
          context.uc_stack.ss_sp = current.stacks[n].data();
          context.uc_stack.ss_size = current.stacks[n].size();
          context.uc_link = &current.scheduler;
          makecontext(&context, run_thread, 0);
        }
        std::mt19937 random(schedule_seed);
        std::vector<int> resting(threads / 32);
        for (int left = threads; left > 0;)
          for (int n = 0; n < threads; n++) {
            if (schedule_seed && n % 32 == 0) {
              int& rest = resting[n / 32];
              rest = rest ? rest - 1 : random() % 64 ? 0 : random() % 1000;
            }
            if (current.done[n] || resting[n / 32]) continue;
            threadIdx = {n, 0, 0};
            swapcontext(&current.scheduler, &current.threads[n]);
            if (!failure.empty()) return;
            left -= current.done[n];
          }
      }
}
