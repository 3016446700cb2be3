// SPDX-License-Identifier: Apache-2.0
// Decode attention of many columns for sm_90a, by products of a warpgroup; the same contract as decode.py.
//
// For verify steps: a column is a query head for a draft. One block, a warpgroup, per split, KV head and BLOCK_COLUMNS
// columns. Codes are the operand from registers, so that they are unpacked once whatever the number of columns:
//
//     scores^T [64 tokens, columns]   = codes [64 tokens, D] x folded queries^T [D, columns]
//     out^T    [64 channels, columns] = codes^T [64 channels, 128 tokens] x folded weights^T [128 tokens, columns]
//
// A field of codes that is masked where it stands, in the mantissa of an fp16 number, is that number: code x 2^(bit - 24).
// Such numbers are subnormal, which matrix instructions take as they are, so unpacking is one instruction for each pair of
// codes, and no offset has to be subtracted. 2^bit is folded into the queries (keys) or into the sums (values).
// Scales of channels of keys are folded into the queries, which are therefore written again for each record; scales of
// tokens of values into the weights. What the zeros add is summed before the products: for keys a number per column
// and warp, for values one for each 4 tokens and column; one more step, or two, with codes of one add these sums.
//
// The four warps share a tile: 16 of 64 rows each. Maxima belong to the block. Weights are computed with the maximum
// that is kept; the barrier behind them is also the vote whether a score exceeds it by 2^LAG, and only then the maximum
// is raised and the weights are computed again. Two barriers a record:
//
//     queries of record n ready    | products of keys, weights
//     weights ready                | products of values; meanwhile the queries of record n + 1 are folded
//
// Instructions of a warp for a record, by SASS, k4v2 at head_dim 128; a multiprocessor issues one for each of four warps
// in a clock, so they are the clocks of a record where nothing waits. Memory allows for one in about 790 clocks (H200).
//
//     columns   all     unpacking   products   a column's: 8 to 9 for each of its scores   registers   blocks
//     16        604     168         38         16 scores a lane                            128         4
//     32        836     168         38         32                                          168         3
//     64        1,237   168         38         64                                          255         2
//
// Measured (H200, 64 requests of 16,320 tokens, 16 columns): 428 us, 1,450 clocks a record, so that something else bounds
// it; by mma.sync, two tiles of 8 columns a block, 470. 8 requests of 32,704: 127 and 128, with 32 columns 160 and 232.
//
// Exact tokens, first tokens of the pages and then those of the ring, arrive in the same buffers as records do, one row
// of key and value each, EXACT_ROWS in a buffer, and are attended in the same way after the records.
// Lane 4 g + q. The constants in capitals that are not set here come from columns_sm90.py.

#include "device/exponents.cuh"
#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "read/code_words.cuh"
#include "record/unpack.cuh"

constexpr int WARPS = 4;
constexpr int COLUMNS = DRAFTS * GROUP;   // of a KV head
constexpr int ATTENDED = BLOCK_COLUMNS;   // columns of a block
constexpr int COLUMN_BLOCKS = (COLUMNS + ATTENDED - 1) / ATTENDED;
constexpr int TILES = BLOCK_COLUMNS / 8;  // of 8 columns
constexpr int STEPS = D / 16;             // depth-16 steps over the channels
constexpr int BLOCKS = D / 64;            // blocks of 64 channels
constexpr int TOKEN_BLOCKS = G / 64;
constexpr int TOKEN_STEPS = G / 16;
constexpr int WARP_STEPS = STEPS / 4;     // steps whose queries a warp folds
constexpr int WARP_PAIRS = 2 * WARP_STEPS;
constexpr int EXACT_STRIDE = 4 * D + 16;  // bytes from one exact token to the next; matrices of 8 rows have no conflicts
constexpr int EXACT_ROWS = BUFFER / EXACT_STRIDE < 64 ? BUFFER / EXACT_STRIDE : 64;
constexpr int EXACT_STEPS = (EXACT_ROWS + 15) / 16;
// shared memory: buffers; queries of a record, with a step for its zeros; weights, with two; the queries that are folded,
// later the low parts of exact ones; 16 bytes of zeros
constexpr int QUERIES = STAGES * BUFFER;
constexpr int WEIGHTS = QUERIES + (2 * STEPS + 1) * OPERAND_BYTES;
constexpr int QUERY = WEIGHTS + (G / 8 + 4) * OPERAND_BYTES;
constexpr int ZEROS = QUERY + 2 * STEPS * OPERAND_BYTES;
static_assert(ZEROS + 16 == SHARED_BYTES && WARP_PAIRS % K_PAIRS == 0, "");
constexpr float LAG = 4.0f;               // how far a score may exceed the kept maximum, log2
constexpr float NONE = -1e30f;            // the maximum before there is a score
// folded queries are 2^QUERY_BITS times as large as normalised ones, less 2^bit of their codes
constexpr int QUERY_BITS = 6;
#define MINUS_INF __int_as_float(0xff800000)

