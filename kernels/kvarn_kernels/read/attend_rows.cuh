// SPDX-License-Identifier: Apache-2.0
// How a block attends rows, a row a query head for a token, over a run of pages: those that are read as records, then
// those that are read exactly. For sm_90a.
//
// Two of its warpgroups write tiles of D tokens as operands of products into shared memory, in fp16, two buffers of
// either side, and one or two attend them, 64 rows each:
//
//     writing      keys
//     writing      values
//     attending    scores = queries x keys^T; weights from them, in registers; sums += weights x values
//
// so that a record is unpacked once for BLOCK_ROWS rows while the products of other tiles run. Keys are divided by a power
// of two of their page, a factor of their scores; values by one of the block, 2^e: it is raised, and the sums divided,
// when a page asks for more than 2^6 times as much (operands.cuh). Queries are divided by a power of two, too, that of the
// block. Rows that read a page in another form, or not all of it, see some tokens of its tile only; older tiles are not
// masked.
//
// The maximum of a row is kept until a score exceeds it by SLACK: sums are then multiplied in few tiles.
//
// What a block attends is said by a `Work` of its kernel:
//
//     rows; head                   of its BLOCK_ROWS rows those that are queries; the KV head
//     begin, num_records           pages that it reads as records; page_ids: from the first of these on
//     exact_begin, num_exact       pages that it reads exactly; first_exact: the first that any of its rows so reads
//     ring_pages                   of the request, in global memory
//     position_of(row)             of its token, of a row that is none that of the last
//     exact_start                  tokens of the request that came from the prefix cache
//     query_of(row)                its row of rotated_q; result_of(row): of out and lse
//     wait_for_inputs()            until queries and exact tokens can be read; records can be from the start
//     exact_row(position, side, ring_pages)   the address of a token's key (side 0) or value; ring_pages: in shared memory
//
// Lane 4 g + q. The constants in capitals that are not set here come from attend_rows.py.

#include "device/ptx.cuh"
#include "device/wgmma.cuh"
#include "read/operands.cuh"

constexpr int SIDE = 2 * TOKENS * D;      // bytes of the keys of a tile, and of its values
// shared memory: buffers of records, queries, keys, values
constexpr int QUERIES = STAGES * BUFFER;
constexpr int KEYS = QUERIES + 2 * BLOCK_ROWS * D;
constexpr int VALUES = KEYS + BUFFERS * SIDE;
constexpr int READERS = BLOCK_ROWS / 64;  // warpgroups that attend
static_assert(VALUES + BUFFERS * SIDE == SHARED_BYTES && THREADS == 128 * (2 + READERS), "");
constexpr float SHIFT = 4.0f;             // weights are 2^SHIFT times as large: small ones stay normal fp16 numbers
constexpr float SLACK = 8.0f;             // weights are at most 2^(SHIFT + SLACK)
constexpr int CHAINS = 4;                 // of maxima and sums of a row, which do not wait for each other
constexpr float NONE = -1e30f;            // the maximum before there is a score
constexpr int QUERY_BITS = 12;            // the largest query of a block is below 2^QUERY_BITS
#define MINUS_INF __int_as_float(0xff800000)

struct __align__(16) Shared {
  float score_factor[BUFFERS];              // 2^r of the keys
  float less[BUFFERS];                      // factor of what was summed before these values
  float value_factor[BUFFERS];              // 2^e
  int largest;                              // magnitude of the queries
  int row[BLOCK_ROWS];                      // of a row's result, -1 where there is no query
  int ring_pages[RING_PAGES];
  const u8* exact_rows[2][TOKENS];          // of the keys of a tile, and of its values
  float of_warp[2][4];                      // the largest of them that a warp has seen
  u64 arrived[STAGES], left[STAGES];        // a record, by those who write what it says
  u64 keys_written[BUFFERS], values_written[BUFFERS], keys_read[BUFFERS], values_read[BUFFERS];
};

// the first page that a position reads exactly
__device__ __forceinline__ int exact_page(int position, int exact_start) {
  return min(max(position / G - WINDOW, exact_start / G), position / G);
}

// the address of a token's key (side 0) or value in the ring of a request
__device__ __forceinline__ const u8* ring_row(const u8* records, const int* ring_pages, int head, int position, int side) {
  const int id = ring_pages[position / RING_TOKENS % RING_PAGES];
  return records + ((long long)id * HK + head) * RECORD + position % RING_TOKENS * (4 * D) + side * (2 * D);
}

