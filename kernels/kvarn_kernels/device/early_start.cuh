// SPDX-License-Identifier: Apache-2.0
// Kernels that overlap on a stream, on sm_90 and newer (programmatic dependent launch): one that is launched with
// `early_start` (launch.py) begins when all blocks of the one before have let it, and waits where it needs its results.
// Elsewhere it begins when the one before has ended. In a test as C++, tests/support/cuda_on_cpu.h has both functions.

#ifndef CUDA_ON_CPU
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ void let_next_start() { asm volatile("griddepcontrol.launch_dependents;"); }
// until the kernel before has ended and all that it wrote can be read
__device__ __forceinline__ void wait_for_previous() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
#else
__device__ __forceinline__ void let_next_start() {}
__device__ __forceinline__ void wait_for_previous() {}
#endif
#endif