struct __align__(16) Shared {
  float2 softmax[BLOCK_COLUMNS];  // of a column: factor of its scores (log2), minus the maximum
  int2 sight[BLOCK_COLUMNS];      // the first token that it reads exactly, the newest that it sees
  float down[BLOCK_COLUMNS];      // power of two that normalises its query
  float of_warp[WARPS][BLOCK_COLUMNS];
  u64 full[STAGES];
};

__device__ __forceinline__ void load_pairs(u32 (&x)[WARP_PAIRS], u32 at) {
#pragma unroll
  for (int n = 0; n < WARP_PAIRS; n += 2) {
    if (WARP_PAIRS % 4 == 0) {
      if (n % 4) continue;
      const uint4 y = lds128(at + 4 * n);
      x[n] = y.x; x[n + 1] = y.y; x[(n + 2) % WARP_PAIRS] = y.z; x[(n + 3) % WARP_PAIRS] = y.w;
    } else {
      const uint2 y = lds64(at + 4 * n);
      x[n] = y.x; x[n + 1] = y.y;
    }
  }
}

// where the fp16 queries of a lane's column of tile c are, channels D / 4 * q + 2 WARP_PAIRS * warp and those behind
__device__ __forceinline__ u32 query_of(u32 base, int c, int warp, int lane) {
  return base + QUERY + 4 * WARP_PAIRS * (32 * (TILES * warp + c) + lane);
}

// write the queries for a record: times its channel scales, and what its zeros add
__device__ __forceinline__ void fold(u32 base, u32 record, int warp, int lane) {
  const u32 queries = base + QUERIES;
  const int g = lane / 4, q = lane % 4;
  const u32 at = record + SCALES_OFFSET + 2 * (D / 4 * q + 2 * WARP_PAIRS * warp);
  u32 scales[WARP_PAIRS], zeros[WARP_PAIRS];
  load_pairs(scales, at + 2 * K_CHANNEL_SCALE);
  load_pairs(zeros, at + 2 * K_CHANNEL_ZERO);
#pragma unroll
  for (int n = 0; n < WARP_PAIRS; n++) {
    // 2^(bit - QUERY_BITS), as an fp16 pair
    const u32 power = (15 + bit_of<K_BITS>(n % K_PAIRS) - QUERY_BITS) << 10;
    if (bit_of<K_BITS>(n % K_PAIRS) != QUERY_BITS) zeros[n] = multiply_half(zeros[n], power | power << 16);
  }
#pragma unroll
  for (int c = 0; c < TILES; c++) {
    float zero[4] = {0.f, 0.f, 0.f, 0.f};
    u32 own[WARP_PAIRS], folded[WARP_PAIRS];
    load_pairs(own, query_of(base, c, warp, lane));
#pragma unroll
    for (int n = 0; n < WARP_PAIRS; n++) folded[n] = multiply_half(own[n], scales[n]);
#pragma unroll
    for (int n = 0; n < WARP_PAIRS; n += 2)
      mma_half(zero, zeros[n], zeros[n], zeros[n + 1], zeros[n + 1], own[n], own[n + 1]);
    const u32 row = queries + WARP_PAIRS * warp * OPERAND_BYTES + 128 * c + 16 * (lane % 8);
#pragma unroll
    for (int n = 0; n < WARP_PAIRS; n += 2) {
      if (WARP_PAIRS % 4 == 0) {
        if (n % 4) continue;
        u32 x[4] = {folded[n], folded[n + 1], folded[(n + 2) % WARP_PAIRS], folded[(n + 3) % WARP_PAIRS]};
        store_matrices(row + (n + lane / 8) * OPERAND_BYTES, x);
      } else {
        u32 x[2] = {folded[n], folded[n + 1]};
        store_matrices(row + (n + lane / 8 % 2) * OPERAND_BYTES, x);
      }
    }
    // the sum as two fp16 numbers, elements 2 warp and 2 warp + 1 of the last step
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float high = __int_as_float(__float_as_int(zero[i]) & 0xFFFFE000);
      const u32 x = pack_half(high, zero[i] - high);
      if (g == 0) sts32(queries + 2 * STEPS * OPERAND_BYTES + 128 * c + 16 * (2 * q + i) + 4 * warp, x);
    }
  }
}

