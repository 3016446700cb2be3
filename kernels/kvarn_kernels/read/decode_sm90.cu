// SPDX-License-Identifier: Apache-2.0
// Decode attention over records, first tokens and ring for sm_90 and newer; the same contract as decode.py.
//
// One block per split (decode_plan.py), KV head and COLUMN_TILES x 8 columns: query heads or, where drafts are
// verified, the query heads of each draft, one draft after the other. Codes are unpacked once for all columns of a
// block. Whole records arrive by bulk copy. A team of TILE_WARPS warps shares a tile, each with its own tokens and
// its own softmax state, so warps meet only at the end of a split; the last warp that leaves a buffer orders the
// next record into it. Every team has a ring of STAGES buffers of its own: a barrier tells only odd phases from even
// ones, so whoever waits for it must see every phase of it, and nobody may be left behind by two. The layout of
// `tile.py` makes every shared-memory load a 16-byte read of one matrix-instruction fragment:
//
//     scores^T [tokens, heads]   = codes [tokens, channels] x folded query [channels, heads]
//     out^T    [channels, heads] = codes^T [channels, tokens] x folded weights [tokens, heads]
//
// With 8 heads as the narrow dimension no row of an m16n8k16 is idle for groups of up to 8. Drafts of one request read
// the same records but for a page that ends among them, which is a record for the later ones and exact for the others:
// there, at the newest tokens and where a sliding window begins, a key that a column does not see has the score -inf.
// A pair of codes becomes an fp16 pair by one mask-or under a power of two (offset + code, exact); the offsets and the
// zeros of the record are summed by matrix instructions with constant operands, so that they cost no arithmetic per code
// and see the same rounded operands. The maximum is raised only when a score exceeds it by 2^4, so most tiles need no
// exchange between lanes. Lane 4 g + q. The constants in capitals that are not set here come from decode_sm90.py.

#include "device/ptx.cuh"
#include "record/unpack.cuh"

constexpr int WARPS = 4;
constexpr int TEAMS = WARPS / TILE_WARPS; // warps of a team share a tile
constexpr int BUFFERS = TEAMS * STAGES;   // records in flight or being read
constexpr int BLOCKS = 8 / TILE_WARPS;    // blocks of 16 tokens that a warp has of a tile
constexpr int K_CB = K_CHANNEL_BLOCKS, K_TB = 32 / K_FIELD_BITS / K_CB;
constexpr int K_ROW_WORDS = D / K_CB;     // words of a row of key words
constexpr int K_LANE_WORDS = K_ROW_WORDS / 4;
constexpr int K_PAIRS = K_CB / 2;         // pairs of channels in a word, per token
constexpr int PAIRS = D / 8;              // pairs of channels of a lane: channels D / 4 * q ...
constexpr int STEPS = D / 16;             // depth-16 steps over the channels
constexpr int V_CB = V_CHANNEL_BLOCKS;
constexpr int V_WIDTH = D / V_CB;         // words of a row of value words
constexpr int V_LANE_WORDS = V_WIDTH / 8;
constexpr int V_VECTOR = V_LANE_WORDS < 4 ? V_LANE_WORDS : 4;  // words of one load
constexpr int V_LOADS = V_LANE_WORDS / V_VECTOR;
constexpr int V_VECTORS = V_WIDTH / V_VECTOR;
constexpr int TILES = D / 16;             // blocks of 16 channels of the output
constexpr int COLUMNS = DRAFTS * GROUP;   // of a KV head
constexpr int BLOCK_COLUMNS = 8 * COLUMN_TILES;
constexpr int ATTENDED = BLOCK_COLUMNS;   // columns of a block
constexpr int COLUMN_BLOCKS = (COLUMNS + ATTENDED - 1) / ATTENDED;
constexpr float LAG = 4.0f;               // how far a score may exceed the kept maximum, log2
#define MINUS_INF __int_as_float(0xff800000)

struct Barriers { u64 full[BUFFERS]; u32 left[BUFFERS]; };

// of 8 columns
struct State {
  float m[2], l[2];        // columns 2 q and 2 q + 1; l is this lane's share
  float acc[TILES][4];     // channels (c, c + 1) of `channel_of` x columns (2 q, 2 q + 1)
};

