// SPDX-License-Identifier: Apache-2.0
// Encode pages into records, CUDA form; the contract and the bytes of encode.py.
//
// One block encodes one side (keys or values) of a page and KV head. T[ROWS, COLS] is the transposed keys (rows are
// channels) or the values (rows are tokens); a thread keeps a patch of 8 channels x TB tokens in registers for the
// whole time. A sum over a row is a few shuffles among the LANES threads that share its group of rows, a sum over a
// column goes through shared memory. As in the oracle, elementwise arithmetic is float32 without contraction (the
// intrinsics below) and sums are float64, so that their order does not reach a byte.
//
// The constants in capitals that are not set here come from encode_cuda.py.

#include "device/early_start.cuh"
#include "device/exponents.cuh"

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

constexpr int THREADS = D / 8 * (G / TB);
constexpr int TABLE_ROW = D + 4;  // bytes of a token in the table of codes; 4 more keep its columns apart in the banks
constexpr u32 ALL = 0xffffffffu;

#ifndef CUDA_ON_CPU  // tests/kernels/cuda_on_cpu.h has its own
__device__ __forceinline__ float from_half(u16 h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
  return f;
}
__device__ __forceinline__ u16 to_half(float f) {
  u16 h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
  return h;
}
#endif

__device__ __forceinline__ float clamp(float x, float low, float high) { return fminf(fmaxf(x, low), high); }

// a 16-bit float with NaN as 0 and, if it can be larger, clamped to LARGEST; an fp16 infinity is clamped when read
__device__ __forceinline__ u32 sanitise(u32 bits) {
#if BF16
  const float x = __int_as_float(bits << 16);
  return x == x ? (u32)__float_as_int(clamp(x, -LARGEST, LARGEST)) >> 16 : 0u;
#else
  return (bits & 0x7fffu) > 0x7c00u ? 0u : bits;
#endif
}

__device__ __forceinline__ float round_cross(float x) { return from_half(to_half(clamp(x, 0x1p-13f, 0x1p13f))); }
__device__ __forceinline__ u16 saturated_half(float x) { return to_half(clamp(x, -65504.0f, 65504.0f)); }

__device__ __forceinline__ float std_of(double total, double squares, double count) {
  double variance = (squares - total * total / count) / count;
  float root = __fsqrt_rn((float)(variance > 0.0 ? variance : 0.0));
  return root > 0.0f ? root : 1.0f;
}

__device__ __forceinline__ float ratio_of(double power, double overlap) {
  return clamp(overlap > 0.0 ? (float)(power / overlap) : 1.0f, 0.25f, 4.0f);
}

// the floor of 0 <= x < 2^23, and an integer below 2^32 as a double, without the slow conversions (16 a cycle)
__device__ __forceinline__ u32 floor_of(float x) { return (u32)__float_as_int(__fadd_rz(x, 0x1p23f)) & 0x7fffffu; }
__device__ __forceinline__ double to_double(u32 n) { return __hiloint2double(0x43300000, n) - 4503599627370496.0; }

// where the rows of a page are: in the ring for positions below ring_end, else in the chunk
struct Source {
  const u8* records;        // all pages; of the KV head, and for values one key later
  const int* ring_pages;    // of the request
  const u16* chunk;         // of the KV head; chunk[0] is position ring_end
  int first, ring_end;      // position of token 0 of the page

  __device__ const u16* row(int token) const {
    const int position = first + token;
    if (position >= ring_end) return chunk + (long long)(position - ring_end) * (HK * D);
    const long long page = ring_pages[position / RING_TOKENS % RING_PAGES];
    return (const u16*)(records + page * (HK * RECORD)) + position % RING_TOKENS * (2 * D);
  }
};

template <bool KEYS>
struct Side {
  static constexpr int ROWS = KEYS ? D : G, COLS = KEYS ? G : D;
  static constexpr int RB = KEYS ? 8 : TB, CB = KEYS ? TB : 8;  // rows and columns of a patch
  static constexpr int LANES = COLS / CB, GROUPS = ROWS / RB;
  static constexpr int BITS = KEYS ? K_BITS : V_BITS, LEVELS = (1 << BITS) - 1, ROUNDS = KEYS ? K_ROUNDS : V_ROUNDS;
  // token 0 is left out: a column of the keys, a row of the values
  static constexpr double ROW_COUNT = KEYS ? G - 1 : D, COL_COUNT = KEYS ? D : G - 1;