// Products are ordered in groups of GROUP_STEPS steps; the codes of three groups are in registers at most, which leaves
// enough for everything else.
constexpr int GROUP_STEPS = 4;

// group: of its phase
__device__ __forceinline__ void make_room(int group) {
  if (group > 2) wait_products<2>();
}

// order the products of the keys' codes with the folded queries
__device__ __forceinline__ void score_record(Sums (&s)[TOKEN_BLOCKS], u32 record, u32 queries, int warp, int g, int q) {
  const Operand b(queries), zeros(queries + 2 * STEPS * OPERAND_BYTES, 0);
#pragma unroll
  for (int m = 0; m < TOKEN_BLOCKS; m++) {
    u32 words[2][K_LANE_WORDS], tops[2][K_LANE_WORDS];
    load_key_words(words, tops, record, m, warp, g, q);
#pragma unroll
    for (int first = 0; first < STEPS; first += GROUP_STEPS) {
      make_room((STEPS * m + first) / GROUP_STEPS);
      u32 a[GROUP_STEPS][4];
#pragma unroll
      for (int n = 0; n < GROUP_STEPS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int pair = 2 * (first + n) + i / 2;
          a[n][i] = unpack_in_place<K_BITS>(words[i % 2][pair / K_PAIRS], tops[i % 2][pair / K_PAIRS], pair % K_PAIRS);
        }
      fence_registers();
#pragma unroll
      for (int n = 0; n < GROUP_STEPS; n++)
        if (first + n == 0) product_half<false>(s[m], a[n], b[0]);
        else product_half<true>(s[m], a[n], b[first + n]);
      if (first + GROUP_STEPS == STEPS) {
        // 2^QUERY_BITS times the code one, in the elements that `fold` has filled
        const u32 ones[4] = {0x00010001u << QUERY_BITS, 0x00010001u << QUERY_BITS, 0u, 0u};
        product_half<true>(s[m], ones, zeros[0]);
      }
      commit_products();
    }
  }
}