// The folded queries' source: channels D / 4 * q ... of column g of each tile, fp16 pairs. Those of one tile are kept in
// registers, those of several in shared memory, which all warps read alike: `at` is where the lane's begin.
struct Query {
  u32 words[COLUMN_TILES == 1 ? PAIRS : 1];
  u32 at;
  __device__ __forceinline__ u32 address(int tile, int n) const { return at + 512 * (PAIRS / 4 * tile + n / 4); }
  __device__ __forceinline__ void load(u32 (&x)[4], int tile, int n) const {
    if (COLUMN_TILES == 1) {
#pragma unroll
      for (int k = 0; k < 4; k++) x[k] = words[(n + k) % (sizeof(words) / 4)];
    } else {
      uint4 y = lds128(address(tile, n));
      x[0] = y.x; x[1] = y.y; x[2] = y.z; x[3] = y.w;
    }
  }
};

// first channel of output tile n of a lane; its second channel follows it
__device__ __forceinline__ int channel_of(int n, int g) {
  int pair = n / V_CB, block = n % V_CB;
  int load = pair / (V_VECTOR / 2), inner = pair % (V_VECTOR / 2);
  return V_WIDTH * block + V_VECTOR * (g + 8 * load) + 2 * inner;
}

// raise the maxima when a score of the warp exceeds one by LAG; largest: of this lane, scaled, per head
__device__ __forceinline__ void raise(State& st, float largest0, float largest1) {
  if (!__any_sync(0xffffffffu, largest0 > st.m[0] + LAG || largest1 > st.m[1] + LAG)) return;
  float largest[2] = {largest0, largest1};
  for (int h = 0; h < 2; h++) {
    for (int lanes = 4; lanes < 32; lanes *= 2)
      largest[h] = fmaxf(largest[h], __shfl_xor_sync(0xffffffffu, largest[h], lanes));
    float m = fmaxf(st.m[h], largest[h]);
    float alpha = m == MINUS_INF ? 1.0f : exp2_fast(st.m[h] - m);
    st.m[h] = m;
    st.l[h] *= alpha;
#pragma unroll
    for (int n = 0; n < TILES; n++) { st.acc[n][h] *= alpha; st.acc[n][h + 2] *= alpha; }
  }
}

// the words V_VECTOR * vector ... of a row of value words that begins at `row`
__device__ __forceinline__ void load_words(u32 (&w)[V_VECTOR], u32 row, int vector) {
  if (V_VECTOR == 4) {
    uint4 x = lds128(row + 64 * vector);
    w[0] = x.x; w[1] = x.y; w[V_VECTOR - 2] = x.z; w[V_VECTOR - 1] = x.w;
  } else {
    uint2 x = lds64(row + (64 * (vector / 2) + 8 * (vector % 2)));
    w[0] = x.x; w[1] = x.y;
  }
}

__device__ __forceinline__ float weight(float score, float scale, float m) {
  // m is -inf only if no key of this head was seen; then every score is -inf too
  return exp2_fast(fmaf(score, scale, m == MINUS_INF ? 0.0f : -m));
}

// scale, sees, oldest: of the columns 2 q and 2 q + 1 of each tile; whether they read this page as a record, and from
// which token on
__device__ __forceinline__ void attend_record(State (&st)[COLUMN_TILES], u32 record, const Query& query,
                                              const float (&scale)[COLUMN_TILES][2],
                                              const bool (&sees)[COLUMN_TILES][2],
                                              const int (&oldest)[COLUMN_TILES][2], const Exponents& e, int warp, int g,
                                              int q) {
  u32 halves = record + SCALES_OFFSET;
  u32 folded[COLUMN_TILES][PAIRS];
  float zero[COLUMN_TILES][4];  // the same for all tokens, so for both rows of the fragment
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int k = 0; k < 4; k++) zero[c][k] = 0.f;
#pragma unroll
  for (int n = 0; n < PAIRS; n += 4) {
    uint4 a = lds128(halves + 2 * (K_CHANNEL_SCALE + D / 4 * q + 2 * n));
    uint4 z = lds128(halves + 2 * (K_CHANNEL_ZERO + D / 4 * q + 2 * n));
    u32 as[4] = {a.x, a.y, a.z, a.w}, zs[4] = {z.x, z.y, z.z, z.w};
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
      u32 own[4];
      query.load(own, c, n);
#pragma unroll
      for (int k = 0; k < 4; k++) folded[c][n + k] = multiply_half(own[k], as[k]);
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        mma_half(zero[c], zs[k], zs[k], zs[k + 1], zs[k + 1], own[k], own[k + 1]);
        u32 o0 = minus_offset_pair<K_BITS>((n + k) % K_PAIRS), o1 = minus_offset_pair<K_BITS>((n + k + 1) % K_PAIRS);
        mma_half(zero[c], o0, o0, o1, o1, folded[c][n + k], folded[c][n + k + 1]);
      }
    }
  }
  float s[COLUMN_TILES][BLOCKS][4];