  double* sums;     // shared [GROUPS][COLS]
  float* cross;     // shared [COLS], column CB x + j at LANES j + x
  int x, y;         // columns CB x + j, rows RB y + i of this thread
  u32 t[TB][4];     // pairs of channels of TB tokens

  __device__ Side(double* sums, float* cross)
      : sums(sums), cross(cross), x(threadIdx.x % LANES), y(threadIdx.x / LANES) {}

  __device__ bool is_valid(int j) const { return !KEYS || x > 0 || j > 0; }

  __device__ void load(const Source& source) {
#pragma unroll
    for (int n = 0; n < TB; n++) {
      const int token = TB * (KEYS ? x : y) + n;
      const uint4 raw = *(const uint4*)(source.row(token) + 8 * (KEYS ? y : x));
      const u32 words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
      for (int m = 0; m < 4; m++)
        t[n][m] = token == 0 ? 0u : sanitise(words[m] & 0xffffu) | sanitise(words[m] >> 16) << 16;
    }
  }

  __device__ float element(int i, int j) const {
    const u32 pair = KEYS ? t[j][i / 2] : t[i][j / 2];
    const bool high = (KEYS ? i : j) % 2;
#if BF16
    return __int_as_float(high ? pair & 0xffff0000u : pair << 16);
#else
    return clamp(from_half((u16)(high ? pair >> 16 : pair)), -LARGEST, LARGEST);
#endif
  }

  // the row of its group that a thread finishes; with 4 rows in a group, lanes 4 apart finish the same one
  __device__ int own_row() const { return (x & (RB - 4)) | (x & 1) << 1 | (x & 2) >> 1; }

  // the value that the owner of row i has
  template <class T>
  __device__ T of_row(T own, int i) const {
    return __shfl_sync(ALL, own, (i & 4) | (i & 2) >> 1 | (i & 1) << 1, LANES);
  }

  // combine 4 values of the lanes of a group; each lane keeps the row (x & 1) * 2 + (x & 2) / 2
  template <class T, class Combine>
  __device__ T reduce4(T (&v)[4], Combine combine) const {
#pragma unroll
    for (int n = 0; n < 2; n++) {
      T sent = x & 1 ? v[n] : v[n + 2], kept = x & 1 ? v[n + 2] : v[n];
      v[n] = combine(kept, __shfl_xor_sync(ALL, sent, 1));
    }
    T sent = x & 2 ? v[0] : v[1], kept = x & 2 ? v[1] : v[0];
    T total = combine(kept, __shfl_xor_sync(ALL, sent, 2));
#pragma unroll
    for (int mask = 4; mask < LANES; mask *= 2) total = combine(total, __shfl_xor_sync(ALL, total, mask));
    return total;
  }

  // sum over the own row from partial sums of 4 rows, which start anew
  template <class T>
  __device__ T sum4(T (&v)[4]) const {
    T total = reduce4(v, [](T a, T b) { return a + b; });
#pragma unroll
    for (int n = 0; n < 4; n++) v[n] = T(0);
    return total;
  }
  __device__ float max4(float (&v)[4]) const {
    float most = reduce4(v, [](float a, float b) { return fmaxf(a, b); });
#pragma unroll
    for (int n = 0; n < 4; n++) v[n] = -3e38f;
    return most;
  }

  // total of partial sums per own column: that of column threadIdx.x (in the order of `cross`), for the first COLS threads
  __device__ double col_total(const double (&v)[CB]) const {
    __syncthreads();  // the sums before have been read
#pragma unroll
    for (int j = 0; j < CB; j++) sums[y * COLS + j * LANES + x] = v[j];
    __syncthreads();
    double parts[4] = {0.0, 0.0, 0.0, 0.0};
    if (threadIdx.x < COLS) {
#pragma unroll
      for (int n = 0; n < GROUPS; n++) parts[n % 4] += sums[n * COLS + threadIdx.x];
    }
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
  }

  // call body(i, j) for all elements, row by row, and after every 4 rows finish(whether the own row is among them);
  // elements are converted anew in each pass, which keeps them out of the registers
  template <class Body, class Finish>
  __device__ void for_each(Body body, Finish finish) {
#pragma unroll
    for (int n = 0; n < TB; n++)
#pragma unroll
      for (int m = 0; m < 4; m++) asm volatile("" : "+r"(t[n][m]));
#pragma unroll
    for (int quad = 0; quad < RB; quad += 4) {
#pragma unroll
      for (int i = quad; i < quad + 4; i++)
#pragma unroll
        for (int j = 0; j < CB; j++) body(i, j);
      finish((x & (RB - 4)) == quad);
    }
  }

