// SPDX-License-Identifier: Apache-2.0
// What a warpgroup writes into shared memory as operands B of products (device/wgmma.cuh): tiles of TOKENS tokens of a
// record or of a page of exact tokens, fp16 numbers. Keys are in matrices of 8 tokens x 8 channels, values in matrices of
// 8 channels x 8 tokens. Scales and zeros are applied, in fp16:
//
//     key[t, d]   = (code * k_channel_scale[d] + k_channel_zero[d]) * k_token_scale[t] / 2^r
//     value[t, d] = (code * v_token_scale[t] + v_token_zero[t]) * v_channel_scale[d] / 2^e
//
// Without 2^r, keys are at most 2 times the scale of a token (`quantiser.quantise_side`; 2^9 for magnitudes beyond 2^14).
// The exact first token of a page takes the place of its codes, as fp16 numbers, of which bfloat16 has fewer bits; so do
// exact tokens, divided likewise. Who calls chooses r and e by the exponents below, and waits for the buffers.
//
// Lane 4 g + q of warp 0 .. 3. The constants in capitals that are not set here come from attend_rows.py.

#include "device/exponents.cuh"
#include "record/unpack.cuh"

constexpr int TOKENS = BLOCK_COLUMNS;     // of a tile; as many as channels, so that both products have one shape
static_assert(TOKENS == D && G % TOKENS == 0, "");
constexpr int TILES_OF_RECORD = G / TOKENS;
constexpr int OCTETS = D / 8;             // of channels, and of the tokens of a tile
constexpr int STEPS = D / 16;             // of depth 16
// parts of a tile's keys whose channels are so many warps'
constexpr int WARPS_OF_PART = OCTETS / 4, PARTS = 4 / WARPS_OF_PART;

// words of codes
constexpr int K_CB = K_CHANNEL_BLOCKS, K_TB = 32 / K_FIELD_BITS / K_CB, K_ROW_WORDS = D / K_CB;
constexpr int OCTET_WORDS = 8 / K_CB;     // of 8 channels of a token
constexpr int V_CB = V_CHANNEL_BLOCKS, V_WIDTH = D / V_CB;
static_assert(8 % K_CB == 0 && OCTET_WORDS <= 2 && 4 % (V_WIDTH / 16) == 0, "");

// a pair of the model's dtype times a factor, as fp16 numbers within their range
__device__ __forceinline__ u32 scaled_pair(u32 x, float factor) {
#if BF16
  const float low = __int_as_float(x << 16), high = __int_as_float(x & 0xFFFF0000u);
#else
  const float low = low_half(x), high = high_half(x);
#endif
  return pack_half(fminf(fmaxf(low * factor, -65504.f), 65504.f), fminf(fmaxf(high * factor, -65504.f), 65504.f));
}

// the magnitudes of a pair of the model's dtype, the larger one
__device__ __forceinline__ float largest_of(u32 x) {
#if BF16
  return fmaxf(fabsf(__int_as_float(x << 16)), fabsf(__int_as_float(x & 0xFFFF0000u)));
#else
  return fmaxf(fabsf(low_half(x)), fabsf(high_half(x)));
#endif
}

// the exponent of the largest of so many scales or, where that is larger, 2^9 times less than that of the first token
template <int SCALES>
__device__ __forceinline__ int largest_exponent(u32 scales, u32 firsts, int lane) {
  u32 scale = 0u;
  float first = 0.f;
#pragma unroll
  for (int n = 0; n < SCALES / 64; n++) scale = max_half(scale, lds32(scales + 4 * (lane + 32 * n)));
#pragma unroll
  for (int n = 0; n < D / 64; n++) first = fmaxf(first, largest_of(lds32(firsts + 4 * (lane + 32 * n))));
  const float largest = fmaxf(fmaxf(low_half(scale), high_half(scale)), first * power_of_two(-9));
  return __reduce_max_sync(0xffffffffu, max(min(exponent_of(largest), 100), -100));
}

