// SPDX-License-Identifier: Apache-2.0
// Words of codes as fp16 operands, the layout of tile.py: the only place in CUDA C++ that unpacks.

// The exponents that turn a masked field into offset + code. `zero` is 0, but the compiler cannot know it and keeps
// them in registers: mask-or is then one instruction (with two constants it would be two).
struct Exponents {
  u32 x256, x64, x16, x4;
  __device__ explicit Exponents(u32 zero)
      : x256(0x5C005C00u | zero), x64(0x54005400u | zero), x16(0x4C004C00u | zero), x4(0x44004400u | zero) {}
};

// field n of both halves of a word as the fp16 pair offset + code; offset<BITS>(n) is a power of two
template <int BITS>
__device__ __forceinline__ u32 unpack(u32 w, int n, const Exponents& e) {
  if (BITS == 4) {
    u32 x = n % 4 < 2 ? w << 2 : w >> 6;
    return n % 2 == 0 ? and_or<0x003C003Cu>(x, e.x256) : and_or<0x03C003C0u>(x, e.x16);
  }
  u32 x = n < 3 ? w << 4 : n == 3 ? w : n < 7 ? w >> 4 : w >> 8;
  int position = n % 4;
  if (position == 0) return and_or<0x00300030u>(x, e.x64);
  if (position == 2) return and_or<0x03000300u>(x, e.x4);
  return and_or<0x00C000C0u>(x, e.x16);
}
template <int BITS>
__device__ constexpr float offset(int n) {
  if (BITS == 3) return n % 2 == 0 ? 64.f : 16.f;
  return BITS == 4 ? (n % 2 == 0 ? 256.f : 16.f) : n % 4 == 0 ? 64.f : n % 4 == 2 ? 4.f : 16.f;
}
template <int BITS>
__device__ constexpr u32 minus_offset_pair(int n) {  // -offset as an fp16 pair
  if (BITS == 3) return n % 2 == 0 ? 0xD400D400u : 0xCC00CC00u;
  return BITS == 4 ? (n % 2 == 0 ? 0xDC00DC00u : 0xCC00CC00u)
                   : n % 4 == 0 ? 0xD400D400u : n % 4 == 2 ? 0xC400C400u : 0xCC00CC00u;
}

// the same of codes that may have 3 bits; `top` has their top bits where the fields of w begin
template <int BITS>
__device__ __forceinline__ u32 unpack(u32 w, u32 top, int n, const Exponents& e) {
  if (BITS != 3) return unpack<BITS>(w, n, e);
  u32 x = n < 2 ? w << 4 : n < 4 ? w : n < 6 ? w >> 4 : w >> 8;
  u32 y = n < 2 ? top << 6 : n < 4 ? top << 2 : n < 6 ? top >> 2 : top >> 6;
  return n % 2 == 0 ? and_or<0x00300030u>(x, e.x64) | (y & 0x00400040u) : and_or<0x00C000C0u>(x, e.x16) | (y & 0x01000100u);
}

// As fp16 numbers without a power of two in front: subnormal, code x 2^(bit - 24).
//
// where field n of 8 bits and more stands after `unpack_in_place`
template <int BITS>
__device__ constexpr int bit_of(int n) { return (BITS == 3 ? 2 : BITS) * n % 8; }

// field n of both halves of a word where it stands in the low 8 bits; `top` has the top bits of codes of 3 bits
template <int BITS>
__device__ __forceinline__ u32 unpack_in_place(u32 w, u32 top, int n) {
  constexpr int FIELD_BITS = BITS == 3 ? 2 : BITS;
  const u32 field = 0x00010001u << bit_of<BITS>(n);
  const bool upper = FIELD_BITS * n >= 8;
  u32 x = (upper ? w >> 8 : w) & field * ((1 << FIELD_BITS) - 1);
  if (BITS == 3) x |= (upper ? top >> 6 : top << 2) & field * 4;
  return x;
}
