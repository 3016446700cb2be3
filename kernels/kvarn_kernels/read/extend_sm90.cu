// SPDX-License-Identifier: Apache-2.0
// Extend attention of a few new tokens for sm_90a: rows of attend_rows.cuh, a query head for a new token each.
//
// A block attends one split of the pages of a request for one KV head and BLOCK_ROWS rows: records, then the ring as it
// was before this step, and the new tokens. It starts beside the kernel that rotates these, and waits for it once it has
// ordered its first records. The encoder may start beside it: nothing is read here that this step writes.

#include "device/early_start.cuh"
#include "read/attend_rows.cuh"

// The split of a request that a block attends; see attend_rows.cuh.
struct Work {
  const u8 *records, *chunk_k, *chunk_v;
  const int *page_ids, *ring_pages;
  int head, split, splits;
  int first_token, prefix_len, exact_start;  // the first new token among those of the step; of the request
  int first_row, rows, last;                 // among the rows of the request; the position of the last one
  int begin, num_records, exact_begin, num_exact, first_exact;

  __device__ __forceinline__ int position_of(int row) const {
    return prefix_len + (first_row + min(row, rows - 1)) / GROUP;
  }
  // a row among the query heads of so many results of each token
  __device__ __forceinline__ long long row_of(int row, int results, int result) const {
    const int c = first_row + row;
    return (((long long)(first_token + c / GROUP) * results + result) * HK + head) * GROUP + c % GROUP;
  }
  __device__ __forceinline__ long long query_of(int row) const { return row_of(row, 1, 0); }
  __device__ __forceinline__ int result_of(int row) const { return (int)row_of(row, splits, split); }
  __device__ __forceinline__ void wait_for_inputs() const {
    wait_for_previous();
    // in this order: the encoder reads what has been rotated
    let_next_start();
  }
  // what comes after the last token is not seen
  __device__ __forceinline__ const u8* exact_row(int position, int side, const int* ring_pages) const {
    const int known = min(position, last);
    const long long new_token = first_token + known - prefix_len;
    if (known >= prefix_len) return (side ? chunk_v : chunk_k) + (new_token * HK + head) * (2 * D);
    return ring_row(records, ring_pages, head, known, side);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
kvarn_extend(const float* __restrict__ rotated_q, const u8* __restrict__ chunk_k, const u8* __restrict__ chunk_v,
             const u8* __restrict__ records, const int* __restrict__ ring_pages, const int* __restrict__ page_table,
             const int* __restrict__ prefix_lens, const int* __restrict__ exact_starts,
             const int* __restrict__ qo_indptr, float* __restrict__ out, float* __restrict__ lse, int stride_page_table,
             int sm_scale_log2_bits, int splits) {
  DYNAMIC_SHARED(memory);
  __shared__ Shared shared;
  // blocks of rows that read the same records are neighbours
  const int b = blockIdx.z;
  Work work{records, chunk_k, chunk_v};
  work.head = blockIdx.y % HK, work.split = blockIdx.y / HK, work.splits = splits;
  work.first_token = qo_indptr[b], work.first_row = blockIdx.x * BLOCK_ROWS;
  work.rows = min((qo_indptr[b + 1] - work.first_token) * GROUP - work.first_row, BLOCK_ROWS);
  if (work.rows <= 0) return;
  work.prefix_len = prefix_lens[b], work.exact_start = exact_starts[b];
  work.ring_pages = ring_pages + b * RING_PAGES;
  work.last = work.position_of(work.rows - 1);
  work.first_exact = exact_page(work.position_of(0), work.exact_start);
  const int end_record = exact_page(work.last, work.exact_start);
  // an exact page takes EXACT_UNITS times as long as a record, and belongs to the split of its first unit
  const int units = end_record + EXACT_UNITS * (work.last / G + 1 - work.first_exact);
  const int first_unit = units * work.split / splits, end_unit = units * (work.split + 1) / splits;
  auto exact_of = [&](int unit) {
    return work.first_exact + (max(unit - end_record, 0) + EXACT_UNITS - 1) / EXACT_UNITS;
  };
  work.begin = min(first_unit, end_record), work.num_records = min(end_unit, end_record) - work.begin;
  work.exact_begin = exact_of(first_unit), work.num_exact = exact_of(end_unit) - work.exact_begin;
  work.page_ids = page_table + (long long)b * stride_page_table + work.begin;
  attend_rows(memory, shared, work, rotated_q, records, out, lse, __int_as_float(sm_scale_log2_bits));
}
