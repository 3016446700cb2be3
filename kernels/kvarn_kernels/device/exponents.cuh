// SPDX-License-Identifier: Apache-2.0
// Exponents of float32 numbers.

__device__ __forceinline__ float power_of_two(int exponent) { return __int_as_float((exponent + 127) << 23); }

// floor(log2 x) of a positive number
__device__ __forceinline__ int exponent_of(float x) { return (__float_as_int(x) >> 23 & 0xff) - 127; }