  // publish the cross scales of the first COLS threads, load those of the own columns
  __device__ void share_cross(float own, float (&mine)[CB], float (&inverse)[CB]) {
    if (threadIdx.x < COLS) cross[threadIdx.x] = own;
    __syncthreads();
#pragma unroll
    for (int j = 0; j < CB; j++) { mine[j] = cross[j * LANES + x]; inverse[j] = __frcp_rn(mine[j]); }
  }

  __device__ void share_rows(float own_low, float own_step, float (&low)[RB], float (&step)[RB]) const {
#pragma unroll
    for (int i = 0; i < RB; i++) { low[i] = of_row(own_low, i); step[i] = of_row(own_step, i); }
  }

  // code * step + low
  __device__ static float row_value(const u32 (&codes)[RB], const float (&low)[RB], const float (&step)[RB], int i,
                                    int j) {
    return __fadd_rn(__fmul_rn((float)(codes[i] >> (4 * j) & 15u), step[i]), low[i]);
  }

  __device__ double overlap(const u32 (&codes)[RB], const float (&low)[RB], const float (&step)[RB],
                            const float (&mine)[CB], int i, int j) const {
    return (double)__fmul_rn(row_value(codes, low, step, i, j), mine[j]) * (double)element(i, j);
  }

  __device__ float balanced(int i, int j, const float (&inverse)[CB]) const {
    return __fmul_rn(element(i, j), inverse[j]);
  }

