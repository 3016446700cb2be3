// SPDX-License-Identifier: Apache-2.0
// Extend attention over the older pages of a few new tokens for sm_90a: the part that all of them read as records.
//
// Codes are the operand from registers, and a column is a query head for a new token:
//
//     scores^T [64 tokens, columns]   = keys [64 tokens, D] x queries^T [D, columns]
//     out^T    [64 channels, columns] = values^T [64 channels, 64 tokens] x weights^T [64 tokens, columns]
//
// A block attends one split of the pages of a request for one KV head and BLOCK_COLUMNS columns. Every query of the block
// sees every token, so nothing is masked. The work of a record is done in two halves of 64 tokens, by two warpgroups that
// share nothing but buffers of weights:
//
//     scoring warpgroup    keys of half h + 2 -> products in one of two sets of sums, meanwhile weights of half h + 1
//     summing warpgroup    values of half h + 1 -> registers, meanwhile products with the weights of half h
//
// so that the products of both and what both compute beside them overlap without a barrier between the two. A warpgroup
// unpacks what it multiplies, once: with the number of columns of a block the cost of unpacking is small, and scales and
// zeros are applied to the operand itself (columns_sm90.cu, for fewer columns, folds them into the other one):
//
//     key[t, d]   = code * k_channel_scale[d] + k_channel_zero[d]                        times k_token_scale[t]: a score
//     value[t, d] = (code * v_token_scale[t] + v_token_zero[t]) * v_channel_scale[d] / 2^e
//
// in fp16. Keys without the scales of their tokens are at most 2 (`quantiser.quantise_side`; 2^9 for magnitudes beyond
// 2^14); those scales are factors of the scores, where the maximum is subtracted. 2^e is of the block: it is raised, and
// the sums divided, when a record's scales exceed it 2^6 times. The exact first token of a page takes the place of its
// codes, as fp16 numbers: bfloat16 has fewer bits, and its exponent is taken out (keys: that of the scale of token 1).
//
// Maxima belong to the block's columns. Weights are computed with the maximum that is kept; when a weight exceeds
// 2^LIMIT_BITS, the maxima are raised, the weights computed again, and the summing warpgroup, told by the buffer of
// weights, scales its sums before it goes on.
//
// Lane 4 g + q. The constants in capitals that are not set here come from extend_sm90.py.

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "read/code_words.cuh"
#include "record/unpack.cuh"

constexpr int WARPS = 8;                  // 4 score, 4 sum
constexpr int TILES = BLOCK_COLUMNS / 8;  // of 8 columns
constexpr int STEPS = D / 16;             // depth-16 steps over the channels
constexpr int PAIRS = D / 8;              // pairs of channels of a lane
constexpr int BLOCKS = D / 64;            // blocks of 64 channels
constexpr int HALF_STEPS = 4;             // depth-16 steps over 64 tokens
// sets of a lane's values, of which one is multiplied while the next is unpacked; at head_dim 256 registers hold one
constexpr int VALUE_SETS = BLOCKS > 2 ? 1 : 2;
// shared memory: buffers of records, queries, buffers of weights, sums of weights of each scoring thread
constexpr int QUERIES = STAGES * BUFFER;
constexpr int WEIGHTS = QUERIES + 2 * STEPS * OPERAND_BYTES;
constexpr int WEIGHT_BYTES = 2 * HALF_STEPS * OPERAND_BYTES;
constexpr int TOTALS = WEIGHTS + WEIGHT_BUFFERS * WEIGHT_BYTES;
static_assert(TOTALS + 128 * TILES * 8 == SHARED_BYTES && TILES % 2 == 0 && BLOCK_COLUMNS <= 128, "");
constexpr float SHIFT = 4.0f;             // weights are 2^SHIFT times as large, so that small ones stay normal fp16 numbers
constexpr float LIMIT = 4096.0f;          // the largest sum of two weights with which the maxima are kept
// sums of weights are taken over so many halves in fp16, then in float32: fewer registers, and fewer instructions
constexpr int TOTAL_HALVES = 8;
static_assert(TOTAL_HALVES * LIMIT < 65504.f, "");
constexpr float NONE = -1e30f;            // the maximum before there is a score
constexpr int QUERY_BITS = 12;            // the largest query of a block is below 2^QUERY_BITS
constexpr int SCORING = 1, SUMMING = 2;   // barriers of the two warpgroups
#define MINUS_INF __int_as_float(0xff800000)