// order the products of the values' codes with the weights
__device__ __forceinline__ void sum_record(Sums (&o)[BLOCKS], u32 record, u32 weights, int warp, int g, int q) {
  const Operand b(weights);
  u32 words[TOKEN_STEPS], tops[TOKEN_STEPS];
#pragma unroll
  for (int m = 0; m < BLOCKS; m++) {
    const ValueBlock block(m, warp);
    const int part = block.known_part(m);
    if (part == 0) load_value_words(words, tops, record, 0, block, g, q);
#pragma unroll
    for (int first = 0; first < TOKEN_STEPS; first += GROUP_STEPS) {
      make_room((TOKEN_STEPS * m + first) / GROUP_STEPS);
      u32 a[GROUP_STEPS][4];
#pragma unroll
      for (int n = 0; n < GROUP_STEPS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          a[n][i] = unpack_in_place<V_BITS>(words[first + n], tops[first + n], i / 2 * V_CB + 2 * part + i % 2);
      fence_registers();
#pragma unroll
      for (int n = 0; n < GROUP_STEPS; n++)
        if (first + n == 0) product_half<false>(o[m], a[n], b[0]);
        else product_half<true>(o[m], a[n], b[first + n]);
      if (first + GROUP_STEPS == TOKEN_STEPS) {
        const u32 one = 0x00010001u << bit_of<V_BITS>(2 * part), other = one << V_FIELD_BITS;
        const u32 ones[4] = {one, other, one, other};
#pragma unroll
        for (int n = 0; n < 2; n++) product_half<true>(o[m], ones, b[TOKEN_STEPS + n]);
      }
      commit_products();
    }
  }
}

// out += sums of a record's codes, times the channel scales
__device__ __forceinline__ void add_record(Sums (&out)[BLOCKS], Sums (&o)[BLOCKS], u32 record, int warp, int g) {
#pragma unroll
  for (int m = 0; m < BLOCKS; m++) {
    const ValueBlock block(m, warp);
    const int part = block.known_part(m);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      const float unit = power_of_two(24 - bit_of<V_BITS>(2 * part + half));
      const float scale = lds_half(record + SCALES_OFFSET + 2 * (V_CHANNEL_SCALE + block.channel(half, g))) * unit;
#pragma unroll
      for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int i = 0; i < 2; i++)
          out[m][4 * c + 2 * half + i] = fmaf(o[m][4 * c + 2 * half + i], scale, out[m][4 * c + 2 * half + i]);
    }
  }
}

// of the tokens of rows g and g + 8 of each block: factors of the weights and what their zeros add
template <int ROWS>
struct TokenScales { float scale[ROWS][2], zero[ROWS][2]; };

// write the weights of 64 ROWS tokens by the maxima that are kept; sum: of each column; returns the largest exponent
template <int ROWS, bool IS_RECORD>
__device__ __forceinline__ float weigh(const Sums (&s)[ROWS], const TokenScales<ROWS>& tokens, float (&sum)[2 * TILES],
                                       const Shared& shared, u32 weights, int warp, int lane) {
  const int q = lane % 4, matrix = lane / 8 % (2 * ROWS);
  const u32 row = weights + (8 * (matrix / 2) + 2 * warp + matrix % 2) * OPERAND_BYTES + 16 * (lane % 8);
  float largest = MINUS_INF;
  u32 zeros[TILES];
#pragma unroll
  for (int c = 0; c < TILES; c++) {
    const float4 t = *(const float4*)&shared.softmax[8 * c + 2 * q];
    u32 packed[2 * ROWS];
    float zero[2] = {0.f, 0.f};
    sum[2 * c] = sum[2 * c + 1] = 0.f;
#pragma unroll
    for (int m = 0; m < ROWS; m++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const float x0 = fmaf(s[m][4 * c + 2 * half], t.x, t.y), x1 = fmaf(s[m][4 * c + 2 * half + 1], t.z, t.w);
        largest = fmaxf(largest, fmaxf(x0, x1));
        const float p0 = exp2_fast(x0), p1 = exp2_fast(x1);
        sum[2 * c] += p0;
        sum[2 * c + 1] += p1;
        if (IS_RECORD) {
          packed[2 * m + half] = pack_half(p0 * tokens.scale[m][half], p1 * tokens.scale[m][half]);
          zero[0] = fmaf(p0, tokens.zero[m][half], zero[0]);
          zero[1] = fmaf(p1, tokens.zero[m][half], zero[1]);
        } else {
          packed[2 * m + half] = BF16 ? pack_bf16(p0, p1) : pack_half(p0, p1);
        }
      }
    store_transposed(row + 128 * c, packed);
    zeros[c] = pack_half(zero[0], zero[1]);
  }
  if (IS_RECORD) {
    const u32 at = weights + (G / 8 + warp) * OPERAND_BYTES + 16 * (lane % 8);
#pragma unroll
    for (int c = 0; c + 2 <= TILES; c += 2) {
      const u32 x[2] = {zeros[c], zeros[c + 1]};
      store_transposed(at + 128 * (c + lane / 8 % 2), x);
    }
    if (TILES % 2) {
      const u32 x[1] = {zeros[TILES - 1]};
      store_transposed(at + 128 * (TILES - 1), x);
    }
  }
  return largest;
}