// The softmax of a thread's two rows, g and g + 8 of its warp.
struct Rows {
  float maximum[2] = {NONE, NONE}, total[2] = {0.f, 0.f}, alpha[2];
  // turn scores, times a factor, into weights; whether what was summed before has to be multiplied by alpha
  __device__ __forceinline__ bool weigh(Sums& s, float factor) {
    float tops[CHAINS][2];
#pragma unroll
    for (int n = 0; n < BLOCK_COLUMNS / 2; n++) {
      float& top = tops[n / 4 % CHAINS][n / 2 % 2];
      top = n < 4 * CHAINS && n % 2 == 0 ? s[n] : fmaxf(top, s[n]);
    }
    float top[2] = {tops[0][0], tops[0][1]};
#pragma unroll
    for (int n = 1; n < CHAINS; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) top[h] = fmaxf(top[h], tops[n][h]);
    bool exceeds = false;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 1));
      top[h] = fmaxf(top[h], __shfl_xor_sync(0xffffffffu, top[h], 2)) * factor;
      exceeds |= top[h] > maximum[h] + SLACK;
    }
    exceeds = __any_sync(0xffffffffu, exceeds);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float now = exceeds ? fmaxf(maximum[h], top[h]) : maximum[h];
      alpha[h] = exp2_fast(maximum[h] - now);
      total[h] *= alpha[h];
      maximum[h] = now;
    }
    const float shift[2] = {SHIFT - maximum[0], SHIFT - maximum[1]};
    float sums[CHAINS][2];
#pragma unroll
    for (int n = 0; n < BLOCK_COLUMNS / 2; n++) {
      s[n] = exp2_fast(fmaf(s[n], factor, shift[n / 2 % 2]));
      float& sum = sums[n / 4 % CHAINS][n / 2 % 2];
      sum = n < 4 * CHAINS && n % 2 == 0 ? s[n] : sum + s[n];
    }
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < CHAINS; n++) total[h] += sums[n][h];
    return exceeds;
  }
};