struct __align__(16) Shared {
  float minus_max[BLOCK_COLUMNS];           // of a column: SHIFT - maximum (log2)
  float alpha[WEIGHT_BUFFERS][BLOCK_COLUMNS];  // factor of what was summed before these weights, where `raised`
  float of_warp[4][BLOCK_COLUMNS];
  int raised[WEIGHT_BUFFERS];
  int largest;                              // magnitude of the queries
  float inverse[BLOCK_COLUMNS];             // of the sum of a column's weights, 0 where there are none
  int row[BLOCK_COLUMNS];                   // of its result, -1 where there is no query
  u64 full[STAGES];                         // a record has arrived
  u64 ready[WEIGHT_BUFFERS], taken[WEIGHT_BUFFERS];  // weights are written, are multiplied
};

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

// floor(log2 x) of a positive number
__device__ __forceinline__ int exponent_of(float x) { return ((__float_as_int(x) >> 23) & 0xFF) - 127; }

// what the first key of a page is divided by: a power of two near the scale of token 1
__device__ __forceinline__ float first_key_scale(u32 halves) {
  return __int_as_float(__float_as_int(lds_half(halves + 2 * (K_TOKEN_SCALE + 1))) & 0x7F800000);
}

// the keys of half m of a record: rows of a fragment for each step
__device__ __forceinline__ void unpack_keys(u32 (&a)[STEPS][4], u32 record, int m, int warp, int lane,
                                            const Exponents& exponents) {
  const int g = lane / 4, q = lane % 4;
  const u32 halves = record + SCALES_OFFSET, own = halves + 2 * (D / 4 * q);
  u32 words[2][K_LANE_WORDS], tops[2][K_LANE_WORDS];
  load_key_words(words, tops, record, m, warp, g, q);
#pragma unroll
  for (int first = 0; first < PAIRS; first += 4) {
    const uint4 scale = lds128(own + 2 * K_CHANNEL_SCALE + 4 * first);
    const uint4 zero = lds128(own + 2 * K_CHANNEL_ZERO + 4 * first);
    const u32 scales[4] = {scale.x, scale.y, scale.z, scale.w}, zeros[4] = {zero.x, zero.y, zero.z, zero.w};
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int pair = first + k, word = pair / K_PAIRS, field = pair % K_PAIRS;
        const u32 x = unpack<K_BITS>(words[half][word], tops[half][word], field, exponents);
        a[pair / 2][2 * (pair % 2) + half] =
            fma_half(add_half(x, minus_offset_pair<K_BITS>(field)), scales[k], zeros[k]);
      }
  }
  // row 0 is token 0
  if (m == 0 && warp == 0 && g == 0) {
    const float scale = first_key_scale(halves), factor = __int_as_float(0x7F000000 - __float_as_int(scale));
#pragma unroll
    for (int first = 0; first < PAIRS; first += 4) {
      const uint4 x = lds128(own + 2 * K_FIRST + 4 * first);
      const u32 xs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (int k = 0; k < 4; k++) a[(first + k) / 2][2 * (k % 2)] = scaled_pair(xs[k], factor);
    }
  }
}

// order the products of half m of the keys with the queries
__device__ __forceinline__ void order_scores(Sums& s, u32 record, u32 queries, int m, int warp, int lane,
                                             const Exponents& exponents) {
  u32 a[STEPS][4];
  unpack_keys(a, record, m, warp, lane, exponents);
  const Operand b(forgotten(queries));
  fence_registers();
#pragma unroll
  for (int k = 0; k < STEPS; k++)
    if (k == 0) product_half<false>(s, a[k], b[0]);
    else product_half<true>(s, a[k], b[k]);
  commit_products();
}