#pragma unroll
  for (int t = 0; t < BLOCKS; t++) {
    // rows g and g + 8 of a fragment are tokens 4 r + (g & 1) and + 2, so that value words hold their neighbours
    int token = 16 * (BLOCKS * warp + t) + 4 * (g >> 1) + (g & 1);
    u32 row0 = record + 4 * (token / K_TB * K_ROW_WORDS + K_LANE_WORDS * q);
    u32 row1 = record + 4 * ((token + 2) / K_TB * K_ROW_WORDS + K_LANE_WORDS * q);
    int shift0 = K_FIELD_BITS * K_PAIRS * (token % K_TB), shift1 = K_FIELD_BITS * K_PAIRS * ((token + 2) % K_TB);
    // of 3-bit codes: two rows of words share one of top bits
    u32 top_row0 = record + 4 * (TOP_INDEX + token / (2 * K_TB) * K_ROW_WORDS + K_LANE_WORDS * q);
    u32 top_row1 = record + 4 * (TOP_INDEX + (token + 2) / (2 * K_TB) * K_ROW_WORDS + K_LANE_WORDS * q);
    int top_shift0 = shift0 + token / K_TB % 2, top_shift1 = shift1 + (token + 2) / K_TB % 2;
#pragma unroll
    for (int u = 0; u < K_LANE_WORDS; u += 4) {
      uint4 x = lds128(row0 + 4 * u), y = lds128(row1 + 4 * u);
      u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
      u32 top_xs[4], top_ys[4];
      if (K_BITS == 3) {
        uint4 a = lds128(top_row0 + 4 * u), b = lds128(top_row1 + 4 * u);
        top_xs[0] = a.x; top_xs[1] = a.y; top_xs[2] = a.z; top_xs[3] = a.w;
        top_ys[0] = b.x; top_ys[1] = b.y; top_ys[2] = b.z; top_ys[3] = b.w;
      }
#pragma unroll
      for (int k = 0; k < 4; k++) {
        u32 top0 = K_BITS == 3 ? top_xs[k] >> top_shift0 : 0u, top1 = K_BITS == 3 ? top_ys[k] >> top_shift1 : 0u;
        u32 w0 = K_TB > 1 ? xs[k] >> shift0 : xs[k], w1 = K_TB > 1 ? ys[k] >> shift1 : ys[k];
#pragma unroll
        for (int n = 0; n < K_PAIRS; n += 2) {
          int pair = K_PAIRS * (u + k) + n;
          u32 a0 = unpack<K_BITS>(w0, top0, n, e), a1 = unpack<K_BITS>(w1, top1, n, e);
          u32 a2 = unpack<K_BITS>(w0, top0, n + 1, e), a3 = unpack<K_BITS>(w1, top1, n + 1, e);
#pragma unroll
          for (int c = 0; c < COLUMN_TILES; c++)
            mma_half(s[c][t], a0, a1, a2, a3, folded[c][pair], folded[c][pair + 1], pair == 0 ? zero[c] : s[c][t]);
        }
      }
    }
    float k0 = lds_half(halves + 2 * (K_TOKEN_SCALE + token)), k1 = lds_half(halves + 2 * (K_TOKEN_SCALE + token + 2));
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
      float(&own)[4] = s[c][t];
      own[0] *= k0; own[1] *= k0; own[2] *= k1; own[3] *= k1;
      // token 0 is attended exactly, with the other first tokens
      if (token == 0) own[0] = own[1] = MINUS_INF;
      if (DRAFTS > 1 && !sees[c][0]) own[0] = own[2] = MINUS_INF;
      if (DRAFTS > 1 && !sees[c][1]) own[1] = own[3] = MINUS_INF;
      if (SLIDING)
#pragma unroll
        for (int n = 0; n < 4; n++)
          if (token + 2 * (n / 2) < oldest[c][n % 2]) own[n] = MINUS_INF;
    }
  }
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    float largest0 = MINUS_INF, largest1 = MINUS_INF;
#pragma unroll
    for (int t = 0; t < BLOCKS; t++) {
      largest0 = fmaxf(largest0, fmaxf(s[c][t][0], s[c][t][2]));
      largest1 = fmaxf(largest1, fmaxf(s[c][t][1], s[c][t][3]));
    }
    raise(st[c], largest0 * scale[c][0], largest1 * scale[c][1]);
  }
  const u32 ONE = 0x3C003C00u;
  float base[COLUMN_TILES][4], sum[COLUMN_TILES][4];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int k = 0; k < 4; k++) base[c][k] = sum[c][k] = 0.f;
  u32 weights[COLUMN_TILES][BLOCKS][2];
