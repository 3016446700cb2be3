// SPDX-License-Identifier: Apache-2.0
// Decode attention of more columns than a block of columns_sm90.cu has, for sm_90a: the same contract as decode.py. The
// columns, query heads for drafts, are rows of attend_rows.cuh here, BLOCK_ROWS of a block.

#include "read/attend_rows.cuh"

constexpr int COLUMNS = DRAFTS * GROUP;   // of a KV head
constexpr int ATTENDED = BLOCK_ROWS;      // columns of a block
constexpr int COLUMN_BLOCKS = (COLUMNS + ATTENDED - 1) / ATTENDED;
// units of a page that is read exactly
constexpr int EXACT_UNITS = G / RING_CHUNK * RING_UNITS;

// The split that a block attends; see attend_rows.cuh.
struct Work {
  const u8* records;
  const int *page_ids, *ring_pages;
  int head, request, split;
  int position, exact_start, last;  // of the first draft; of the request; the position of the last draft of the block
  int first_column, rows;
  int begin, num_records, exact_begin, num_exact, first_exact;

  __device__ __forceinline__ int position_of(int row) const {
    return position + (first_column + min(row, rows - 1)) / GROUP;
  }
  // a row among the heads of all drafts of all requests, or of all splits
  __device__ __forceinline__ int row_of(int of, int row) const {
    const int c = first_column + row;
    return ((of * DRAFTS + c / GROUP) * HK + head) * GROUP + c % GROUP;
  }
  __device__ __forceinline__ long long query_of(int row) const { return row_of(request, row); }
  __device__ __forceinline__ int result_of(int row) const { return row_of(split, row); }
  __device__ __forceinline__ void wait_for_inputs() const {}
  // what comes after the last draft is not seen
  __device__ __forceinline__ const u8* exact_row(int position, int side, const int* ring_pages) const {
    return ring_row(records, ring_pages, head, min(position, last), side);
  }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
kvarn_verify(const float* __restrict__ rotated_q, const u8* __restrict__ records, const int* __restrict__ ring_pages,
             const int* __restrict__ page_table, const int* __restrict__ seq_lens,
             const int* __restrict__ exact_starts, const int* __restrict__ requests, const int* __restrict__ indptr,
             float* __restrict__ out, float* __restrict__ lse, int stride_page_table, int sm_scale_log2_bits,
             int batch_size) {
  DYNAMIC_SHARED(memory);
  __shared__ Shared shared;
  const int split = blockIdx.x, head = blockIdx.y / COLUMN_BLOCKS;
  const int b = requests[split];  // read before it is known to be one, so that the two reads are one wait
  if (split >= indptr[batch_size]) return;
#include "read/split.cuh"
  Work work{records, pages + begin, ring_pages};
  work.head = head, work.request = b, work.split = split;
  work.position = position, work.exact_start = exact_start, work.last = position + last_draft;
  work.first_column = first_column, work.rows = columns;
  // an exact page belongs to the split that holds its first unit
  auto exact_of = [&](int unit) {
    const int page = first_exact + (max(unit - record_units, 0) + EXACT_UNITS - 1) / EXACT_UNITS;
    return min(page, work.last / G + 1);
  };
  work.begin = begin, work.num_records = max(end - begin, 0), work.first_exact = first_exact;
  work.exact_begin = exact_of(unit), work.num_exact = exact_of(unit + per_split) - work.exact_begin;
  attend_rows(memory, shared, work, rotated_q, records, out, lse, __int_as_float(sm_scale_log2_bits));
}
