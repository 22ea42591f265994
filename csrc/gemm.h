// The one inner loop of convolution, linear layers and attention: an outer-product tile held in
// registers. Rows of A are reached through pointers, so a convolution needs no im2col: its rows are
// pixels, its zero padding is a pointer to zeros. Columns of B are contiguous.
#pragma once
#include "simd.h"

namespace FASTDIFF_ISA {

// A tile of Rows<V> x V vectors fills the register file without spilling: 32 registers of AVX-512
// hold 24 sums + V columns + a broadcast, 16 registers hold 12 sums.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int kTileSums = 24;
#else
constexpr int kMaxVectors = 2;
constexpr int kTileSums = 12;
#endif
template <int V>
constexpr int Rows = kTileSums / V > 12 ? 12 : kTileSums / V;
constexpr int kMaxRows = 12;

// A run of the inner dimension: `length` steps along every row of A, against consecutive rows of B.
struct Segment {
  const float* a[kMaxRows];
  int64_t length;
  int64_t b_row;
};

// sums (+)= a . b over all segments. Each segment is summed from zero, so that rounding errors grow
// with the length of a segment, not with the inner dimension.
// `step` is what a step along a row of A adds to its address: 1, or more where A is transposed.
template <int V, typename T>
static inline void tile(const Segment* segments, int count, const T* const* b, int64_t ld_b,
                        float* sums /* [Rows][V * W] */, bool accumulate, int64_t step) {
  constexpr int R = Rows<V>;
  for (int s = 0; s < count; ++s) {
    const Segment& segment = segments[s];
    const float* a[R];
    for (int r = 0; r < R; ++r) a[r] = segment.a[r];
    const T* column[V];
    for (int v = 0; v < V; ++v) column[v] = b[v] + segment.b_row * ld_b;
    vf acc[R][V] = {};
    for (int64_t k = 0; k < segment.length; ++k) {
      vf value[V];
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) value[v] = load(column[v] + k * ld_b);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) {
        const vf scalar = splat(a[r][k * step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += scalar * value[v];
      }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* to = sums + (r * V + v) * W;
        store(to, accumulate || s > 0 ? load(to) + acc[r][v] : acc[r][v]);
      }
  }
}

static inline int rows_of(int vectors) {
  const int rows[] = {0, Rows<1>, Rows<2>, Rows<3>, Rows<4>};
  return rows[vectors];
}

template <typename T>
static inline void tile(int vectors, const Segment* segments, int count, const T* const* b,
                        int64_t ld_b, float* sums, bool accumulate, int64_t step = 1) {
  switch (vectors) {
    case 1: return tile<1>(segments, count, b, ld_b, sums, accumulate, step);
    case 2: return tile<2>(segments, count, b, ld_b, sums, accumulate, step);
#if defined(__AVX512F__)
    case 3: return tile<3>(segments, count, b, ld_b, sums, accumulate, step);
    case 4: return tile<4>(segments, count, b, ld_b, sums, accumulate, step);
#endif
  }
}

// How many vectors the next panel takes when `left` whole vectors of columns remain.
static inline int panel_vectors(int64_t left) {
  if (left <= kMaxVectors) return static_cast<int>(left);
  if (kMaxVectors == 4 && left % 4 != 0 && (left % 3 == 0 || left == 5)) return 3;
  return kMaxVectors;
}

}  // namespace FASTDIFF_ISA