#pragma unroll
  for (int t = 0; t < BLOCKS; t++) {
    u32 zeros[COLUMN_TILES][2];
    int token = 16 * (BLOCKS * warp + t) + 4 * (g >> 1) + (g & 1);
    u32 a = halves + 2 * (V_TOKEN_SCALE + token), z = halves + 2 * (V_TOKEN_ZERO + token);
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float token_scale = lds_half(a + 4 * r), token_zero = lds_half(z + 4 * r);
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++) {
        float p0 = weight(s[c][t][2 * r], scale[c][0], st[c].m[0]);
        float p1 = weight(s[c][t][2 * r + 1], scale[c][1], st[c].m[1]);
        st[c].l[0] += p0;
        st[c].l[1] += p1;
        weights[c][t][r] = transpose(pack_half(p0 * token_scale, p1 * token_scale));
        zeros[c][r] = transpose(pack_half(p0 * token_zero, p1 * token_zero));
      }
    }
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
      mma_half(base[c], ONE, ONE, ONE, ONE, zeros[c][0], zeros[c][1]);
      mma_half(sum[c], ONE, ONE, ONE, ONE, weights[c][t][0], weights[c][t][1]);
    }
  }
  // value words: rows 4 (BLOCKS warp + t) + q, blocks of 4 x 4 words
  u32 values = record + V_CODES_OFFSET + 16 * BLOCKS * warp * V_WIDTH + 16 * q;
  u32 tops_at = record + V_CODES_OFFSET + 4 * TOP_INDEX + 16 * BLOCKS * warp * (V_WIDTH / 2) + 16 * q;
#pragma unroll
  for (int load = 0; load < V_LOADS; load++) {
    u32 w[BLOCKS][V_VECTOR], tops[BLOCKS][V_VECTOR];
#pragma unroll
    for (int t = 0; t < BLOCKS; t++) {
      load_words(w[t], values + 16 * t * V_WIDTH, g + 8 * load);
      if (V_BITS == 3) {
        // words of the upper half of the channels share theirs with the lower half
        int vector = (g + 8 * load) % (V_VECTORS / 2), is_upper = (g + 8 * load) / (V_VECTORS / 2);
        load_words(tops[t], tops_at + 16 * t * (V_WIDTH / 2), vector);
#pragma unroll
        for (int k = 0; k < V_VECTOR; k++) tops[t][k] >>= is_upper;
      }
    }
#pragma unroll
    for (int j = 0; j < V_CB; j++) {
      u32 channel = halves + 2 * (V_CHANNEL_SCALE + V_WIDTH * j + V_VECTOR * (g + 8 * load));
      u32 scales[V_VECTOR / 2];
      if (V_VECTOR == 4) {
        uint2 x = lds64(channel);
        scales[0] = x.x; scales[V_VECTOR / 2 - 1] = x.y;
      } else {
        scales[0] = lds32(channel);
      }
      float first[COLUMN_TILES][4];
#pragma unroll
      for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
        for (int n = 0; n < 4; n++) first[c][n] = fmaf(-offset<V_BITS>(j), sum[c][n], base[c][n]);
#pragma unroll
      for (int k = 0; k < V_VECTOR / 2; k++) {
        float o[COLUMN_TILES][4];
#pragma unroll
        for (int t = 0; t < BLOCKS; t++) {
          u32 a0 = unpack<V_BITS>(w[t][2 * k], tops[t][2 * k], j, e);
          u32 a1 = unpack<V_BITS>(w[t][2 * k + 1], tops[t][2 * k + 1], j, e);
          u32 a2 = unpack<V_BITS>(w[t][2 * k], tops[t][2 * k], V_CB + j, e);
          u32 a3 = unpack<V_BITS>(w[t][2 * k + 1], tops[t][2 * k + 1], V_CB + j, e);
#pragma unroll
          for (int c = 0; c < COLUMN_TILES; c++)
            mma_half(o[c], a0, a1, a2, a3, weights[c][t][0], weights[c][t][1], t == 0 ? first[c] : o[c]);
        }
        float c0 = low_half(scales[k]), c1 = high_half(scales[k]);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++) {
          float(&acc)[4] = st[c].acc[(load * (V_VECTOR / 2) + k) * V_CB + j];
          acc[0] = fmaf(o[c][0], c0, acc[0]);
          acc[1] = fmaf(o[c][1], c0, acc[1]);
          acc[2] = fmaf(o[c][2], c1, acc[2]);
          acc[3] = fmaf(o[c][3], c1, acc[3]);
        }
      }
    }
  }
}