// write the weights of 64 tokens by the maxima that are kept; sums: of the lane's two rows, pairs of columns. Returns
// whether one exceeds LIMIT
__device__ __forceinline__ bool weigh(const Sums& s, const float (&factor)[2], u32 (&sums)[TILES], const Shared& shared,
                                      u32 weights, int warp, int lane) {
  const u32 row = weights + (2 * warp + lane / 8 % 2) * OPERAND_BYTES + 128 * (lane / 16) + 16 * (lane % 8);
  u32 largest = 0u;
#pragma unroll
  for (int first = 0; first < TILES; first += 2) {
    u32 packed[4];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int c = first + i;
      const float2 shift = *(const float2*)&shared.minus_max[8 * c + 2 * (lane % 4)];
#pragma unroll
      for (int half = 0; half < 2; half++)
        packed[2 * i + half] = pack_half(exp2_fast(fmaf(s[4 * c + 2 * half], factor[half], shift.x)),
                                         exp2_fast(fmaf(s[4 * c + 2 * half + 1], factor[half], shift.y)));
      sums[c] = add_half(packed[2 * i], packed[2 * i + 1]);
      largest = max_half(largest, sums[c]);
    }
    store_transposed(row + 128 * first, packed);
  }
  return fmaxf(low_half(largest), high_half(largest)) > LIMIT;
}

// this thread's sums of weights of tile c
__device__ __forceinline__ float2 total_of(u32 totals, int c) {
  const uint2 x = lds64(totals + 1024 * c);
  return make_float2(__int_as_float(x.x), __int_as_float(x.y));
}
__device__ __forceinline__ void set_total(u32 totals, int c, float x, float y) {
  sts64(totals + 1024 * c, make_uint2(__float_as_int(x), __float_as_int(y)));
}

// add what was summed in fp16
__device__ __forceinline__ void add_totals(u32 (&l)[TILES], u32 totals) {
#pragma unroll
  for (int c = 0; c < TILES; c++) {
    const float2 total = total_of(totals, c);
    set_total(totals, c, total.x + low_half(l[c]), total.y + high_half(l[c]));
    l[c] = 0u;
  }
}

// raise the maxima to the largest scores
__device__ __forceinline__ void raise(const Sums& s, const float (&factor)[2], u32 (&l)[TILES], u32 totals, Shared& shared,
                                      int buffer, int warp, int lane) {
  const int g = lane / 4, q = lane % 4, column = threadIdx.x;
#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float largest = fmaxf(s[4 * c + i] * factor[0], s[4 * c + 2 + i] * factor[1]);
      for (int lanes = 4; lanes < 32; lanes *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      if (g == 0) shared.of_warp[warp][8 * c + 2 * q + i] = largest;
    }
  sync_group(SCORING);
  if (column < BLOCK_COLUMNS) {
    float largest = MINUS_INF;
    for (int w = 0; w < 4; w++) largest = fmaxf(largest, shared.of_warp[w][column]);
    const float before = shared.minus_max[column], now = fminf(before, SHIFT - largest);
    shared.alpha[buffer][column] = exp2_fast(now - before);
    shared.minus_max[column] = now;
  }
  sync_group(SCORING);
#pragma unroll
  for (int c = 0; c < TILES; c++) {
    const float2 alpha = *(const float2*)&shared.alpha[buffer][8 * c + 2 * q];
    const float2 total = total_of(totals, c);
    l[c] = multiply_half(l[c], pack_half(alpha.x, alpha.y));
    set_total(totals, c, total.x * alpha.x, total.y * alpha.y);
  }
}

// the values of half m of a record
__device__ __forceinline__ void unpack_values(u32 (&a)[BLOCKS][HALF_STEPS][4], const u32 (&channels)[BLOCKS][2],
                                              float down, u32 record, int m, int warp, int lane,
                                              const Exponents& exponents) {
  const int g = lane / 4, q = lane % 4;
  const u32 halves = record + SCALES_OFFSET, own = halves + 2 * (64 * m + 4 * q);
  u32 words[HALF_STEPS], tops[HALF_STEPS];
  uint2 scales[HALF_STEPS], zeros[HALF_STEPS];
#pragma unroll
  for (int n = 0; n < HALF_STEPS; n++) {
    scales[n] = lds64(own + 2 * (V_TOKEN_SCALE + 16 * n));
    zeros[n] = lds64(own + 2 * (V_TOKEN_ZERO + 16 * n));
  }
#pragma unroll
  for (int k = 0; k < BLOCKS; k++) {
    const ValueBlock block(k, warp);
    const int part = block.known_part(k);
    if (part == 0) load_value_words(words, tops, record, HALF_STEPS * m, block, g, q);
#pragma unroll
    for (int n = 0; n < HALF_STEPS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int field = i / 2 * V_CB + 2 * part + i % 2;
        const u32 x = add_half(unpack<V_BITS>(words[n], tops[n], field, exponents), minus_offset_pair<V_BITS>(field));
        const u32 y = fma_half(x, i < 2 ? scales[n].x : scales[n].y, i < 2 ? zeros[n].x : zeros[n].y);
        a[k][n][i] = multiply_half(y, channels[k][i % 2]);
      }
    // the first of the depth is token 0
    if (m == 0 && q == 0)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int channel = block.channel(i, g);
        const u32 pair = scaled_pair(lds32(halves + 2 * (V_FIRST + channel / 2 * 2)), down);
        a[k][0][i] = (a[k][0][i] & 0xFFFF0000u) | (channel % 2 ? pair >> 16 : pair & 0xFFFFu);
      }
  }
}