template <class Work>
__device__ __forceinline__ void attend_rows(u8* memory, Shared& shared, const Work& work, const float* rotated_q,
                                            const u8* records, float* out, float* lse, float sm_scale_log2) {
  const int thread = threadIdx.x, lane = thread % 32, g = lane / 4, q = lane % 4;
  const int warp = __shfl_sync(0xffffffffu, thread / 32, 0);
  // of what the compiler takes for different in each lane: in uniform registers they would be copied for each use
  const Exponents exponents((u32)warp >> 31);
  const int rows = work.rows, head = work.head, num_records = work.num_records;
  const int num_tiles = (num_records + work.num_exact) * TILES_OF_RECORD;
  auto order_record = [&](int n) {
    bulk_copy(memory + n % STAGES * BUFFER, records + ((long long)work.page_ids[n] * HK + head) * RECORD, RECORD,
              &shared.arrived[n % STAGES]);
  };

  if (thread == 0) {
    for (int n = 0; n < STAGES; n++) {
      mbarrier_init(&shared.arrived[n]);
      mbarrier_init(&shared.left[n], 8);
    }
    for (int n = 0; n < BUFFERS; n++) {
      // the warps that write, those that read
      mbarrier_init(&shared.keys_written[n], 4);
      mbarrier_init(&shared.values_written[n], 4);
      mbarrier_init(&shared.keys_read[n], 4 * READERS);
      mbarrier_init(&shared.values_read[n], 4 * READERS);
    }
    fence_init();
    shared.largest = 0;
    for (int n = 0; n < min(STAGES, num_records); n++) order_record(n);
  }
  if (thread < RING_PAGES) shared.ring_pages[thread] = work.ring_pages[thread];
  if (thread < BLOCK_ROWS) shared.row[thread] = thread < rows ? (int)work.result_of(thread) : -1;
  __syncthreads();
  work.wait_for_inputs();
  // queries are divided by a power of two, the same for the block
  int largest = 0;
  for (int n = thread; n < rows * (D / 4); n += THREADS) {
    const float4 x = *(const float4*)(rotated_q + work.query_of(n / (D / 4)) * D + n % (D / 4) * 4);
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
  const u32 base = shared_address(memory);
  for (int n = thread; n < BLOCK_ROWS * OCTETS; n += THREADS) {
    const int row = n / OCTETS, octet = n % OCTETS;
    const float down = power_of_two(-query_exponent);
    uint4 x = make_uint4(0u, 0u, 0u, 0u);
    if (row < rows) {
      const float4* from = (const float4*)(rotated_q + work.query_of(row) * D + 8 * octet);
      const float4 y = from[0], z = from[1];
      x = make_uint4(pack_half(y.x * down, y.y * down), pack_half(y.z * down, y.w * down),
                     pack_half(z.x * down, z.y * down), pack_half(z.z * down, z.w * down));
    }
    sts128(base + QUERIES + octet * (16 * BLOCK_ROWS) + 16 * row, x);
  }
  fence_stores();
  __syncthreads();
  // a buffer is used for the n / BUFFERS-th time
  auto wait_use = [&](u64* barriers, int n) { mbarrier_wait(&barriers[n % BUFFERS], n / BUFFERS & 1); };
  auto tell = [&](u64* barriers, int n) {
    __syncwarp();
    if (lane == 0) arrive(&barriers[n % BUFFERS]);
  };

  if (warp < 8) {
    keep_registers<WRITER_REGISTERS>();
    const bool writes_values = warp >= 4;
    const int own_warp = warp % 4;
    u64* written = writes_values ? shared.values_written : shared.keys_written;
    u64* read = writes_values ? shared.values_read : shared.keys_read;
    const u32 target = base + (writes_values ? VALUES : KEYS);
    int exponent = -100;
    for (int n = 0; n < num_tiles; n++) {
      const int number = n / TILES_OF_RECORD, part = n % TILES_OF_RECORD, buffer = n % BUFFERS;
      const bool is_record = number < num_records;
      const u32 record = base + number % STAGES * BUFFER, halves = record + SCALES_OFFSET;
      const int page = work.exact_begin + number - num_records;  // of an exact one
      const u8*(&rows)[TOKENS] = shared.exact_rows[writes_values];
      float less = 1.f;
      auto take_exponent = [&](int own) {
        if (!writes_values) {
          exponent = own;
        } else if (own >= exponent + 6) {
          less = power_of_two(max(exponent - own, -126));
          exponent = own;
        }
      };
      auto wait_buffer = [&] {
        if (n >= BUFFERS) wait_use(read, n - BUFFERS);
      };
      auto wait_with_exact = [&](float largest) {
        take_exponent(exact_exponent(largest, shared.of_warp[writes_values], 1 + writes_values));
        wait_buffer();
      };
      if (is_record) {
        if (part == 0) {
          mbarrier_wait(&shared.arrived[number % STAGES], number / STAGES & 1);
          take_exponent(writes_values ? largest_exponent<D>(halves + 2 * V_CHANNEL_SCALE, halves + 2 * V_FIRST, lane)
                                      : largest_exponent<G>(halves + 2 * K_TOKEN_SCALE, halves + 2 * K_FIRST, lane));
        }
        wait_buffer();
        if (writes_values) write_values(target + buffer * SIDE, record, part, exponent, own_warp, lane, exponents);
        else write_keys(target + buffer * SIDE, record, part, exponent, own_warp, lane, exponents);
      } else {
        const int token = thread % 128;
        sync_group(1 + writes_values);  // those of the tile before are read no more
        if (token < TOKENS)
          rows[token] = work.exact_row(page * G + TOKENS * part + token, writes_values, shared.ring_pages);
        sync_group(1 + writes_values);
        if (writes_values) {
          ExactValues exact(rows, own_warp, lane);
          wait_with_exact(read_exact(exact));
          write_exact(exact, target + buffer * SIDE, exponent);
        } else {
          ExactKeys exact(rows, own_warp, lane);
          wait_with_exact(read_exact(exact));
          write_exact(exact, target + buffer * SIDE, exponent);
        }
      }
      if (own_warp == 0 && lane == 0) {
        if (writes_values) shared.less[buffer] = less;
        (writes_values ? shared.value_factor : shared.score_factor)[buffer] = power_of_two(exponent);
      }
      fence_stores();
      tell(written, n);
      if (part < TILES_OF_RECORD - 1 || !is_record) continue;
      if (lane == 0) arrive(&shared.left[number % STAGES]);
      // the buffer of the record before this one, which both have left or are about to leave
      const int next = number - 1 + STAGES;
      if (thread == 0 && number > 0 && next < num_records) {
        mbarrier_wait(&shared.left[next % STAGES], (number - 1) / STAGES & 1);
        order_record(next);
      }
    }
    return;
  }

  take_registers<READER_REGISTERS>();
  const int own = warp % 4, half = warp / 4 - 2;
  const float sm_scale = power_of_two(query_exponent) * sm_scale_log2;
  const Operand<16 * BLOCK_ROWS> queries(base + QUERIES + 1024 * half);
  Sums s, o;
  u32 p[STEPS][4];
  Rows mine;
  auto order_scores = [&](int n) {
    const Operand<> keys(base + KEYS + n % BUFFERS * SIDE);
    fence_registers();
#pragma unroll
    for (int k = 0; k < STEPS; k++)
      if (k == 0) product_half<false>(s, queries[0], keys[0]);
      else product_half<true>(s, queries[k], keys[k]);
    commit_products();
  };
  auto factor_of = [&](int n) {
    const float factor = shared.score_factor[n % BUFFERS] * sm_scale;
    tell(shared.keys_read, n);
    return factor;
  };
  auto to_operand = [&] {
#pragma unroll
    for (int k = 0; k < STEPS; k++)
#pragma unroll
      for (int i = 0; i < 4; i++) p[k][i] = pack_half(s[8 * k + 2 * i], s[8 * k + 2 * i + 1]);
  };
  float value_factor = 0.f, less = 1.f;
  bool raised = false;
  const int first = 64 * half + 16 * own + g;  // of the two rows
  const int positions[2] = {work.position_of(first), work.position_of(first + 8)};
  // the weights of tile n, which wait for its values
  auto weigh = [&](int n) {
    const int number = n / TILES_OF_RECORD, before = n % TILES_OF_RECORD * TOKENS;
    const bool is_record = number < num_records;
    const int page = is_record ? work.begin + number : work.exact_begin + number - num_records;
    if (page >= work.first_exact)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        // tokens of the page that the row sees in this form
        const bool reads = is_record == page < exact_page(positions[h], work.exact_start);
        const int seen = (reads ? is_record ? G : positions[h] + 1 - page * G : 0) - before - 2 * q;
#pragma unroll
        for (int c = 0; c < BLOCK_COLUMNS / 8; c++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            if (8 * c + i >= seen) s[4 * c + 2 * h + i] = MINUS_INF;
      }
    raised = mine.weigh(s, factor_of(n));
    wait_use(shared.values_written, n);
    less = shared.less[n % BUFFERS];
    value_factor = shared.value_factor[n % BUFFERS];
  };
  auto order_sums = [&](int n) {
    if (n > 0 && (raised || less != 1.f)) {
      const float factor[2] = {mine.alpha[0] * less, mine.alpha[1] * less};
#pragma unroll
      for (int i = 0; i < BLOCK_COLUMNS / 2; i++) o[i] *= factor[i / 2 % 2];
    }
    const Operand<> values(base + VALUES + n % BUFFERS * SIDE);
    fence_registers();
#pragma unroll
    for (int k = 0; k < STEPS; k++) product_half(o, p[k], values[k], n + k > 0);
    commit_products();
  };
  for (int n = 0; n < num_tiles; n++) {
    wait_use(shared.keys_written, n);
    order_scores(n);
    wait_products<0>();
    arrived(s);
    weigh(n);
    to_operand();
    order_sums(n);
    wait_products<0>();
    arrived(o);
    tell(shared.values_read, n);
  }
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float total = mine.total[h];
    total += __shfl_xor_sync(0xffffffffu, total, 1);
    total += __shfl_xor_sync(0xffffffffu, total, 2);
    const int row = shared.row[first + 8 * h];
    if (row < 0) continue;
    const bool empty = total == 0.f;
    const float factor = empty ? 0.f : value_factor / total;
    if (q == 0) lse[row] = empty ? MINUS_INF : log2f(total) + mine.maximum[h] - SHIFT;
    float* target = out + (long long)row * D + 2 * q;
#pragma unroll
    for (int n = 0; n < D / 8; n++)
      // a split without pages has summed nothing, not even zeros
      *(float2*)(target + 8 * n) =
          empty ? make_float2(0.f, 0.f) : make_float2(o[4 * n + 2 * h] * factor, o[4 * n + 2 * h + 1] * factor);
  }
}