// The queries of column g of each tile, float32, null where a tile has no such column; each is divided by a power of two.
struct QueryRows {
  const float* row[COLUMN_TILES];
  float down[COLUMN_TILES];
};

// The same in the model's dtype, for exact keys: channels 8 (n + q) ... for n = 0, 4, ..., so that the lanes of a key
// read 64 bytes in one piece. Two bfloat16 stand for a float32: 8 bits of the rotated query are fewer than the model's own
// query had.
struct ExactQuery {
  u32 high[COLUMN_TILES][PAIRS], low[COLUMN_TILES][PAIRS];
  __device__ __forceinline__ ExactQuery(const QueryRows& from, int q) {
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int n = 0; n < PAIRS; n += 2) {
        const int channel = 8 * (n / 4 * 4 + q) + 2 * (n % 4);
        float4 f = from.row[c] ? *(const float4*)(from.row[c] + channel) : make_float4(0.f, 0.f, 0.f, 0.f);
        set(c, n, f.x * from.down[c], f.y * from.down[c]);
        set(c, n + 1, f.z * from.down[c], f.w * from.down[c]);
      }
  }
  __device__ __forceinline__ void set(int c, int n, float x, float y) {
#if BF16
    high[c][n] = pack_bf16(x, y);
    low[c][n] = pack_bf16(x - __int_as_float(high[c][n] << 16), y - __int_as_float(high[c][n] & 0xffff0000u));
#else
    high[c][n] = pack_half(x, y);
#endif
  }
};

// 16 exact tokens; k, v: rows of D elements of 16 bits for token n = 0 .. 15 by `rows`, which returns false beyond the
// end; sees(n, c, h): whether column h of the lane's two of tile c sees token n
template <typename Rows, typename Sees>
__device__ __forceinline__ void attend_exact(State (&st)[COLUMN_TILES], Rows rows, Sees sees, const ExactQuery& query,
                                             const float (&scale)[COLUMN_TILES][2], int g, int q) {
  float s[COLUMN_TILES][4];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int n = 0; n < 4; n++) s[c][n] = 0.f;
  const u8 *k0, *k1, *v0, *v1;
  bool in0 = rows(g, k0, v0), in1 = rows(g + 8, k1, v1);
#pragma unroll
  for (int n = 0; n < PAIRS; n += 4) {
    uint4 zero4 = make_uint4(0, 0, 0, 0);
    const int channel = 8 * (n + q);
    uint4 x = in0 ? *(const uint4*)(k0 + 2 * channel) : zero4;
    uint4 y = in1 ? *(const uint4*)(k1 + 2 * channel) : zero4;
    u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++) {
#pragma unroll
      for (int k = 0; k < 4; k += 2) {
        mma_exact(s[c], xs[k], ys[k], xs[k + 1], ys[k + 1], query.high[c][n + k], query.high[c][n + k + 1]);
#if BF16
        mma_exact(s[c], xs[k], ys[k], xs[k + 1], ys[k + 1], query.low[c][n + k], query.low[c][n + k + 1]);
#endif
      }
    }
  }
  u32 b0[COLUMN_TILES], b1[COLUMN_TILES];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    float(&own)[4] = s[c];
    if (!in0) own[0] = own[1] = MINUS_INF;
    if (!in1) own[2] = own[3] = MINUS_INF;
    if (DRAFTS > 1 || SLIDING)