  // codes (4 bits each, column j at bit 4 j), scales, zeros and cross scales; returns through the arguments
  __device__ void quantise(u32 (&codes)[RB], float& own_scale, float& own_zero, float& own_cross, int* shared_max) {
    // `mine`: cross scales of the own columns, `inverse`: 1 / mine
    float row[RB], mine[CB], inverse[CB];
    double v[CB], quads[2][4], row_total = 0.0, row_power = 0.0;
    const auto clear = [&] {
#pragma unroll
      for (int n = 0; n < CB; n++) v[n] = 0.0;
#pragma unroll
      for (int n = 0; n < 8; n++) quads[n / 4][n % 4] = 0.0;
    };
    clear();
    for_each(
        [&](int i, int j) {
          const double e = (double)element(i, j);
          quads[0][i % 4] += e;
          quads[1][i % 4] += e * e;
          v[j] += e * e;
        },
        [&](bool is_own) {
          const double total = sum4(quads[0]), power = sum4(quads[1]);
          if (is_own) { row_total = total; row_power = power; }
        });
    const double col_power = col_total(v);
    const float own_inverse = __frcp_rn(std_of(row_total, row_power, ROW_COUNT));
#pragma unroll
    for (int i = 0; i < RB; i++) row[i] = of_row(own_inverse, i);
    double squares[CB];
    clear();
#pragma unroll
    for (int j = 0; j < CB; j++) squares[j] = 0.0;
    for_each(
        [&](int i, int j) {
          const double e = (double)__fmul_rn(element(i, j), row[i]);
          v[j] += e;
          squares[j] += e * e;
        },
        [](bool) {});
    const double col_sum = col_total(v);
    own_cross = round_cross(std_of(col_sum, col_total(squares), COL_COUNT));
    share_cross(own_cross, mine, inverse);

    float own_low = 0.0f, own_high = 0.0f, lows[4], highs[4];
#pragma unroll
    for (int i = 0; i < 4; i++) lows[i] = highs[i] = -3e38f;
    for_each(
        [&](int i, int j) {
          const float b = balanced(i, j, inverse);
          if (is_valid(j)) { lows[i % 4] = fmaxf(lows[i % 4], -b); highs[i % 4] = fmaxf(highs[i % 4], b); }
        },
        [&](bool is_own) {
          const float low = -max4(lows), high = max4(highs);
          if (is_own) { own_low = low; own_high = high; }
        });
    const float reach = __fmul_rn(__fsub_rn(own_high, own_low), KEYS ? K_REACH : V_REACH);
    own_low = __fsub_rn(__fmul_rn(__fadd_rn(own_low, own_high), 0.5f), reach);
    float own_step = __fmul_rn(reach, (float)(2.0 / LEVELS));

    float low[RB], step[RB];
#pragma unroll 1
    for (int round = 0; round <= ROUNDS; round++) {
      // codes of the range of each row
      const float own_inverse_step = own_step > 0.0f ? __frcp_rn(own_step) : 0.0f;
#pragma unroll
      for (int i = 0; i < RB; i++) { low[i] = of_row(own_low, i); row[i] = of_row(own_inverse_step, i); codes[i] = 0; }
      double x_sum = 0.0, products = 0.0;
      u32 code_sums = 0, counts[4] = {0u, 0u, 0u, 0u};  // sum of codes | sum of squares << 12
      clear();
      for_each(
          [&](int i, int j) {
            if (!is_valid(j)) return;
            const float scaled = __fmul_rn(__fsub_rn(balanced(i, j, inverse), low[i]), row[i]);
            const u32 code = floor_of(clamp(__fadd_rn(scaled, 0.5f), 0.0f, LEVELS));
            const double e = (double)scaled;
            quads[0][i % 4] += e;
            quads[1][i % 4] += e * to_double(code);
            counts[i % 4] += code + (code * code << 12);
            codes[i] |= code << (4 * j);
          },
          [&](bool is_own) {
            const double e_total = sum4(quads[0]), p_total = sum4(quads[1]);
            const u32 count = sum4(counts);
            if (is_own) { x_sum = e_total; products = p_total; code_sums = count; }
          });
      if (round == ROUNDS) break;
      // the range with the least squared error for them
      const double c_sum = to_double(code_sums & 0xfffu), c_squares = to_double(code_sums >> 12);
      const double spread = c_squares * ROW_COUNT - c_sum * c_sum;
      const double slope = spread > 0.0 ? (products * ROW_COUNT - x_sum * c_sum) / spread : 1.0;
      const double offset = (x_sum - slope * c_sum) / ROW_COUNT;
      own_low = __fadd_rn(own_low, __fmul_rn(own_step, (float)offset));
      own_step = __fmul_rn(own_step, (float)slope);
      // the cross scale that keeps the norm of each column
      share_rows(own_low, own_step, low, step);
      clear();
      for_each(
          [&](int i, int j) {
            const double e = (double)__fmul_rn(row_value(codes, low, step, i, j), mine[j]);
            if (is_valid(j)) v[j] += e * e;
          },
          [](bool) {});
      own_cross = round_cross(__fmul_rn(own_cross, __fsqrt_rn(ratio_of(col_power, col_total(v)))));
      share_cross(own_cross, mine, inverse);
    }

    // errors at right angles to the data: of the columns, then of the rows; t is 0 where not valid
    share_rows(own_low, own_step, low, step);
    clear();
    for_each([&](int i, int j) { v[j] += overlap(codes, low, step, mine, i, j); }, [](bool) {});
    own_cross = round_cross(__fmul_rn(own_cross, ratio_of(col_power, col_total(v))));
    share_cross(own_cross, mine, inverse);
    double row_overlap = 0.0;
    clear();
    for_each([&](int i, int j) { quads[0][i % 4] += overlap(codes, low, step, mine, i, j); },
             [&](bool is_own) {
               const double total = sum4(quads[0]);
               if (is_own) row_overlap = total;
             });
    const float gain = ratio_of(row_power, row_overlap);
    own_scale = __fmul_rn(own_step, gain);
    own_zero = __fmul_rn(own_low, gain);

    // a power of two moves between (scale, zero) and cross
    if (KEYS && threadIdx.x == 0) own_cross = 0.0f;  // token 0 is exact
    const float most = fmaxf(fabsf(own_zero), fabsf(__fadd_rn(__fmul_rn(own_scale, (float)LEVELS), own_zero)));
    if (threadIdx.x < 2) shared_max[threadIdx.x] = 0;
    __syncthreads();
    // positive floats are ordered like their bits
    const int most_bits = __reduce_max_sync(ALL, __float_as_int(most));
    const int cross_bits = __reduce_max_sync(ALL, threadIdx.x < COLS ? __float_as_int(own_cross) : 0);
    if (threadIdx.x % 32 == 0) {
      atomicMax(&shared_max[0], most_bits);
      atomicMax(&shared_max[1], cross_bits);
    }
    __syncthreads();
    int exponent = max(exponent_of(__int_as_float(shared_max[0])), -14);
    exponent = min(exponent, 14 - exponent_of(__int_as_float(shared_max[1])));
    own_scale = __fmul_rn(own_scale, power_of_two(-exponent));
    own_zero = __fmul_rn(own_zero, power_of_two(-exponent));
    own_cross = __fmul_rn(own_cross, power_of_two(exponent));
  }