// The running state of a block's columns; the maxima are in shared memory.
struct State {
  Sums out[BLOCKS];
  float l[2 * TILES];  // this lane's share
};

// raise the maxima to the largest scores
template <int ROWS>
__device__ __forceinline__ void raise(const Sums (&s)[ROWS], State& state, Shared& shared, int warp, int lane) {
  const int g = lane / 4, q = lane % 4;
#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float largest = MINUS_INF;
#pragma unroll
      for (int m = 0; m < ROWS; m++) largest = fmaxf(largest, fmaxf(s[m][4 * c + i], s[m][4 * c + 2 + i]));
      for (int lanes = 4; lanes < 32; lanes *= 2)
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      if (g == 0) shared.of_warp[warp][8 * c + 2 * q + i] = largest;
    }
  __syncthreads();
  const int column = threadIdx.x;
  if (column < BLOCK_COLUMNS) {
    float largest = MINUS_INF;
    for (int w = 0; w < WARPS; w++) largest = fmaxf(largest, shared.of_warp[w][column]);
    const float2 t = shared.softmax[column];
    const float m = fmaxf(-t.y, largest * t.x);
    shared.of_warp[0][column] = exp2_fast(-t.y - m);
    shared.softmax[column] = make_float2(t.x, -m);
  }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float alpha = shared.of_warp[0][8 * c + 2 * q + i];
      state.l[2 * c + i] *= alpha;
#pragma unroll
      for (int m = 0; m < BLOCKS; m++) {
        state.out[m][4 * c + i] *= alpha;
        state.out[m][4 * c + 2 + i] *= alpha;
      }
    }
}