#pragma unroll
      for (int n = 0; n < 4; n++)
        if (!sees(g + 8 * (n / 2), c, n % 2)) own[n] = MINUS_INF;
    // a padded head has scale 0; -inf x 0 is not a number
    float t0 = scale[c][0] == 0.f ? 1.f : scale[c][0], t1 = scale[c][1] == 0.f ? 1.f : scale[c][1];
    State& to = st[c];
    raise(to, fmaxf(own[0], own[2]) * t0, fmaxf(own[1], own[3]) * t1);
    float p[4] = {weight(own[0], t0, to.m[0]), weight(own[1], t1, to.m[1]), weight(own[2], t0, to.m[0]),
                  weight(own[3], t1, to.m[1])};
    to.l[0] += p[0] + p[2];
    to.l[1] += p[1] + p[3];
#if BF16
    b0[c] = transpose(pack_bf16(p[0], p[1]));
    b1[c] = transpose(pack_bf16(p[2], p[3]));
#else
    b0[c] = transpose(pack_half(p[0], p[1]));
    b1[c] = transpose(pack_half(p[2], p[3]));
#endif
  }
  const u8* v[4];
  bool in[4];
#pragma unroll
  for (int k = 0; k < 4; k++) {
    const u8* unused;
    in[k] = rows(2 * q + (k & 1) + 8 * (k >> 1), unused, v[k]);
  }
#pragma unroll
  for (int load = 0; load < V_LOADS; load++)
#pragma unroll
    for (int j = 0; j < V_CB; j++) {
      int channel = V_WIDTH * j + V_VECTOR * (g + 8 * load);
      u32 x[4][V_VECTOR / 2];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        if (V_VECTOR == 4) {
          uint2 y = in[k] ? *(const uint2*)(v[k] + 2 * channel) : make_uint2(0, 0);
          x[k][0] = y.x; x[k][V_VECTOR / 2 - 1] = y.y;
        } else {
          x[k][0] = in[k] ? *(const u32*)(v[k] + 2 * channel) : 0u;
        }
      }
#pragma unroll
      for (int k = 0; k < V_VECTOR / 2; k++) {
        u32 a0 = __byte_perm(x[0][k], x[1][k], 0x5410), a1 = __byte_perm(x[0][k], x[1][k], 0x7632);
        u32 a2 = __byte_perm(x[2][k], x[3][k], 0x5410), a3 = __byte_perm(x[2][k], x[3][k], 0x7632);
#pragma unroll
        for (int c = 0; c < COLUMN_TILES; c++)
          mma_exact(st[c].acc[(load * (V_VECTOR / 2) + k) * V_CB + j], a0, a1, a2, a3, b0[c], b1[c]);
      }
    }
}

