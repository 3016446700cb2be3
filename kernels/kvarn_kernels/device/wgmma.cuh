// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup (PTX ISA, wgmma): A [64, 16] from registers, as four fragments of m16n8k16, one for each
// warp, or from shared memory; B [16, BLOCK_COLUMNS] from shared memory; sums [64, BLOCK_COLUMNS] in registers. There, B
// is stored in matrices of 8 columns x 8 elements of the depth, 128 bytes each, a column after the other: those of all
// columns for the first 8, then for the next 8; likewise A with its rows. WGMMA_ macros come from wgmma.py; as C++ for a
// test see tests/support/wgmma_on_cpu.h.

// what a lane of warp w has of [64, BLOCK_COLUMNS]: 4 n + 2 h + i is row 16 w + g + 8 h, column 8 n + 2 q + i
typedef float Sums[BLOCK_COLUMNS / 2];
constexpr int OPERAND_BYTES = 16 * BLOCK_COLUMNS;  // of B for 8 elements of the depth

// An operand in shared memory, of a number of steps of depth 16; BYTES: for 8 elements of the depth
template <int BYTES = OPERAND_BYTES>
struct Operand {
  u32 low;  // of the descriptor
  // next: bytes from the first 8 elements of the depth to the second 8
  __device__ __forceinline__ explicit Operand(u32 address, int next = BYTES) : low(address >> 4 | next >> 4 << 16) {}
  // the descriptor of a step
  __device__ __forceinline__ u64 operator[](int step) const {
    return (u64)(low + step * (2 * BYTES >> 4)) | (u64)(128 >> 4) << 32;
  }
};

#ifdef CUDA_ON_CPU
#include "wgmma_on_cpu.h"
#else
// what this thread stored to shared memory can be read by products of others after a barrier
__device__ __forceinline__ void fence_stores() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// registers that this thread has written can be read and written by the products that follow
__device__ __forceinline__ void fence_registers() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// wait until at most so many groups of products are on their way
template <int GROUPS>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(GROUPS) : "memory");
}

// keeps the compiler from reading sums before the wait above this line
__device__ __forceinline__ void arrived(Sums& d) {
#pragma unroll
  for (int n = 0; n < BLOCK_COLUMNS / 2; n++) asm volatile("" : "+f"(d[n])::"memory");
}

#define WGMMA(TYPE, ADD)                                                                                       \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " WGMMA_ADD ", 0;\n"                                           \
               "wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32." TYPE "." TYPE " " WGMMA_SUMS ", " WGMMA_A ", " \
               WGMMA_B ", p, 1, 1, 0; }"                                                                          \
               : WGMMA_OUTPUTS                                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), ADD)

// d = a b, with ADD d += a b, of fp16 pairs
template <bool ADD>
__device__ __forceinline__ void product_half(Sums& d, const u32 (&a)[4], u64 b) { WGMMA("f16", "n"((int)ADD)); }

// the same where the kernel decides: sums that are carried through a loop begin with a product, because ptxas puts every
// product behind the one before where zeros are written to them (C7515)
__device__ __forceinline__ void product_half(Sums& d, const u32 (&a)[4], u64 b, bool add) {
  WGMMA("f16", "r"((int)add));
}

// the same of the model's dtype
template <bool ADD>
__device__ __forceinline__ void product_exact(Sums& d, const u32 (&a)[4], u64 b) {
#if BF16
  WGMMA("bf16", "n"((int)ADD));
#else
  WGMMA("f16", "n"((int)ADD));
#endif
}

// d = a b, with ADD d += a b, of fp16 numbers, A in shared memory, too
template <bool ADD>
__device__ __forceinline__ void product_half(Sums& d, u64 a, u64 b) {
  asm volatile("{ .reg .pred p; setp.ne.b32 p, " WGMMA_SHARED_ADD ", 0;\n"
               "wgmma.mma_async.sync.aligned." WGMMA_SHAPE ".f32.f16.f16 " WGMMA_SUMS ", " WGMMA_SHARED_A ", "
               WGMMA_SHARED_B ", p, 1, 1, 0, 0; }"
               : WGMMA_OUTPUTS
               : "l"(a), "l"(b), "n"((int)ADD));
}

// let go of registers, or take some, until a thread has so many; all warps of a warpgroup
template <int COUNT>
__device__ __forceinline__ void keep_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

// 8 x 8 matrices to and from shared memory; lane n has the address of row n % 8 of matrix n / 8, 16 bytes
__device__ __forceinline__ void store_matrices(u32 a, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ void store_matrices(u32 a, const u32 (&x)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.shared.b16 [%0], {%1,%2};" ::"r"(a), "r"(x[0]), "r"(x[1]) : "memory");
}
__device__ __forceinline__ void store_transposed(u32 a, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(a), "r"(x[0]), "r"(x[1]),
               "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ void store_transposed(u32 a, const u32 (&x)[2]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1,%2};" ::"r"(a), "r"(x[0]), "r"(x[1])
               : "memory");
}
__device__ __forceinline__ void store_transposed(u32 a, const u32 (&x)[1]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(a), "r"(x[0]) : "memory");
}
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(a) : "memory");
}
__device__ __forceinline__ void load_transposed(u32 (&x)[4], u32 a) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(a) : "memory");
}
#endif
