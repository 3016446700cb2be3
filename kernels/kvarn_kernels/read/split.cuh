  // SPDX-License-Identifier: Apache-2.0
  // What a block of a decode kernel attends: part of the body of a kernel that has the parameters of kvarn_decode, its
  // split and the request b of the split. A split (decode_plan.py) is a run of units of one request; the block attends
  // one KV head and ATTENDED of the head's COLUMNS: its query heads or, where drafts are verified, those of each
  // draft, one draft after the other. Pages begin .. end - 1 are read as records, the tokens ring_begin .. ring_end - 1
  // from the ring.
  const int first_split = indptr[b];
  // of the first draft; the tables of a request are those of its first row
  const int position = seq_lens[b * DRAFTS] - 1, exact_start = exact_starts[b * DRAFTS];
  // the first token in the sliding window of a draft; SLIDING: its tokens, 0 for all
  auto oldest_of = [&](int draft) { return SLIDING ? max(position + draft - (SLIDING - 1), 0) : 0; };
  auto exact_page_of = [&](int draft) {
    const int page = (position + draft) / G;
    return max(min(max(page - WINDOW, exact_start / G), page), oldest_of(draft) / G);
  };
  const int first_page = oldest_of(0) / G;
  // pages before exact_page are read as records by the last draft; the first reads exactly from first_exact on
  const int exact_page = exact_page_of(DRAFTS - 1), first_exact = exact_page_of(0);
  const int record_units = exact_page - first_page;
  const int units = record_units + ((position + DRAFTS - 1 - first_exact * G) / RING_CHUNK + 1) * RING_UNITS;
  const int splits = indptr[b + 1] - first_split;
  const int per_split = SPLIT_UNITS > 0 ? SPLIT_UNITS : (units + splits - 1) / splits;
  const int unit = (split - first_split) * per_split;
  const int first_column = ATTENDED * (blockIdx.y % COLUMN_BLOCKS);
  const int columns = min(ATTENDED, COLUMNS - first_column);
  const int last_draft = (first_column + columns - 1) / GROUP;  // of this block
  const int begin = first_page + min(unit, record_units);
  const int end = min(first_page + unit + per_split, exact_page_of(last_draft));
  // a chunk of the ring belongs to the split that holds its first unit
  auto ring_start = [&](int u) {
    return first_exact * G + (max(u - record_units, 0) + RING_UNITS - 1) / RING_UNITS * RING_CHUNK;
  };
  const int ring_begin = ring_start(unit), ring_end = min(ring_start(unit + per_split), position + last_draft + 1);
  // the row of a column among the heads of all drafts of all requests, or of all splits
  auto row_of = [&](int of, int column) {
    const int c = first_column + column, draft = DRAFTS > 1 ? c / GROUP : 0;
    return ((of * DRAFTS + draft) * HK + head) * GROUP + c - draft * GROUP;
  };
  const int* pages = page_table + (long long)b * DRAFTS * stride_page_table;
  ring_pages += b * DRAFTS * RING_PAGES;
  auto page_at = [&](int page) { return records + ((long long)page * HK + head) * RECORD; };
  auto record_of = [&](int p) { return page_at(pages[p]); };
