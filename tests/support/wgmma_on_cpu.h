// SPDX-License-Identifier: Apache-2.0
// Products of a warpgroup as C++, beside ptx_on_cpu.h. They are done at the wait: until then their sums are NaN, and what
// they read from shared memory must neither change nor be what its writer has not fenced.
#pragma once

struct Product {
  float* sums;
  float a[2][16];  // rows g and g + 8
  bool is_bf16, add;
  u64 b;
  std::vector<u8> seen;    // what B was when the product was ordered
  bool shares_a = false;   // A, of fp16 numbers, is in shared memory
  u64 shared_a = 0;
  std::vector<u8> seen_a;
};
// of a thread
struct Products {
  std::vector<Product> open;              // not committed
  std::vector<std::vector<Product>> groups;
  std::map<float*, std::vector<float>> before;  // sums that products on their way will add to
  std::vector<std::pair<u32, int>> unfenced;
  bool registers_fenced = false;
};
inline Products products[32 * 32];
inline unsigned short writer[sizeof(dynamic_shared)];  // 1 + the thread whose store to a byte is not fenced

inline void note_store(u32 address, int bytes) {
  for (int n = 0; n < bytes; n++) writer[address + n] = 1 + threadIdx.x;
  products[threadIdx.x].unfenced.push_back({address, bytes});
}

// before a launch
inline void reset_products() {
  stored = note_store;
  for (Products& own : products) own = Products();
  std::memset(writer, 0, sizeof(writer));
}

inline void fence_stores() {
  Products& own = products[threadIdx.x];
  for (auto [address, bytes] : own.unfenced)
    for (int n = 0; n < bytes; n++)
      if (writer[address + n] == 1 + threadIdx.x) writer[address + n] = 0;
  own.unfenced.clear();
}

inline void fence_registers() { products[threadIdx.x].registers_fenced = true; }

inline void commit_products() {
  Products& own = products[threadIdx.x];
  own.groups.push_back(std::move(own.open));
  own.open.clear();
  own.registers_fenced = false;
}

inline u32 element_of(u64 b, int k, int n) {
  auto field = [&](int bit) { return (u32)(b >> bit & 0x3FFF) << 4; };
  return field(0) + k / 8 * field(16) + n / 8 * field(32) + n % 8 * 16 + k % 8 * 2;
}

inline std::vector<u8> bytes_of(u64 b, int columns = BLOCK_COLUMNS) {
  std::vector<u8> bytes;
  for (int k = 0; k < 16; k++)
    for (int n = 0; n < columns; n++) {
      const u32 at = element_of(b, k, n);
      if (writer[at] || writer[at + 1]) fail("orders a product of what was not fenced");
      bytes.insert(bytes.end(), {dynamic_shared[at], dynamic_shared[at + 1]});
    }
  return bytes;
}

template <int GROUPS>
void wait_products() {
  Products& own = products[threadIdx.x];
  const int q = threadIdx.x % 4;
  while ((int)own.groups.size() > GROUPS) {
    for (Product& x : own.groups[0]) {
      if (own.before.count(x.sums)) {
        std::copy(own.before[x.sums].begin(), own.before[x.sums].end(), x.sums);
        own.before.erase(x.sums);
      }
      if (threadIdx.x % 32 == 0 && (bytes_of(x.b) != x.seen || x.shares_a && bytes_of(x.shared_a, 64) != x.seen_a))
        fail("finds that what a product reads has changed");
      if (x.shares_a)
        for (int row = 0; row < 2; row++)
          for (int k = 0; k < 16; k++) {
            const u32 at = element_of(x.shared_a, k, threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4 + 8 * row);
            x.a[row][k] = from_half(load_shared<unsigned short>(at));
          }
      for (int n = 0; n < BLOCK_COLUMNS / 2; n++) {
        float sum = x.add ? x.sums[n] : 0.0f;
        for (int k = 0; k < 16; k++) {
          const u32 half = load_shared<unsigned short>(element_of(x.b, k, 8 * (n / 4) + 2 * q + n % 2));
          sum += x.a[n / 2 % 2][k] * (x.is_bf16 ? __int_as_float(half << 16) : from_half(half));
        }
        x.sums[n] = sum;
      }
    }
    own.groups.erase(own.groups.begin());
  }
}

inline void arrived(Sums&) {}

inline void order(Sums& d, Product&& x) {
  Products& own = products[threadIdx.x];
  if (!own.registers_fenced) fail("orders a product whose registers were not fenced");
  if (threadIdx.x % 32 == 0) {
    x.seen = bytes_of(x.b);
    if (x.shares_a) x.seen_a = bytes_of(x.shared_a, 64);
  }
  if (!own.before.count(d)) own.before[d] = std::vector<float>(d, d + BLOCK_COLUMNS / 2);
  std::fill(d, d + BLOCK_COLUMNS / 2, NAN);
  own.open.push_back(std::move(x));
}

template <bool IS_BF16>
void product(Sums& d, const u32 (&a)[4], u64 b, bool add) {
  const auto& all = gather(a);
  Product x{d, {}, IS_BF16, add, b, {}};
  const int lane = threadIdx.x % 32;
  for (int row = 0; row < 2; row++)
    for (int k = 0; k < 16; k++) {
      const u32 half = all[lane / 4 * 4 + k % 8 / 2][row + 2 * (k / 8)] >> 16 * (k % 2) & 0xFFFF;
      x.a[row][k] = IS_BF16 ? __int_as_float(half << 16) : from_half(half);
    }
  order(d, std::move(x));
}
template <bool ADD>
void product_half(Sums& d, u64 a, u64 b) {
  order(d, Product{d, {}, false, ADD, b, {}, true, a, {}});
}
template <int COUNT>
void keep_registers() {}
template <int COUNT>
void take_registers() {}
template <bool ADD>
void product_half(Sums& d, const u32 (&a)[4], u64 b) { product<false>(d, a, b, ADD); }
inline void product_half(Sums& d, const u32 (&a)[4], u64 b, bool add) { product<false>(d, a, b, add); }
template <bool ADD>
void product_exact(Sums& d, const u32 (&a)[4], u64 b) { product<BF16>(d, a, b, ADD); }

// the address of row `row` of matrix n, which lane 8 n + row has
template <int N>
u32 row_address(u32 a, int n, int row) {
  const u32 mine[1] = {a};
  return gather(mine)[8 * n + row][0];
}
template <int N>
void store_matrices(u32 a, const u32 (&x)[N]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int n = 0; n < N; n++) store_shared<u32>(row_address<N>(a, n, g) + 4 * q, x[n]);
}
template <int N>
void store_transposed(u32 a, const u32 (&x)[N]) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int n = 0; n < N; n++)
    for (int i = 0; i < 2; i++)
      store_shared<unsigned short>(row_address<N>(a, n, 2 * q + i) + 2 * g, x[n] >> 16 * i);
}
inline void load_matrices(u32 (&x)[4], u32 a) {
  const int g = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
  for (int n = 0; n < 4; n++) x[n] = lds32(row_address<4>(a, n, g) + 4 * q);
}
inline void load_transposed(u32 (&x)[4], u32 a) {
  load_matrices(x, a);
  for (u32& matrix : x) matrix = transpose(matrix);
}