extern "C" __global__ void __launch_bounds__(128, MIN_BLOCKS)
kvarn_decode(const float* __restrict__ rotated_q, const u8* __restrict__ records,
             const int* __restrict__ ring_pages, const int* __restrict__ page_table,
             const int* __restrict__ seq_lens, const int* __restrict__ exact_starts, const int* __restrict__ requests,
             const int* __restrict__ indptr, float* __restrict__ out, float* __restrict__ lse, int stride_page_table,
             int sm_scale_log2_bits, int batch_size) {
  const float sm_scale_log2 = __int_as_float(sm_scale_log2_bits);
  DYNAMIC_SHARED(shared);
  __shared__ Barriers bars;
  __shared__ float warp_m[WARPS][BLOCK_COLUMNS], warp_l[WARPS][BLOCK_COLUMNS];
  const int split = blockIdx.x, head = blockIdx.y / COLUMN_BLOCKS;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, q = lane % 4;
  const int b = requests[split];  // read before it is known to be one, so that the two reads are one wait
  if (split >= indptr[batch_size]) return;
#include "read/split.cuh"
  // what arrives by bulk copy: the records, then the pages of the ring, of which only the tokens of this split
  const int num_records = max(end - begin, 0), first_ring_page = ring_begin / RING_TOKENS;
  const int arrivals = num_records + (ring_begin < ring_end ? (ring_end - 1) / RING_TOKENS - first_ring_page + 1 : 0);
  auto ring_tokens = [&](int n, int& from, int& to) {
    const int first = (first_ring_page + n - num_records) * RING_TOKENS;
    from = max(ring_begin, first);
    to = min(ring_end, first + RING_TOKENS);
    return first;
  };
  auto order = [&](int n) {
    const int buffer = n % TEAMS * STAGES + n / TEAMS % STAGES;
    u8* target = shared + buffer * RECORD;
    if (n < num_records) {
      bulk_copy(target, record_of(begin + n), RECORD, &bars.full[buffer]);
    } else {
      int from, to;
      const int first = ring_tokens(n, from, to), skipped = (from - first) * (4 * D);
      const u8* page = page_at(ring_pages[first / RING_TOKENS % RING_PAGES]);
      bulk_copy(target + skipped, page + skipped, (to - from) * (4 * D), &bars.full[buffer]);
    }
  };
  if (threadIdx.x < BUFFERS) {
    mbarrier_init(&bars.full[threadIdx.x]);
    bars.left[threadIdx.x] = 0;
    fence_init();
    const int n = threadIdx.x % STAGES * TEAMS + threadIdx.x / STAGES;
    if (n < arrivals) order(n);
  }
  __syncthreads();

  // the query of column g of each tile, channels D / 4 * q ..., divided by a power of two
  QueryRows query_rows;
  float scale[COLUMN_TILES][2];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    const float* row = 8 * c + g < columns ? rotated_q + (long long)row_of(b, 8 * c + g) * D : nullptr;
    float largest = 0.f;
    for (int n = 0; n < D / 4; n += 4) {
      float4 f = row ? *(const float4*)(row + D / 4 * q + n) : make_float4(0.f, 0.f, 0.f, 0.f);
      largest = fmaxf(largest, fmaxf(fmaxf(fabsf(f.x), fabsf(f.y)), fmaxf(fabsf(f.z), fabsf(f.w))));
    }
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const int exponent = min(max(((__float_as_int(largest) >> 23) & 0xFF) - 126, -100), 100);
    const float row_scale = row ? __int_as_float((127 + exponent) << 23) * sm_scale_log2 : 0.f;
    query_rows.row[c] = row;
    query_rows.down[c] = __int_as_float((127 - exponent) << 23);
    scale[c][0] = __shfl_sync(0xffffffffu, row_scale, 8 * q);
    scale[c][1] = __shfl_sync(0xffffffffu, row_scale, 8 * q + 4);
  }

  State st[COLUMN_TILES];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    st[c].m[0] = st[c].m[1] = MINUS_INF;
    st[c].l[0] = st[c].l[1] = 0.f;
#pragma unroll
    for (int n = 0; n < TILES; n++)
#pragma unroll
      for (int k = 0; k < 4; k++) st[c].acc[n][k] = 0.f;
  }

  // of the columns 2 q and 2 q + 1 of each tile: the oldest and the newest token that each sees, the first page that it
  // reads exactly
  int oldest[COLUMN_TILES][2], newest[COLUMN_TILES][2], exact_from[COLUMN_TILES][2];
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int draft = min((first_column + 8 * c + 2 * q + h) / GROUP, DRAFTS - 1);
      oldest[c][h] = oldest_of(draft);
      newest[c][h] = position + draft;
      exact_from[c][h] = exact_page_of(draft);
    }
  for (int start = begin + 16 * warp; start < end; start += 16 * WARPS) {
    const ExactQuery first_query(query_rows, q);
    auto row = [&](int n, const u8*& k, const u8*& v) {
      const bool exists = start + n < end;
      k = record_of(exists ? start + n : begin) + SCALES_OFFSET + 2 * K_FIRST;
      v = k + 2 * D;
      return exists;
    };
    auto sees = [&](int n, int c, int h) {
      return start + n < exact_from[c][h] && (!SLIDING || (start + n) * G >= oldest[c][h]);
    };
    attend_exact(st, row, sees, first_query, scale, g, q);
  }
  Query query;
  query.at = shared_address(shared + BUFFERS * RECORD + 16 * lane);
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    if (COLUMN_TILES > 1 && warp != c) continue;
#pragma unroll
    for (int n = 0; n < PAIRS; n += 4) {
      u32 words[4];
#pragma unroll
      for (int k = 0; k < 4; k++) {
        const float* row = query_rows.row[c];
        float2 f = row ? *(const float2*)(row + D / 4 * q + 2 * (n + k)) : make_float2(0.f, 0.f);
        words[k] = pack_half(f.x * query_rows.down[c], f.y * query_rows.down[c]);
      }
      if (COLUMN_TILES == 1) {
#pragma unroll
        for (int k = 0; k < 4; k++) query.words[(n + k) % (sizeof(query.words) / 4)] = words[k];
      } else {
        sts128(query.address(c, n), make_uint4(words[0], words[1], words[2], words[3]));
      }
    }
  }
  if (COLUMN_TILES > 1) __syncthreads();
  const Exponents e((u32)batch_size >> 31);
  const int team = warp / TILE_WARPS;
  int stage = 0, n = team;
  u32 parity = 0;
  auto arrive = [&]() {
    const int buffer = team * STAGES + stage;
    mbarrier_wait(&bars.full[buffer], parity);
    return shared + buffer * RECORD;
  };
  auto leave = [&]() {
    __syncwarp();
    if (lane == 0) {
      __threadfence_block();
      // the last of the team to leave the buffer orders what comes into it next
      if (atomicAdd(&bars.left[team * STAGES + stage], 1) % TILE_WARPS == TILE_WARPS - 1 && n + BUFFERS < arrivals)
        order(n + BUFFERS);
    }
    __syncwarp();
    if (++stage == STAGES) { stage = 0; parity ^= 1; }
  };
  for (; n < num_records; n += TEAMS) {
    const u8* record = arrive();
    bool sees[COLUMN_TILES][2];
    int oldest_in_page[COLUMN_TILES][2];
#pragma unroll
    for (int c = 0; c < COLUMN_TILES; c++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sees[c][h] = begin + n < exact_from[c][h];
        oldest_in_page[c][h] = oldest[c][h] - (begin + n) * G;
      }
    attend_record(st, shared_address(record), query, scale, sees, oldest_in_page, e, warp % TILE_WARPS, g, q);
    leave();
  }
  const ExactQuery exact_query(query_rows, q);
  for (; n < arrivals; n += TEAMS) {
    const u8* page = arrive();
    int from, to;
    const int first = ring_tokens(n, from, to);
    for (int start = from + 16 * (warp % TILE_WARPS); start < to; start += 16 * TILE_WARPS) {
      auto row = [&](int i, const u8*& k, const u8*& v) {
        k = page + (start + i - first) * (4 * D);
        v = k + 2 * D;
        return start + i < to;
      };
      auto sees = [&](int i, int c, int h) {
        const int token = start + i;
        return token <= newest[c][h] && token >= exact_from[c][h] * G && (!SLIDING || token >= oldest[c][h]);
      };
      attend_exact(st, row, sees, exact_query, scale, g, q);
    }
    leave();
  }

