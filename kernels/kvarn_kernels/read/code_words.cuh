// SPDX-License-Identifier: Apache-2.0
// The words of codes that a lane of a warpgroup unpacks for its fragments of A [64, 16] (device/wgmma.cuh), the layout of
// tile.py. Lane 4 g + q of warp w has the rows 16 w + g and 16 w + g + 8.
//
//     keys     rows are tokens, the depth is channels: pair p of a lane, channels D / 4 q + 2 p and + 1, is half p % 2 of
//              step p / 2
//     values   rows are channels, the depth is tokens
//
// Rows g and g + 8 of keys are tokens 4 (g / 2) + g % 2 and + 2, so that scores have the order of the tokens that the
// fields of a value word hold.

constexpr int K_CB = K_CHANNEL_BLOCKS, K_TB = 32 / K_FIELD_BITS / K_CB;
constexpr int K_ROW_WORDS = D / K_CB;     // words of a row of key words
constexpr int K_LANE_WORDS = K_ROW_WORDS / 4;
constexpr int K_PAIRS = K_CB / 2;         // pairs of channels in a word, per token
constexpr int V_CB = V_CHANNEL_BLOCKS;
constexpr int V_WIDTH = D / V_CB;         // words of a row of value words
constexpr int V_PARTS = V_CB / 2;         // blocks of 64 channels that come from the same words

// the token of row g, with half g + 8, of block m of 64 tokens
__device__ __forceinline__ int token_of(int m, int warp, int g, int half) {
  return 64 * m + 16 * warp + 4 * (g >> 1) + (g & 1) + 2 * half;
}

// the words of a lane's two rows of block m; tops: of 3-bit codes
__device__ __forceinline__ void load_key_words(u32 (&words)[2][K_LANE_WORDS], u32 (&tops)[2][K_LANE_WORDS], u32 record,
                                               int m, int warp, int g, int q) {
#pragma unroll
  for (int half = 0; half < 2; half++) {
    const int t = token_of(m, warp, g, half);
    const int shift = K_FIELD_BITS * K_PAIRS * (t % K_TB);
    const u32 row = record + 4 * (t / K_TB * K_ROW_WORDS + K_LANE_WORDS * q);
    // of 3-bit codes: two rows of words share one of top bits
    const u32 top_row = record + 4 * (TOP_INDEX + t / (2 * K_TB) * K_ROW_WORDS + K_LANE_WORDS * q);
    const int top_shift = shift + t / K_TB % 2;
#pragma unroll
    for (int u = 0; u < K_LANE_WORDS; u += 4) {
      const uint4 x = lds128(row + 4 * u), y = K_BITS == 3 ? lds128(top_row + 4 * u) : make_uint4(0, 0, 0, 0);
      const u32 xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
      for (int k = 0; k < 4; k++) {
        words[half][u + k] = K_TB > 1 ? xs[k] >> shift : xs[k];
        tops[half][u + k] = ys[k] >> top_shift;
      }
    }
  }
}

// The channels of a lane of a block of 64: in rows g and g + 8, and where their words are.
struct ValueBlock {
  // whether the warps of a block have parts of their own
  static constexpr bool OWN_PARTS = D / 64 % V_PARTS != 0;
  int words, part;  // first of 8 neighbouring words; which pair of channel blocks
  __device__ __forceinline__ ValueBlock(int m, int warp) {
    if (OWN_PARTS) {
      words = 8 * (warp / V_PARTS);
      part = warp % V_PARTS;
    } else {
      words = 8 * (warp * (D / 64 / V_PARTS) + m / V_PARTS);
      part = m % V_PARTS;
    }
  }
  __device__ __forceinline__ int channel(int half, int g) const { return words + g + V_WIDTH * (2 * part + half); }
  // the part of block m, known to the compiler, after the words of a warp's own part were shifted
  __device__ static constexpr int known_part(int m) { return OWN_PARTS ? 0 : m % V_PARTS; }
};

// the address of the value word (4 step + q, c) in a matrix of WIDTH words a row
template <int WIDTH>
__device__ __forceinline__ u32 value_word(u32 base, int step, int c, int q) {
  return base + 4 * (4 * WIDTH * step + c / 4 * 16 + 4 * q + c % 4);
}

// the words of a lane for so many steps of 16 tokens from the first one on
template <int COUNT>
__device__ __forceinline__ void load_value_words(u32 (&words)[COUNT], u32 (&tops)[COUNT], u32 record, int first,
                                                 const ValueBlock& block, int g, int q) {
  const int shift = ValueBlock::OWN_PARTS ? V_FIELD_BITS * 2 * block.part : 0;
  const int c = block.words + g, top_c = c % (D / 8);
#pragma unroll
  for (int n = 0; n < COUNT; n++) {
    words[n] = lds32(value_word<V_WIDTH>(record + V_CODES_OFFSET, first + n, c, q)) >> shift;
    // words of the upper half of the channels share theirs with the lower half
    tops[n] = 0u;
    if (V_BITS == 3)
      tops[n] = lds32(value_word<D / 8>(record + V_CODES_OFFSET + 4 * TOP_INDEX, first + n, top_c, q)) >>
                c / (D / 8) + shift;
  }
}
