// SPDX-License-Identifier: Apache-2.0
// Write pages out in 16 bits in the model's frame, for sm_80 and newer; the contract of dequantise.py.
//
// WARPS * 16 tokens of a page, KV head and side (keys, values) are a block's, 16 tokens a warp's. Of a record,
// Sylvester's matrix of D channels is a product of one 2 x 2 matrix for each bit of the channel's number: four bits are a matrix instruction of
// depth 16,
//
//     y [tokens, 16 channels] = x [tokens, 16 channels] x signs [16, 16 channels]
//
// and the others sums and differences of accumulators of the same lane, 3 for each value at D = 128 instead of a product
// of depth 128. Which four bits is free: those of a lane's channels in one step (bits 0 and 1) and the two above Q_BIT
// that number the lanes, so that a lane ends with 2^Q_BIT channels in a row and a store of the warp fills whole sectors.
// Operands are what `load_keys` and `load_values` of unpack.py give, fp16; sums are float32. Lane 4 g + q.
// Exact rows, of the ring and of the first token, are few: a warp rotates one at a time, D / 32 channels a lane.
// It may start while the encoder runs, and waits for it where it reads a page that this step fills.
// The constants in capitals that are not set here come from dequantise_cuda.py.

#include "device/early_start.cuh"
#include "device/fragments.cuh"
#include "record/hadamard.cuh"
#include "record/unpack.cuh"

constexpr int PARTS = G / 16 / WARPS;  // blocks of a page, head and side
constexpr int STEPS = D / 16;
__device__ constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of(n / 2); }
// lanes share the words of a row of key words; of value words each takes 4 in a row
constexpr int K_Q_BIT = log2_of(K_CHANNEL_BLOCKS), V_Q_BIT = D == 64 ? 2 : 3;
constexpr int K_ROW_WORDS = D / K_CHANNEL_BLOCKS, K_TOKENS = 32 / K_FIELD_BITS / K_CHANNEL_BLOCKS;
constexpr int V_WIDTH = D / V_CHANNEL_BLOCKS, V_VECTORS = STEPS / V_CHANNEL_BLOCKS;

// channels of lane q in a step: this, plus q << Q_BIT, and the next three
template <int Q_BIT>
__device__ constexpr int channel_of(int step) {
  constexpr int LOW = Q_BIT - 2;
  return (step & ((1 << LOW) - 1)) << 2 | step >> LOW << (Q_BIT + 2);
}

// columns 8 tile .. of the signs as operand: rows 2 q and 2 q + 1, and those 8 further; lane bits of row and column meet
struct Signs {
  u32 low, high;
  __device__ Signs(int tile, int g, int q) {
    const u32 meet = q & g >> 1, odd = (meet ^ meet >> 1) & 1;
    low = odd << 15 | (odd ^ (g & 1)) << 31;
    high = tile ? low ^ 0x80008000u : low;
  }
};

typedef float Sums[STEPS][2][4];  // step, tile of 8 columns, (token of 2, channel of 2)

// within the range of fp16 if that is the model's dtype: quantisation may carry an element of the largest keys beyond it
__device__ __forceinline__ u32 finite_pair(float low, float high) {
  return BF16 ? pack_bf16(low, high)
              : pack_half(fminf(fmaxf(low, -65504.f), 65504.f), fminf(fmaxf(high, -65504.f), 65504.f));
}

// the rest of the product, times a factor for each of the two tokens, to two rows of D channels; null is not written
template <int Q_BIT>
__device__ __forceinline__ void finish(Sums& sums, const float (&factor)[2], u32* const (&rows)[2], int q) {
#pragma unroll
  for (int bit = 1; bit < STEPS; bit *= 2)
#pragma unroll
    for (int s = 0; s < STEPS; s++)
#pragma unroll
      for (int n = 0; n < 8; n++)
        if (!(s & bit)) {
          float &a = sums[s][n / 4][n % 4], &b = sums[s | bit][n / 4][n % 4];
          const float difference = a - b;
          a += b;
          b = difference;
        }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    if (!rows[h]) continue;
    auto pair = [&](int s, int tile) {
      return finite_pair(sums[s][tile][2 * h] * factor[h], sums[s][tile][2 * h + 1] * factor[h]);
    };
#pragma unroll
    for (int s = 0; s < STEPS; s += Q_BIT == 2 ? 1 : 2) {
      u32* at = rows[h] + (channel_of<Q_BIT>(s) + (q << Q_BIT)) / 2;
      if (Q_BIT == 2) {
        *(uint2*)at = make_uint2(pair(s, 0), pair(s, 1));
      } else {
        const int next = (s + 1) % STEPS;
        *(uint4*)at = make_uint4(pair(s, 0), pair(s, 1), pair(next, 0), pair(next, 1));
      }
    }
  }
}