  __device__ void encode(const Source& source, u8* record, int* shared_max) {
    load(source);
    u32 codes[RB];
    float scale, zero, own_cross;
    quantise(codes, scale, zero, own_cross, shared_max);
    u16* halves = (u16*)(record + SCALES_OFFSET);
    if (x < RB) {
      const int row = RB * y + own_row();
      halves[(KEYS ? K_CHANNEL_SCALE : V_TOKEN_SCALE) + row] = saturated_half(scale);
      halves[(KEYS ? K_CHANNEL_ZERO : V_TOKEN_ZERO) + row] = saturated_half(zero);
    }
    if (threadIdx.x < COLS)
      halves[(KEYS ? K_TOKEN_SCALE : V_CHANNEL_SCALE) + CB * (threadIdx.x % LANES) + threadIdx.x / LANES] =
          saturated_half(own_cross);
    if (threadIdx.x < D) halves[(KEYS ? K_FIRST : V_FIRST) + threadIdx.x] = source.row(0)[threadIdx.x];

    u8* table = (u8*)sums;  // codes; every sum has been read before the last two barriers
#pragma unroll
    for (int n = 0; n < TB; n++) {
      // channels 8 * (y or x) + m of token TB * (x or y) + n
      u32 four[2] = {0u, 0u};
#pragma unroll
      for (int m = 0; m < 8; m++) {
        const u32 code = KEYS ? codes[m] >> (4 * n) & 15u : codes[n] >> (4 * m) & 15u;
        four[m / 4] |= code << (m % 4 * 8);
      }
      u32* target = (u32*)(table + (TB * (KEYS ? x : y) + n) * TABLE_ROW + 8 * (KEYS ? y : x));
      target[0] = four[0];
      target[1] = four[1];
    }
    __syncthreads();
    u32* words = (u32*)(record + (KEYS ? 0 : V_CODES_OFFSET));
    pack(table, words);
    if constexpr (BITS == 3) pack_tops(table, words + TOP_INDEX);
  }

  static constexpr int FIELD_BITS = KEYS ? K_FIELD_BITS : V_FIELD_BITS, HALF = 16 / FIELD_BITS;  // fields of half a word
  static constexpr int WORD_CB = KEYS ? K_CHANNEL_BLOCKS : V_CHANNEL_BLOCKS;
  static constexpr int WIDTH = D / WORD_CB;                              // words of a row
  static constexpr int TOKENS = KEYS ? 32 / FIELD_BITS / WORD_CB : 4;         // of a word
  static constexpr int INNER = KEYS ? WORD_CB / 2 : WORD_CB;             // fields of a half that share a token

  // the code of field f of half h of word (r, c)
  __device__ static u32 code_at(const u8* table, int r, int c, int h, int f) {
    const int i = f / INNER, j = f % INNER;
    const int token = KEYS ? TOKENS * r + i : 4 * r + 2 * i + h;
    const int channel = KEYS ? WORD_CB * c + 2 * j + h : c + WIDTH * j;
    return table[token * TABLE_ROW + channel];
  }

  __device__ static int word_index(int r, int c, int width) {
    return KEYS ? r * width + c : r / 4 * (4 * width) + c / 4 * 16 + r % 4 * 4 + c % 4;
  }

