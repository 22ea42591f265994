// The matrix product at one position of Winograd's convolution: gemm.h's register tile, for any
// number of contiguous rows of A, with short sums.
#pragma once
#include <algorithm>

#include "gemm.h"

namespace FASTDIFF_ISA {

template <int R, int V>
static inline void add_products(const float* a, int64_t ld_a, const float* b, vf (&acc)[R][V]) {
  vf value[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) value[v] = load(b + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    const vf scalar = splat(a[r * ld_a]);
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[r][v] += scalar * value[v];
  }
}

#if defined(__AVX512BF16__)
static inline void store(Pair* to, vf first, vf second) {
  bf16 rounded[2][W];
  store(rounded[0], first);
  store(rounded[1], second);
  store(to, pairs(rounded[0], rounded[1]));
}

template <int R, int V>
static inline void add_products(const bf16* a, int64_t ld_a, const Pair* b, vf (&acc)[R][V]) {
  vu value[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) value[v] = load(b + v * W);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    uint32_t pair;
    std::memcpy(&pair, a + r * ld_a, sizeof(pair));
    const vu scalar = pair - vu{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)scalar, (__m512bh)value[v]);
  }
}
#endif

// A: float, or bf16 if the instruction set multiplies that.
template <typename A>
struct PositionProduct {
  using B = Packed<A>;
  static constexpr int64_t kDepth = 256 / sizeof(A);         // channels per block
  static constexpr int64_t kColumns = 64;                    // output channels per block
  static constexpr int64_t kPerRow = sizeof(B) / sizeof(A);  // channels per row of B
  // Channels per chain of sums: at 32 F(2x4)'s error is a sixth larger, at 8 the time is a tenth
  // longer.
  static constexpr int64_t kChain = std::is_same_v<A, bf16> ? kDepth : 16;

  // sums[row][kColumns] (+)= a[row][kDepth] . b[depth][kColumns] over `length` channels, in that
  // many vectors of columns.
  static void run(const A* a, const B* b, int64_t length, int64_t rows, int vectors, float* sums,
                  bool accumulate) {
    for (int at = 0, wide; at < vectors; at += wide) {
      wide = panel_vectors(vectors - at);
      const int64_t tall = rows_of(wide), groups = (rows + tall - 1) / tall;
      for (int64_t g = 0; g < groups; ++g) {  // of almost equal height
        const int64_t row = rows * g / groups, next = rows * (g + 1) / groups;
        by_vectors(wide, [&](auto v) {
          choose_rows<v>(static_cast<int>(next - row), a + row * kDepth, b + at * W, length,
                         sums + row * kColumns + at * W, accumulate);
        });
      }
    }
  }

 private:
  template <int V, int R>
  static void chain(const A* a, const B* b, int64_t begin, int64_t end, vf (&acc)[R][V]) {
    for (int64_t k = begin; k < end; k += kPerRow)
      add_products(a + k, kDepth, b + k / kPerRow * kColumns, acc);
  }

  template <int V, int R>
  static void tile(const A* a, const B* b, int64_t length, float* sums, bool accumulate) {
    vf total[R][V] = {};
    chain(a, b, 0, std::min(kChain, length), total);
    if constexpr (kChain < kDepth)
      for (int64_t k = kChain; k < length; k += kChain) {
        vf acc[R][V] = {};
        chain(a, b, k, std::min(k + kChain, length), acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) total[r][v] += acc[r][v];
      }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* to = sums + r * kColumns + v * W;
        store(to, accumulate ? load(to) + total[r][v] : total[r][v]);
      }
  }

  template <int V, int R = Rows<V>>
  static void choose_rows(int rows, const A* a, const B* b, int64_t length, float* sums,
                          bool accumulate) {
    if (rows == R) return tile<V, R>(a, b, length, sums, accumulate);
    if constexpr (R > 1) choose_rows<V, R - 1>(rows, a, b, length, sums, accumulate);
  }
};

}  // namespace FASTDIFF_ISA