// write the weights of the scores, for all warps to read
template <int ROWS, bool IS_RECORD>
__device__ __forceinline__ void attend(const Sums (&s)[ROWS], const TokenScales<ROWS>& tokens, State& state,
                                       Shared& shared, u32 weights, int warp, int lane) {
  float sum[2 * TILES];
  while (true) {
    const float largest = weigh<ROWS, IS_RECORD>(s, tokens, sum, shared, weights, warp, lane);
    fence_stores();
    if (!__syncthreads_or(largest > LAG)) break;
    raise(s, state, shared, warp, lane);
  }
#pragma unroll
  for (int n = 0; n < 2 * TILES; n++) state.l[n] += sum[n];
}

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS)
kvarn_decode_columns(const float* __restrict__ rotated_q, const u8* __restrict__ records,
                     const int* __restrict__ ring_pages, const int* __restrict__ page_table,
                     const int* __restrict__ seq_lens, const int* __restrict__ exact_starts,
                     const int* __restrict__ requests, const int* __restrict__ indptr, float* __restrict__ out,
                     float* __restrict__ lse, int stride_page_table, int sm_scale_log2_bits, int batch_size) {
  const float sm_scale_log2 = __int_as_float(sm_scale_log2_bits);
  DYNAMIC_SHARED(memory);
  __shared__ Shared shared;
  const int split = blockIdx.x, head = blockIdx.y / COLUMN_BLOCKS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int b = requests[split];  // read before it is known to be one, so that the two reads are one wait
  if (split >= indptr[batch_size]) return;
#include "read/split.cuh"
  // what arrives in buffers: the records, then the exact tokens: the first tokens of their pages, then those of the ring
  const int num_records = max(end - begin, 0), num_exact = num_records + max(ring_end - ring_begin, 0);
  const int arrivals = num_records + (num_exact + EXACT_ROWS - 1) / EXACT_ROWS;
  auto order_record = [&](int n, int page) {
    bulk_copy(memory + n % STAGES * BUFFER, page_at(page), RECORD, &shared.full[n % STAGES]);
  };
  // by a warp
  auto order_exact = [&](int n) {
    const int first = (n - num_records) * EXACT_ROWS, rows = min(EXACT_ROWS, num_exact - first);
    u64* bar = &shared.full[n % STAGES];
    if (lane == 0) expect(bar, rows * (4 * D));
    __syncwarp();
    for (int row = lane; row < rows; row += 32) {
      const int token = ring_begin + first + row - num_records;
      const u8* source = first + row < num_records
          ? record_of(begin + first + row) + SCALES_OFFSET + 2 * K_FIRST
          : page_at(ring_pages[token / RING_TOKENS % RING_PAGES]) + token % RING_TOKENS * (4 * D);
      copy(memory + n % STAGES * BUFFER + row * EXACT_STRIDE, source, 4 * D, bar);
    }
  };
  int next_page = 0;  // of the next record to be ordered
  if (warp == 0) {
    if (lane < STAGES) {
      mbarrier_init(&shared.full[lane]);
      fence_init();
      if (lane < num_records) order_record(lane, pages[begin + lane]);
    }
    __syncwarp();
    for (int n = num_records; n < min(STAGES, arrivals); n++) order_exact(n);
    if (STAGES < num_records) next_page = pages[begin + STAGES];
  }
  // by the first warp, when everyone has left the buffer
  auto order = [&](int n) {
    if (n >= arrivals) return;
    if (n < num_records) {
      if (lane == 0) order_record(n, next_page);
      if (n + 1 < num_records) next_page = pages[begin + n + 1];
    } else {
      order_exact(n);
    }
  };
  auto query_row = [&](int column) {
    return column < columns ? rotated_q + (long long)row_of(b, column) * D : nullptr;
  };

  // what is known of each column; its query is divided by a power of two
  for (int c = warp; c < TILES; c += WARPS) {
    const int column = 8 * c + g, draft = min((first_column + column) / GROUP, DRAFTS - 1);
    const float* row = query_row(column);
    float largest = 0.f;
    for (int n = 0; n < D / 4; n += 4) {
      float4 f = row ? *(const float4*)(row + D / 4 * q + n) : make_float4(0.f, 0.f, 0.f, 0.f);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(f.x), fabsf(f.y)), fmaxf(fabsf(f.z), fabsf(f.w))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const int exponent = min(max(((__float_as_int(largest) >> 23) & 0xFF) - 126, -100), 100);
    if (q == 0) {
      shared.softmax[column] = make_float2(power_of_two(exponent) * sm_scale_log2, -NONE);
      shared.sight[column] = make_int2(exact_page_of(draft) * G, position + draft);
      shared.down[column] = power_of_two(-exponent);
    }
  }
  if (threadIdx.x < 4) sts32(shared_address(memory + ZEROS) + 4 * threadIdx.x, 0u);
  __syncthreads();
  const u32 base = shared_address(memory), queries = base + QUERIES, weights = base + WEIGHTS;
#pragma unroll
  for (int c = 0; c < TILES; c++) {
    const float* row = query_row(8 * c + g);
    const float down = shared.down[8 * c + g];
#pragma unroll
    for (int n = 0; n < WARP_PAIRS; n++) {
      const float factor = down * power_of_two(QUERY_BITS - bit_of<K_BITS>(n % K_PAIRS));
      const float2 f = row ? *(const float2*)(row + D / 4 * q + 2 * (WARP_PAIRS * warp + n)) : make_float2(0.f, 0.f);
      sts32(query_of(base, c, warp, lane) + 4 * n, pack_half(f.x * factor, f.y * factor));
    }
  }
  State state;
#pragma unroll
  for (int m = 0; m < BLOCKS; m++)
#pragma unroll
    for (int n = 0; n < BLOCK_COLUMNS / 2; n++) state.out[m][n] = 0.f;
#pragma unroll
  for (int n = 0; n < 2 * TILES; n++) state.l[n] = 0.f;

  int stage = 0;
  u32 parity = 0;
  auto leave = [&]() {
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  };
  if (num_records > 0) {
    mbarrier_wait(&shared.full[0], 0);
    fold(base, base, warp, lane);
  }
  for (int n = 0; n < num_records; n++) {
    fence_stores();
    __syncthreads();
    if (warp == 0 && n > 0) order(n - 1 + STAGES);
    const u32 record = base + stage * BUFFER, halves = record + SCALES_OFFSET;
    Sums s[TOKEN_BLOCKS];
    score_record(s, record, queries, warp, g, q);
    wait_products<0>();
    TokenScales<TOKEN_BLOCKS> tokens;
#pragma unroll
    for (int m = 0; m < TOKEN_BLOCKS; m++) {
      arrived(s[m]);
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int token = token_of(m, warp, g, half);
        const float scale = lds_half(halves + 2 * (K_TOKEN_SCALE + token)) * power_of_two(24 - QUERY_BITS);
        tokens.scale[m][half] = lds_half(halves + 2 * (V_TOKEN_SCALE + token));
        tokens.zero[m][half] = lds_half(halves + 2 * (V_TOKEN_ZERO + token));
#pragma unroll
        for (int i = 0; i < BLOCK_COLUMNS / 2; i++)
          if (i / 2 % 2 == half) s[m][i] *= scale;
      }
    }
    // token 0 is attended exactly, with the other first tokens
    if (threadIdx.x < 4)
#pragma unroll
      for (int i = 0; i < BLOCK_COLUMNS / 2; i++)
        if (i / 2 % 2 == 0) s[0][i] = MINUS_INF;
    if (DRAFTS > 1 && begin + n >= first_exact) {
#pragma unroll
      for (int i = 0; i < BLOCK_COLUMNS / 2; i++)
        if ((begin + n) * G >= shared.sight[8 * (i / 4) + 2 * q + i % 2].x)
#pragma unroll
          for (int m = 0; m < TOKEN_BLOCKS; m++) s[m][i] = MINUS_INF;
    }
    attend<TOKEN_BLOCKS, true>(s, tokens, state, shared, weights, warp, lane);
    Sums o[BLOCKS];
    sum_record(o, record, weights, warp, g, q);
    leave();
    // the registers of all products but the last group's are free from here on
    wait_products<1>();
    if (n + 1 < num_records) {
      mbarrier_wait(&shared.full[stage], parity);
      fold(base, base + stage * BUFFER, warp, lane);
    }
    wait_products<0>();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) arrived(o[m]);
    add_record(state.out, o, record, warp, g);
  }

  // the queries in the model's dtype. Two bfloat16 stand for a float32: 8 bits of the rotated query are fewer than the
  // model's own query had
  if (num_records < arrivals) {
    __syncthreads();
    for (int n = threadIdx.x; n < BLOCK_COLUMNS * (D / 8); n += 32 * WARPS) {
      const int column = n % BLOCK_COLUMNS, chunk = n / BLOCK_COLUMNS;
      const float* row = query_row(column);
      const float down = shared.down[column];
      u32 high[4], low[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float2 f = row ? *(const float2*)(row + 8 * chunk + 2 * k) : make_float2(0.f, 0.f);
        const float x = f.x * down, y = f.y * down;
#if BF16
        high[k] = pack_bf16(x, y);
        low[k] = pack_bf16(x - __int_as_float(high[k] << 16), y - __int_as_float(high[k] & 0xffff0000u));
#else
        high[k] = pack_half(x, y);
#endif
      }
      const u32 at = chunk * OPERAND_BYTES + 16 * column;
      sts128(queries + at, make_uint4(high[0], high[1], high[2], high[3]));
      if (BF16) sts128(base + QUERY + at, make_uint4(low[0], low[1], low[2], low[3]));
    }
  }
  for (int n = num_records; n < arrivals; n++) {
    fence_stores();
    __syncthreads();
    if (warp == 0 && n > 0) order(n - 1 + STAGES);
    mbarrier_wait(&shared.full[stage], parity);
    const u32 page = base + stage * BUFFER;
    const int first = (n - num_records) * EXACT_ROWS, rows = min(EXACT_ROWS, num_exact - first);
    Sums s[1];
    u32 a[STEPS][4];
    const u32 keys = page + min(16 * warp + lane % 16, rows - 1) * EXACT_STRIDE + 16 * (lane / 16);
#pragma unroll
    for (int k = 0; k < STEPS; k++) load_matrices(a[k], keys + 32 * k);
    const Operand high(queries), low(base + QUERY);
    fence_registers();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
      if (k == 0) product_exact<false>(s[0], a[k], high[0]);
      else product_exact<true>(s[0], a[k], high[k]);
    if (BF16)
#pragma unroll
      for (int k = 0; k < STEPS; k++) product_exact<true>(s[0], a[k], low[k]);
    commit_products();
    wait_products<0>();
    arrived(s[0]);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      // a first token is seen by columns that read its page as a record, a token of the ring by those that do not
      const int row = 16 * warp + g + 8 * half, i = first + row;
      const bool in_ring = i >= num_records;
      const int token = in_ring ? ring_begin + i - num_records : (begin + i) * G;
#pragma unroll
      for (int c = 0; c < TILES; c++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const int2 sight = shared.sight[8 * c + 2 * q + k];
          const bool sees = row < rows && (token >= sight.x) == in_ring && token <= sight.y;
          if (!sees) s[0][4 * c + 2 * half + k] = MINUS_INF;
        }
    }
    attend<1, false>(s, TokenScales<1>(), state, shared, weights, warp, lane);
    const Operand b(weights);
    Sums o[BLOCKS];
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
      const ValueBlock block(m, warp);
      u32 v[EXACT_STEPS][4];