__device__ __forceinline__ void keys(Sums& sums, float (&factor)[2], const u8* record, const Exponents& e, int warp,
                                     int g, int q) {
  const u32* words = (const u32*)record;
  const unsigned short* halves = (const unsigned short*)(record + SCALES_OFFSET);
  constexpr int WORDS = K_ROW_WORDS / 4, WORD_STEPS = STEPS / WORDS;
  u32 w[2][WORDS], tops[2][WORDS];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int token = 16 * warp + g + 8 * h, row = token / K_TOKENS;
    const int shift = K_FIELD_BITS * (K_CHANNEL_BLOCKS / 2) * (token % K_TOKENS);
#pragma unroll
    for (int n = 0; n < WORDS; n++) {
      w[h][n] = words[row * K_ROW_WORDS + q + 4 * n] >> shift;
      tops[h][n] = K_BITS == 3 ? words[TOP_INDEX + row / 2 * K_ROW_WORDS + q + 4 * n] >> (shift + row % 2) : 0u;
    }
    factor[h] = low_half(halves[K_TOKEN_SCALE + token]) * ROTATION_SCALE;
  }
  const Signs signs[2] = {Signs(0, g, q), Signs(1, g, q)};
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int channel = channel_of<K_Q_BIT>(s) + (q << K_Q_BIT), field = s % WORD_STEPS * 2;
    const uint2 scale = *(const uint2*)(halves + K_CHANNEL_SCALE + channel);
    const uint2 zero = *(const uint2*)(halves + K_CHANNEL_ZERO + channel);
    u32 a[4];
#pragma unroll
    for (int n = 0; n < 4; n++) {
      const int h = n % 2, f = field + n / 2;
      const u32 code = add_half(unpack<K_BITS>(w[h][s / WORD_STEPS], tops[h][s / WORD_STEPS], f, e),
                                minus_offset_pair<K_BITS>(f));
      a[n] = fma_half(code, n < 2 ? scale.x : scale.y, n < 2 ? zero.x : zero.y);
    }
#pragma unroll
    for (int tile = 0; tile < 2; tile++) {
      // +-1
      const u32 low = 0x3C003C00u ^ signs[tile].low, high = 0x3C003C00u ^ signs[tile].high;
      mma_half(sums[s][tile], a[0], a[1], a[2], a[3], low, high);
    }
  }
}

__device__ __forceinline__ void values(Sums& sums, float (&factor)[2], const u8* record, const Exponents& e, int warp,
                                       int g, int q) {
  const u32* words = (const u32*)(record + V_CODES_OFFSET);
  const unsigned short* halves = (const unsigned short*)(record + SCALES_OFFSET);
  // the tokens 2 i and 2 i + 1 of a row of words
  const int row = g >> 1, shift = V_FIELD_BITS * V_CHANNEL_BLOCKS * (g & 1), token = 16 * warp + 2 * g;
  u32 w[V_VECTORS][4], tops[V_VECTORS][4];
#pragma unroll
  for (int n = 0; n < V_VECTORS; n++) {
    const int vector = (channel_of<V_Q_BIT>(n) + (q << V_Q_BIT)) / 4;
    const uint4 x = *(const uint4*)(words + 4 * V_WIDTH * warp + 16 * vector + 4 * row);
    w[n][0] = x.x >> shift; w[n][1] = x.y >> shift; w[n][2] = x.z >> shift; w[n][3] = x.w >> shift;
    if (V_BITS == 3) {
      constexpr int HALF = V_WIDTH / 8;  // vectors whose top bits come first
      const uint4 y = *(const uint4*)(words + TOP_INDEX + 2 * V_WIDTH * warp + 16 * (vector % HALF) + 4 * row);
      const int top_shift = shift + vector / HALF;
      tops[n][0] = y.x >> top_shift; tops[n][1] = y.y >> top_shift;
      tops[n][2] = y.z >> top_shift; tops[n][3] = y.w >> top_shift;
    }
  }
  const u32 scale = *(const u32*)(halves + V_TOKEN_SCALE + token), zero = *(const u32*)(halves + V_TOKEN_ZERO + token);
  const Signs signs[2] = {Signs(0, g, q), Signs(1, g, q)};
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    const int n = s % V_VECTORS, block = s / V_VECTORS;
    u32 x[4];
#pragma unroll
    for (int c = 0; c < 4; c++) {
      const u32 code = add_half(unpack<V_BITS>(w[n][c], V_BITS == 3 ? tops[n][c] : 0u, block, e),
                                minus_offset_pair<V_BITS>(block));
      x[c] = fma_half(code, scale, zero);
    }
    // pairs of tokens become pairs of channels
    const u32 a0 = __byte_perm(x[0], x[1], 0x5410), a1 = __byte_perm(x[0], x[1], 0x7632);
    const u32 a2 = __byte_perm(x[2], x[3], 0x5410), a3 = __byte_perm(x[2], x[3], 0x7632);
    const uint2 channel_scale =
        *(const uint2*)(halves + V_CHANNEL_SCALE + channel_of<V_Q_BIT>(s) + (q << V_Q_BIT));
#pragma unroll
    for (int tile = 0; tile < 2; tile++)
      mma_half(sums[s][tile], a0, a1, a2, a3, channel_scale.x ^ signs[tile].low, channel_scale.y ^ signs[tile].high);
  }
  factor[0] = factor[1] = ROTATION_SCALE;
}