// Keys of a tile: matrices of 8 tokens x 8 channels, for a thread always the same channels of every eighth token. Lanes
// are such that neither the words that they read nor the 16 bytes that they write meet in a bank of shared memory.
__device__ __forceinline__ void write_keys(u32 keys, u32 record, int part, int exponent, int warp, int lane,
                                           const Exponents& exponents) {
  const u32 halves = record + SCALES_OFFSET;
  const int octet = (lane / 8 + 4 * (lane % 8 / 2 + warp)) % OCTETS;
  const int first = TOKENS / PARTS * (warp / WARPS_OF_PART) + lane % 8;
  const uint4 scale = lds128(halves + 2 * (K_CHANNEL_SCALE + 8 * octet));
  const uint4 zero = lds128(halves + 2 * (K_CHANNEL_ZERO + 8 * octet));
  const u32 scales[4] = {scale.x, scale.y, scale.z, scale.w}, zeros[4] = {zero.x, zero.y, zero.z, zero.w};
  const float down = power_of_two(-exponent);
  const u32 target = keys + octet * OPERAND_BYTES;
  // rows whose words are loaded together
  constexpr int BATCH = 8, BATCHES = TOKENS / PARTS / 8 / BATCH > 0 ? TOKENS / PARTS / 8 / BATCH : 1;
  constexpr int LOADED = TOKENS / PARTS / 8 / BATCHES;
#pragma unroll 1
  for (int batch = 0; batch < BATCHES; batch++) {
    const int row = first + 8 * LOADED * batch;
    u32 words[LOADED][OCTET_WORDS], tops[LOADED][OCTET_WORDS];
    float of_token[LOADED];
#pragma unroll
    for (int n = 0; n < LOADED; n++) {
      const int token = TOKENS * part + row + 8 * n;
      const u32 at = record + 4 * (token / K_TB * K_ROW_WORDS + OCTET_WORDS * octet);
      const u32 top_at = record + 4 * (TOP_INDEX + token / (2 * K_TB) * K_ROW_WORDS + OCTET_WORDS * octet);
#pragma unroll
      for (int w = 0; w < OCTET_WORDS; w++) {
        words[n][w] = lds32(at + 4 * w);
        tops[n][w] = K_BITS == 3 ? lds32(top_at + 4 * w) : 0u;
      }
      of_token[n] = lds_half(halves + 2 * (K_TOKEN_SCALE + token));
    }
#pragma unroll
    for (int n = 0; n < LOADED; n++) {
      const int token = TOKENS * part + row + 8 * n, shift = K_FIELD_BITS * (K_CB / 2) * (token % K_TB);
      const u32 token_scale = pack_half(of_token[n] * down, of_token[n] * down);
      u32 x[4];
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        const int w = pair / (K_CB / 2), field = pair % (K_CB / 2);
        const u32 word = words[n][w] >> shift, top = tops[n][w] >> (shift + token / K_TB % 2);
        const u32 code = add_half(unpack<K_BITS>(word, top, field, exponents), minus_offset_pair<K_BITS>(field));
        x[pair] = multiply_half(fma_half(code, scales[pair], zeros[pair]), token_scale);
      }
      sts128(target + 16 * (row + 8 * n), make_uint4(x[0], x[1], x[2], x[3]));
    }
  }
  if (part == 0 && first == 0) {
    const uint4 own = lds128(halves + 2 * (K_FIRST + 8 * octet));
    sts128(target, make_uint4(scaled_pair(own.x, down), scaled_pair(own.y, down), scaled_pair(own.z, down),
                              scaled_pair(own.w, down)));
  }
}