  __device__ static void pack(const u8* table, u32* words) {
    for (int n = threadIdx.x; n < G / TOKENS * WIDTH; n += THREADS) {
      const int r = n / WIDTH, c = n % WIDTH;
      u32 word = KEYS && n == 0 ? HEADER : 0u;
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int f = 0; f < HALF; f++) {
          const u32 code = code_at(table, r, c, h, f);
          word |= (BITS == 3 ? code & 3u : code) << (FIELD_BITS * (h * HALF + f));
        }
      words[word_index(r, c, WIDTH)] = word;
    }
  }

  // the top bits of 3-bit codes: those of two words in one, of the second one bit higher
  __device__ static void pack_tops(const u8* table, u32* words) {
    constexpr int ROWS_SHARED = KEYS ? 2 : 1, TOP_WIDTH = KEYS ? WIDTH : WIDTH / 2;
    for (int n = threadIdx.x; n < G / TOKENS * WIDTH / 2; n += THREADS) {
      const int r = n / TOP_WIDTH, c = n % TOP_WIDTH;
      u32 word = 0u;
#pragma unroll
      for (int second = 0; second < 2; second++)
#pragma unroll
        for (int h = 0; h < 2; h++)
#pragma unroll
          for (int f = 0; f < HALF; f++) {
            const u32 code = code_at(table, ROWS_SHARED * r + (KEYS ? second : 0), KEYS ? c : c + TOP_WIDTH * second, h, f);
            word |= code >> 2 << (FIELD_BITS * (h * HALF + f) + second);
          }
      words[word_index(r, c, TOP_WIDTH)] = word;
    }
  }
};

// side 2 h: keys of KV head h, 2 h + 1: values. The pointers are those of keys and of head 0.
__device__ void encode_side(int side, u8* records, long long page_id, Source source, const u16* chunk_v) {
  constexpr int SUMS = D * G / TB, TABLE = G * TABLE_ROW / 8;
  __shared__ double sums[SUMS > TABLE ? SUMS : TABLE];
  __shared__ float cross[D > G ? D : G];
  __shared__ int shared_max[2];
  const int head = side / 2;
  u8* record = records + (page_id * HK + head) * RECORD;
  source.records += head * RECORD;
  if (side % 2 == 0) {
    source.chunk += head * D;
    Side<true>(sums, cross).encode(source, record, shared_max);
  } else {
    source.records += 2 * D;
    source.chunk = chunk_v + head * D;
    Side<false>(sums, cross).encode(source, record, shared_max);
  }
}

#if ENCODE_RING
// grid (2 HK, SLICES): slice s encodes the last page of the requests s, s + SLICES, ... whose token fills it
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
kvarn_encode_ring(u8* records, const int* __restrict__ ring_pages, const int* __restrict__ seq_lens,
                  const int* __restrict__ store_pages, int batch_size) {
  const int slices = gridDim.y;
  // in 127 of 128 steps of a request there is nothing to do: one load tells for a whole slice
  for (int begin = blockIdx.y; begin < batch_size; begin += slices * THREADS) {
    const int mine = begin + slices * threadIdx.x;
    if (!__syncthreads_or(mine < batch_size && seq_lens[mine] % G == 0)) continue;
    for (int b = begin; b < min(begin + slices * THREADS, batch_size); b += slices) {
      const int seq_len = seq_lens[b];
      if (seq_len % G != 0) continue;
      // there is no chunk
      const Source source = {records, ring_pages + b * RING_PAGES, (const u16*)records, seq_len - G, seq_len};
      encode_side(blockIdx.x, records, store_pages[b], source, (const u16*)records);
      __syncthreads();  // the codes have been packed
    }
  }
}

#endif

#if ENCODE_CHUNK
// grid (2 HK, pages, B): every page that the new tokens of a request complete. It may start beside kvarn_extend, which
// reads none of these pages and writes nothing that is read here, and ends after it
extern "C" __global__ void __launch_bounds__(THREADS, MIN_BLOCKS)
kvarn_encode_chunk(u8* records, const int* __restrict__ ring_pages, const u16* __restrict__ chunk_k,
                   const u16* __restrict__ chunk_v, const int* __restrict__ prefix_lens,
                   const int* __restrict__ seq_lens, const int* __restrict__ qo_indptr,
                   const int* __restrict__ page_table, int stride_page_table) {
  let_next_start();
  const int b = blockIdx.z, prefix_len = prefix_lens[b], page = prefix_len / G + blockIdx.y;
  if ((page + 1) * G <= seq_lens[b]) {
    const long long chunk = (long long)qo_indptr[b] * (HK * D);
    const Source source = {records, ring_pages + b * RING_PAGES, chunk_k + chunk, page * G, prefix_len};
    encode_side(blockIdx.x, records, page_table[(long long)b * stride_page_table + page], source, chunk_v + chunk);
  }
  if (blockIdx.x == 0 && blockIdx.y == 0 && blockIdx.z == 0) wait_for_previous();
}
#endif