// The power of two that values are divided by, the same in all warps.
struct ValueExponent {
  int e = -60;
  // raise it where a record asks for it; returns the factor of what was summed before, 1 where nothing changes
  __device__ __forceinline__ float raise(u32 halves, int lane) {
    u32 scale = 0u;
    float first = 0.f;
#pragma unroll
    for (int n = 0; n < D / 64; n++) {
      scale = max_half(scale, lds32(halves + 2 * V_CHANNEL_SCALE + 4 * (lane + 32 * n)));
      first = fmaxf(first, largest_of(lds32(halves + 2 * V_FIRST + 4 * (lane + 32 * n))));
    }
    // 2^9 is the most that a value can be in units of its channel's scale
    const int own = min(exponent_of(fmaxf(fmaxf(low_half(scale), high_half(scale)), first * power_of_two(-9))), 100);
    if (!__any_sync(0xffffffffu, own >= e + 6)) return 1.f;
    const int before = e;
    e = __reduce_max_sync(0xffffffffu, own);
    return power_of_two(max(before - e, -126));
  }
};

extern "C" __global__ void __launch_bounds__(256, 1)
kvarn_extend(const float* __restrict__ rotated_q, const u8* __restrict__ records, const int* __restrict__ page_table,
             const int* __restrict__ prefix_lens, const int* __restrict__ exact_starts,
             const int* __restrict__ qo_indptr, float* __restrict__ out, float* __restrict__ lse, int stride_page_table,
             int sm_scale_log2_bits, int splits) {
#ifdef CUDA_ON_CPU
  u8* memory = dynamic_shared;
#else
  extern __shared__ __align__(128) u8 memory[];
#endif
  __shared__ Shared shared;
  // blocks of columns that read the same records are neighbours
  const int head = blockIdx.y % HK, split = blockIdx.y / HK, b = blockIdx.z;
  const int first_token = qo_indptr[b], first_column = blockIdx.x * BLOCK_COLUMNS;
  const int columns = min((qo_indptr[b + 1] - first_token) * GROUP - first_column, BLOCK_COLUMNS);
  if (columns <= 0) return;
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
  // the pages that the first new token, and with it all, reads as records
  const int page = prefix_lens[b] / G, pages = min(max(page - WINDOW, exact_starts[b] / G), page);
  const int begin = pages * split / splits, end = pages * (split + 1) / splits;
  const int num_records = end - begin;
  const int* page_ids = page_table + (long long)b * stride_page_table + begin;
  auto order_record = [&](int n, int id) {
    bulk_copy(memory + n % STAGES * BUFFER, records + ((long long)id * HK + head) * RECORD, RECORD,
              &shared.full[n % STAGES]);
  };
  // the row of a column among the query heads of so many results of each token
  auto row_of = [&](int column, int results, int result) {
    const int c = first_column + column;
    return (((long long)(first_token + c / GROUP) * results + result) * HK + head) * GROUP + c % GROUP;
  };

  if (thread == 0) {
    for (int n = 0; n < STAGES; n++) mbarrier_init(&shared.full[n]);
    for (int n = 0; n < WEIGHT_BUFFERS; n++) {
      mbarrier_init(&shared.ready[n]);
      mbarrier_init(&shared.taken[n], 4);
    }
    fence_init();
    shared.largest = 0;
    for (int n = 0; n < min(STAGES, num_records); n++) order_record(n, page_ids[n]);
  }
  if (thread < BLOCK_COLUMNS) {
    shared.minus_max[thread] = -NONE;
    shared.row[thread] = thread < columns ? (int)row_of(thread, splits + 1, split) : -1;
  }
  __syncthreads();
  // queries are divided by a power of two, the same for the block, so that a score's factor depends on its token only
  int largest = 0;
  for (int n = thread; n < columns * (D / 4); n += 32 * WARPS) {
    const float4 x = *(const float4*)(rotated_q + row_of(n / (D / 4), 1, 0) * D + n % (D / 4) * 4);
    const float parts[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      // what is not finite does not count
      const int bits = __float_as_int(fabsf(parts[i]));
      if (bits < 0x7F800000) largest = max(largest, bits);
    }
  }
  largest = __reduce_max_sync(0xffffffffu, largest);
  if (lane == 0) atomicMax(&shared.largest, largest);
  __syncthreads();
  const int query_exponent = min(max((shared.largest >> 23) - 126, -100), 100) - QUERY_BITS;
  const u32 base = shared_address(memory), queries = base + QUERIES;
  for (int n = thread; n < BLOCK_COLUMNS * PAIRS; n += 32 * WARPS) {
    const int column = n / PAIRS, pair = n % PAIRS;
    const float down = power_of_two(-query_exponent);
    u32 x[4] = {0u, 0u, 0u, 0u};
    if (column < columns) {
      const float* row = rotated_q + row_of(column, 1, 0) * D + 2 * pair;
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float2 f = *(const float2*)(row + D / 4 * k);
        x[k] = pack_half(f.x * down, f.y * down);
      }
    }
    sts128(queries + pair * OPERAND_BYTES + 16 * column, make_uint4(x[0], x[1], x[2], x[3]));
  }
  fence_stores();
  __syncthreads();
  const Exponents exponents(stride_page_table < 0);
  auto record_at = [&](int n) { return base + n % STAGES * BUFFER; };
  auto wait_record = [&](int n) { mbarrier_wait(&shared.full[n % STAGES], n / STAGES & 1); };

  if (__shfl_sync(0xffffffffu, warp, 0) < 4) {
    const float sm_scale = power_of_two(query_exponent) * __int_as_float(sm_scale_log2_bits);
    const u32 totals = base + TOTALS + 8 * thread;
    u32 l[TILES];
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      l[c] = 0u;
      set_total(totals, c, 0.f, 0.f);
    }
    auto attend = [&](const Sums& s, u32 record, int h) {
      const u32 halves = record + SCALES_OFFSET;
      const int m = h % 2, buffer = h % WEIGHT_BUFFERS;
      const u32 weights = base + WEIGHTS + buffer * WEIGHT_BYTES;
      float factor[2];
#pragma unroll
      for (int half = 0; half < 2; half++)
        factor[half] = lds_half(halves + 2 * (K_TOKEN_SCALE + token_of(m, warp, g, half))) * sm_scale;
      if (m == 0 && warp == 0 && g == 0) factor[0] = first_key_scale(halves) * sm_scale;
      if (h >= WEIGHT_BUFFERS) mbarrier_wait(&shared.taken[buffer], (h / WEIGHT_BUFFERS - 1) & 1);
      u32 sums[TILES];
      bool exceeds = weigh(s, factor, sums, shared, weights, warp, lane);
      fence_stores();
      exceeds = vote(SCORING, exceeds);
      if (exceeds) {
        raise(s, factor, l, totals, shared, buffer, warp, lane);
        weigh(s, factor, sums, shared, weights, warp, lane);
        fence_stores();
        sync_group(SCORING);
      }
      if (thread == 0) {
        shared.raised[buffer] = exceeds;
        arrive(&shared.ready[buffer]);
      }
#pragma unroll
      for (int c = 0; c < TILES; c++) l[c] = add_half(l[c], sums[c]);
      if (h % TOTAL_HALVES == TOTAL_HALVES - 1) add_totals(l, totals);
    };
    Sums even, odd;
    if (num_records > 0) wait_record(0);
    order_scores(even, base, queries, 0, warp, lane, exponents);
    for (int n = 0; n < num_records; n++) {
      const u32 record = record_at(n);
      wait_products<0>();
      arrived(even);
      order_scores(odd, record, queries, 1, warp, lane, exponents);
      attend(even, record, 2 * n);
      wait_products<0>();
      arrived(odd);
      // after the last record whatever is there, for nothing: ptxas lets no products be on their way out of a branch
      if (n + 1 < num_records) wait_record(n + 1);
      order_scores(even, record_at(n + 1), queries, 0, warp, lane, exponents);
      attend(odd, record, 2 * n + 1);
    }
    wait_products<0>();
    add_totals(l, totals);