#pragma unroll
      for (int k = 0; k < EXACT_STEPS; k++) {
        const int token = 16 * k + lane % 8 + 8 * (lane / 16);
        load_transposed(v[k], token < rows ? page + token * EXACT_STRIDE + 2 * (D + block.channel(lane / 8 % 2, 0)) : base + ZEROS);
      }
      fence_registers();
#pragma unroll
      for (int k = 0; k < EXACT_STEPS; k++)
        if (k == 0) product_exact<false>(o[m], v[k], b[0]);
        else product_exact<true>(o[m], v[k], b[k]);
      commit_products();
    }
    wait_products<0>();
#pragma unroll
    for (int m = 0; m < BLOCKS; m++) {
      arrived(o[m]);
#pragma unroll
      for (int i = 0; i < BLOCK_COLUMNS / 2; i++) state.out[m][i] += o[m][i];
    }
    leave();
  }

#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float& l = state.l[2 * c + i];
      for (int lanes = 4; lanes < 32; lanes *= 2) l += __shfl_xor_sync(0xffffffffu, l, lanes);
      if (g == 0) shared.of_warp[warp][8 * c + 2 * q + i] = l;
    }
  __syncthreads();
#pragma unroll
  for (int c = 0; c < TILES; c++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int column = 8 * c + 2 * q + i;
      if (column >= columns) continue;
      float l = 0.f;
      for (int w = 0; w < WARPS; w++) l += shared.of_warp[w][column];
      const float inverse = l == 0.f ? 0.f : 1.f / l;
      const long long row = row_of(split, column);
      if (warp == 0 && g == 0) lse[row] = l == 0.f ? MINUS_INF : -shared.softmax[column].y + log2f(l);
#pragma unroll
      for (int m = 0; m < BLOCKS; m++)
#pragma unroll
        for (int half = 0; half < 2; half++)
          out[row * D + ValueBlock(m, warp).channel(half, g)] = state.out[m][4 * c + 2 * half + i] * inverse;
    }
}