// one exact row of the rotated frame, back in the model's
__device__ __forceinline__ void rotate_back(const u8* source, u32* row, int lane) {
  float x[ROW_CHANNELS];
  rotate_row(x, (const u32*)source, lane);
#pragma unroll
  for (int n = 0; n < ROW_CHANNELS; n += 2) row[(ROW_CHANNELS * lane + n) / 2] = finite_pair(x[n], x[n + 1]);
}

extern "C" __global__ void __launch_bounds__(32 * WARPS, MIN_BLOCKS)
kvarn_dequantise(u8* __restrict__ workspace_k, u8* __restrict__ workspace_v, const u8* __restrict__ k,
                 const u8* __restrict__ v, const u8* __restrict__ records, const int* __restrict__ ring_pages,
                 const int* __restrict__ requests, const int* __restrict__ pages, const int* __restrict__ page_table,
                 const int* __restrict__ prefix_lens, const int* __restrict__ seq_lens,
                 const int* __restrict__ qo_indptr, const int* __restrict__ exact_starts, int stride_k_token,
                 int stride_k_head, int stride_v_token, int stride_v_head, int stride_page_table, int num_exact) {
  const int slot = blockIdx.x / PARTS, part = blockIdx.x % PARTS, head = blockIdx.y;
  const bool is_value = blockIdx.z;
  const int warp = part * WARPS + threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int request = requests[slot], number = pages[slot];
  auto page_at = [&](int id) { return records + ((long long)id * HK + head) * RECORD; };
  // the kernel ends after the one before, whose results the next one on the stream may need
  auto end = [&] {
    if (blockIdx.x == gridDim.x - 1) wait_for_previous();
  };
  u32* page = (u32*)((is_value ? workspace_v : workspace_k) + ((long long)slot * HK + head) * (2 * G * D));
  // a page that the request took from the prefix cache was never in its ring
  if (slot < num_exact && number * G >= exact_starts[request]) {
    const int prefix_len = prefix_lens[request], seq_len = seq_lens[request];
    const u8* rows = is_value ? v : k;
    const long long stride = is_value ? stride_v_token : stride_k_token;
    rows += 2 * ((qo_indptr[request] - prefix_len) * stride + (long long)head * (is_value ? stride_v_head : stride_k_head));
    for (int token = 16 * warp; token < 16 * warp + 16; token++) {
      const int position = number * G + token;
      u32* row = page + token * (D / 2);
      if (position < prefix_len) {
        const u8* ring = page_at(ring_pages[request * RING_PAGES + position / RING_TOKENS % RING_PAGES]);
        rotate_back(ring + position % RING_TOKENS * (4 * D) + is_value * (2 * D), row, lane);
      } else {
        for (int n = lane; n < D / 2; n += 32)
          row[n] = position < seq_len ? ((const u32*)(rows + 2 * position * stride))[n] : 0u;
      }
    }
    end();
    return;
  }
  if (number >= prefix_lens[request] / G) wait_for_previous();
  const u8* record = page_at(page_table[(long long)request * stride_page_table + number]);
  const Exponents e((u32)num_exact >> 31);
  Sums sums;
#pragma unroll
  for (int s = 0; s < STEPS; s++)
#pragma unroll
    for (int n = 0; n < 8; n++) sums[s][n / 4][n % 4] = 0.f;
  float factor[2];
  // the token of g and the other one of a lane; token 0 is not read from its codes
  auto rows = [&](int token, int other, u32* (&to)[2]) {
    to[0] = token == 0 ? nullptr : page + token * (D / 2);
    to[1] = page + other * (D / 2);
  };
  u32* to[2];
  if (is_value) {
    values(sums, factor, record, e, warp, g, q);
    rows(16 * warp + 2 * g, 16 * warp + 2 * g + 1, to);
    finish<V_Q_BIT>(sums, factor, to, q);
  } else {
    keys(sums, factor, record, e, warp, g, q);
    rows(16 * warp + g, 16 * warp + g + 8, to);
    finish<K_Q_BIT>(sums, factor, to, q);
  }
  if (warp == 0) rotate_back(record + SCALES_OFFSET + 2 * (is_value ? V_FIRST : K_FIRST), page, lane);
  end();
}