#pragma unroll
    for (int c = 0; c < TILES; c++) {
      float2 total = total_of(totals, c);
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        total.x += __shfl_xor_sync(0xffffffffu, total.x, lanes);
        total.y += __shfl_xor_sync(0xffffffffu, total.y, lanes);
      }
      if (g == 0) *(float2*)&shared.of_warp[warp][8 * c + 2 * q] = total;
    }
    sync_group(SCORING);
    if (thread < BLOCK_COLUMNS) {
      float total = 0.f;
      for (int w = 0; w < 4; w++) total += shared.of_warp[w][thread];
      const bool empty = total == 0.f;
      shared.inverse[thread] = empty ? 0.f : 1.f / total;
      const int row = shared.row[thread];
      if (row >= 0) lse[row] = empty ? MINUS_INF : log2f(total) - shared.minus_max[thread];
    }
    __syncthreads();
  } else {
    const int own = warp - 4;
    ValueExponent exponent;
    Sums o[BLOCKS];
    u32 a[VALUE_SETS][BLOCKS][HALF_STEPS][4];
    for (int n = 0; n < num_records; n++) {
      const u32 record = record_at(n), halves = record + SCALES_OFFSET;
      wait_record(n);
      const float less = exponent.raise(halves, lane);
      if (__any_sync(0xffffffffu, less != 1.f)) {
        wait_products<0>();
#pragma unroll
        for (int k = 0; k < BLOCKS; k++) {
          arrived(o[k]);
#pragma unroll
          for (int i = 0; i < BLOCK_COLUMNS / 2; i++) o[k][i] *= less;
        }
      }
      const float down = power_of_two(-exponent.e);
      u32 channels[BLOCKS][2];
#pragma unroll
      for (int k = 0; k < BLOCKS; k++)
#pragma unroll
        for (int half = 0; half < 2; half++) {
          const float scale = lds_half(halves + 2 * (V_CHANNEL_SCALE + ValueBlock(k, own).channel(half, g))) * down;
          channels[k][half] = pack_half(scale, scale);
        }
#pragma unroll
      for (int m = 0; m < 2; m++) {
        const int h = 2 * n + m, buffer = h % WEIGHT_BUFFERS;
        if (VALUE_SETS == 1) wait_products<0>();
        unpack_values(a[m % VALUE_SETS], channels, down, record, m, own, lane, exponents);
        mbarrier_wait(&shared.ready[buffer], h / WEIGHT_BUFFERS & 1);
        if (__any_sync(0xffffffffu, shared.raised[buffer])) {
          wait_products<0>();
#pragma unroll
          for (int k = 0; k < BLOCKS; k++) {
            arrived(o[k]);
#pragma unroll
            for (int i = 0; i < BLOCK_COLUMNS / 2; i++) o[k][i] *= shared.alpha[buffer][8 * (i / 4) + 2 * q + i % 2];
          }
        }
        const Operand weights(base + WEIGHTS + buffer * WEIGHT_BYTES);
        fence_registers();
#pragma unroll
        for (int k = 0; k < BLOCKS; k++)
#pragma unroll
          for (int step = 0; step < HALF_STEPS; step++) product_half(o[k], a[m % VALUE_SETS][k][step], weights[step], h + step > 0);
        commit_products();
        // the products before these are done
        if (VALUE_SETS > 1) wait_products<1>();
        if (h > 0 && lane == 0) arrive(&shared.taken[(h - 1) % WEIGHT_BUFFERS]);
      }
      // everyone has left the record: its weights were ready
      sync_group(SUMMING);
      if (thread == 128 && n + STAGES < num_records) order_record(n + STAGES, page_ids[n + STAGES]);
    }
    wait_products<0>();
    __syncthreads();
    const float up = power_of_two(exponent.e);
#pragma unroll
    for (int k = 0; k < BLOCKS; k++) {
      arrived(o[k]);
      const ValueBlock block(k, own);
#pragma unroll
      for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const int column = 8 * c + 2 * q + i, row = shared.row[column];
          const float factor = shared.inverse[column] * up;
          if (row < 0) continue;
#pragma unroll
          for (int half = 0; half < 2; half++)
            // a split without pages has summed nothing, not even zeros
            out[(long long)row * D + block.channel(half, g)] =
                factor == 0.f ? 0.f : o[k][4 * c + 2 * half + i] * factor;
        }
    }
  }
}
