// SPDX-License-Identifier: Apache-2.0
// Rotate the new tokens of an extend step, for sm_80 and newer; the contract of rotate.rotate_chunk. A warp has a row of
// D channels. The constants in capitals that are not set here come from chunk_cuda.py.

#include "device/early_start.cuh"
#include "record/hadamard.cuh"

constexpr int ROW_WORDS = D / 2;

// rows of k, of v and, with a third part of the grid, of q: [T, heads, D]; k and v stay in the model's dtype, q does not
extern "C" __global__ void __launch_bounds__(32 * WARPS)
kvarn_rotate_chunk(const u32* __restrict__ k, const u32* __restrict__ v, const u32* __restrict__ q,
                   u32* __restrict__ k_out, u32* __restrict__ v_out, float* __restrict__ q_out, int num_tokens,
                   int stride_k_token, int stride_k_head, int stride_v_token, int stride_v_head, int stride_q_token,
                   int stride_q_head) {
  let_next_start();
  const int part = blockIdx.y, lane = threadIdx.x % 32;
  const long long row = (long long)blockIdx.x * WARPS + threadIdx.x / 32;
  const int heads = part == 2 ? HQ : HK;
  if (row >= (long long)num_tokens * heads) return;
  const long long token = row / heads, head = row % heads;
  const u32* from = part == 0 ? k : part == 1 ? v : q;
  const long long at = part == 0   ? token * stride_k_token + head * stride_k_head
                       : part == 1 ? token * stride_v_token + head * stride_v_head
                                   : token * stride_q_token + head * stride_q_head;
  float x[ROW_CHANNELS];
  rotate_row(x, from + at / 2, lane);
  if (part == 2) {
#pragma unroll
    for (int n = 0; n < ROW_CHANNELS; n++) q_out[row * D + ROW_CHANNELS * lane + n] = x[n];
  } else {
    u32* to = (part == 0 ? k_out : v_out) + row * ROW_WORDS;
#pragma unroll
    for (int n = 0; n < ROW_CHANNELS; n += 2) to[(ROW_CHANNELS * lane + n) / 2] = model_pair(x[n], x[n + 1]);
  }
}