// Values of a tile: matrices of 8 channels x 8 tokens, for a thread always the channels of one column of words.
__device__ __forceinline__ void write_values(u32 values, u32 record, int part, int exponent, int warp, int lane,
                                             const Exponents& exponents) {
  constexpr int GROUPS = V_WIDTH / 16;
  const u32 halves = record + SCALES_OFFSET;
  const int column = 16 * (warp % GROUPS) + 8 * (lane / 16) + lane % 8;
  const float down = power_of_two(-exponent);
  u32 channel_scales[V_CB];
#pragma unroll
  for (int j = 0; j < V_CB; j++) {
    const float scale = lds_half(halves + 2 * (V_CHANNEL_SCALE + column + V_WIDTH * j)) * down;
    channel_scales[j] = pack_half(scale, scale);
  }
  auto word = [&](u32 base, int width, int step, int c, int q) {
    return lds32(base + 4 * (4 * width * step + c / 4 * 16 + 4 * q + c % 4));
  };
  // two words of a column have 8 tokens, half a step of 16
  constexpr int COUNT = OCTETS / 2 * GROUPS / 4;
  const int half = lane / 8 % 2, first = warp / GROUPS;
  u32 words[COUNT][2], tops[COUNT][2];
#pragma unroll
  for (int n = 0; n < COUNT; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int step = TOKENS / 16 * part + first + 4 / GROUPS * n, q = 2 * half + i;
      words[n][i] = word(record + V_CODES_OFFSET, V_WIDTH, step, column, q);
      tops[n][i] = 0u;
      if (V_BITS == 3)
        tops[n][i] = word(record + V_CODES_OFFSET + 4 * TOP_INDEX, D / 8, step, column % (D / 8), q) >> column / (D / 8);
    }
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    const int octet = 2 * (first + 4 / GROUPS * n) + half, token = TOKENS * part + 8 * octet;
    const uint4 scale = lds128(halves + 2 * (V_TOKEN_SCALE + token));
    const uint4 zero = lds128(halves + 2 * (V_TOKEN_ZERO + token));
    const u32 scales[4] = {scale.x, scale.y, scale.z, scale.w}, zeros[4] = {zero.x, zero.y, zero.z, zero.w};
#pragma unroll
    for (int j = 0; j < V_CB; j++) {
      u32 x[4];
#pragma unroll
      for (int pair = 0; pair < 4; pair++) {
        const int field = pair % 2 * V_CB + j;
        const u32 code = add_half(unpack<V_BITS>(words[n][pair / 2], tops[n][pair / 2], field, exponents),
                                  minus_offset_pair<V_BITS>(field));
        x[pair] = multiply_half(fma_half(code, scales[pair], zeros[pair]), channel_scales[j]);
      }
      sts128(values + octet * OPERAND_BYTES + 16 * (column + V_WIDTH * j), make_uint4(x[0], x[1], x[2], x[3]));
    }
  }
  if (part == 0 && first == 0 && half == 0)
#pragma unroll
    for (int j = 0; j < V_CB; j++) {
      const int channel = column + V_WIDTH * j;
      const u32 own = scaled_pair(lds32(halves + 2 * (V_FIRST + channel / 2 * 2)), down);
      sts16(values + 16 * channel, channel % 2 ? own >> 16 : own);
    }
}

// Exact keys or values of a tile: rows of D channels of the model's dtype, rotated; `rows` has their addresses. A thread
// reads its part of them for the exponent, HELD at a time, and keeps the last of these until the buffer is free.

// the exponent of the largest finite one, for all threads of the warpgroup that has the barrier `group`; largest: of those
// of a thread
__device__ __forceinline__ int exact_exponent(float largest, float (&of_warp)[4], int group) {
  const int bits = __reduce_max_sync(0xffffffffu, __float_as_int(largest)), thread = threadIdx.x % 128;
  if (thread % 32 == 0) of_warp[thread / 32] = __int_as_float(bits);
  sync_group(group);
  largest = fmaxf(fmaxf(of_warp[0], of_warp[1]), fmaxf(of_warp[2], of_warp[3]));
  sync_group(group);
  return max(min(exponent_of(largest), 100), -91) - 9;
}

__device__ __forceinline__ float larger_finite(float largest, u32 pair) {
  const float of_pair = largest_of(pair);
  return fmaxf(largest, __float_as_int(of_pair) < 0x7F800000 ? of_pair : 0.f);
}

// eight channels of every eighth token
struct ExactKeys {
  static constexpr int COUNT = TOKENS / PARTS / 8, HELD = COUNT < 8 ? COUNT : 8;
  const u8* const (&rows)[TOKENS];
  const int octet, first;
  uint4 x[HELD];