#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
#pragma unroll
    for (int h = 0; h < 2; h++)
      for (int lanes = 4; lanes < 32; lanes *= 2) st[c].l[h] += __shfl_xor_sync(0xffffffffu, st[c].l[h], lanes);
    if (g == 0) {
      warp_m[warp][8 * c + 2 * q] = st[c].m[0];
      warp_m[warp][8 * c + 2 * q + 1] = st[c].m[1];
      warp_l[warp][8 * c + 2 * q] = st[c].l[0];
      warp_l[warp][8 * c + 2 * q + 1] = st[c].l[1];
    }
  }
  __syncthreads();
  float* sums = (float*)shared;  // [WARPS][BLOCK_COLUMNS][D]; every record has been read
#pragma unroll
  for (int c = 0; c < COLUMN_TILES; c++) {
    float factor[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float m = MINUS_INF;
      for (int w = 0; w < WARPS; w++) m = fmaxf(m, warp_m[w][8 * c + 2 * q + h]);
      factor[h] = st[c].m[h] == MINUS_INF ? 0.f : exp2_fast(st[c].m[h] - m);
    }
#pragma unroll
    for (int n = 0; n < TILES; n++) {
      const int channel = channel_of(n, g);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float2 x = make_float2(st[c].acc[n][h] * factor[h], st[c].acc[n][h + 2] * factor[h]);
        *(float2*)(sums + (warp * BLOCK_COLUMNS + 8 * c + 2 * q + h) * D + channel) = x;
      }
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < columns * D; n += 32 * WARPS) {
    const int h = n / D;
    float m = MINUS_INF, l = 0.f, x = 0.f;
    for (int w = 0; w < WARPS; w++) m = fmaxf(m, warp_m[w][h]);
    for (int w = 0; w < WARPS; w++) {
      l += warp_m[w][h] == MINUS_INF ? 0.f : warp_l[w][h] * exp2_fast(warp_m[w][h] - m);
      x += sums[(w * BLOCK_COLUMNS + h) * D + n % D];
    }
    const long long at = row_of(split, h);
    out[at * D + n % D] = l == 0.f ? 0.f : x / l;
    if (n % D == 0) lse[at] = l == 0.f ? MINUS_INF : m + log2f(l);
  }
}