  __device__ __forceinline__ ExactKeys(const u8* const (&rows)[TOKENS], int warp, int lane)
      : rows(rows), octet((lane / 8 + 4 * warp) % OCTETS), first(TOKENS / PARTS * (warp / WARPS_OF_PART) + lane % 8) {}
  __device__ __forceinline__ int token(int n) const { return first + 8 * n; }
  __device__ __forceinline__ void load(int begin) {
#pragma unroll
    for (int n = 0; n < HELD; n++) x[n] = *(const uint4*)(rows[token(begin + n)] + 16 * octet);
  }
  __device__ __forceinline__ float largest() const {
    float found = 0.f;
#pragma unroll
    for (int n = 0; n < HELD; n++)
      found = larger_finite(larger_finite(larger_finite(larger_finite(found, x[n].x), x[n].y), x[n].z), x[n].w);
    return found;
  }
  __device__ __forceinline__ void store(u32 keys, int begin, float down) const {
#pragma unroll
    for (int n = 0; n < HELD; n++)
      sts128(keys + octet * OPERAND_BYTES + 16 * token(begin + n),
             make_uint4(scaled_pair(x[n].x, down), scaled_pair(x[n].y, down), scaled_pair(x[n].z, down),
                        scaled_pair(x[n].w, down)));
  }
};

// two channels of eight tokens, of several eights
struct ExactValues {
  static constexpr int COUNT = TOKENS / 8 * (D / 2) / 128, HELD = 2;
  const u8* const (&rows)[TOKENS];
  const int first;
  u32 x[HELD][8];

  __device__ __forceinline__ ExactValues(const u8* const (&rows)[TOKENS], int warp, int lane)
      : rows(rows), first(32 * warp + lane) {}
  __device__ __forceinline__ int octet(int n) const { return (first + 128 * n) / (D / 2); }
  __device__ __forceinline__ int pair(int n) const { return (first + 128 * n) % (D / 2); }
  __device__ __forceinline__ void load(int begin) {
#pragma unroll
    for (int n = 0; n < HELD; n++)
#pragma unroll
      for (int k = 0; k < 8; k++) x[n][k] = *(const u32*)(rows[8 * octet(begin + n) + k] + 4 * pair(begin + n));
  }
  __device__ __forceinline__ float largest() const {
    float found = 0.f;
#pragma unroll
    for (int n = 0; n < HELD; n++)
#pragma unroll
      for (int k = 0; k < 8; k++) found = larger_finite(found, x[n][k]);
    return found;
  }
  __device__ __forceinline__ void store(u32 values, int begin, float down) const {
#pragma unroll
    for (int n = 0; n < HELD; n++) {
      // two tokens of a channel
      u32 y[2][4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const u32 a = scaled_pair(x[n][2 * k], down), b = scaled_pair(x[n][2 * k + 1], down);
        y[0][k] = __byte_perm(a, b, 0x5410);
        y[1][k] = __byte_perm(a, b, 0x7632);
      }
#pragma unroll
      for (int i = 0; i < 2; i++)
        sts128(values + octet(begin + n) * OPERAND_BYTES + 16 * (2 * pair(begin + n) + i),
               make_uint4(y[i][0], y[i][1], y[i][2], y[i][3]));
    }
  }
};

// the magnitude of the largest one; those that come first are held
template <class Exact>
__device__ __forceinline__ float read_exact(Exact& exact) {
  float found = 0.f;
#pragma unroll 1
  for (int begin = Exact::COUNT - Exact::HELD; begin >= 0; begin -= Exact::HELD) {
    exact.load(begin);
    found = fmaxf(found, exact.largest());
  }
  return found;
}

template <class Exact>
__device__ __forceinline__ void write_exact(Exact& exact, u32 target, int exponent) {
  const float down = power_of_two(-exponent);
  exact.store(target, 0, down);
#pragma unroll 1
  for (int begin = Exact::HELD; begin < Exact::COUNT; begin += Exact::HELD) {
    exact.load(begin);
    exact.store(target, begin, down);
  }
}
