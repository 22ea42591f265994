// The single inner loop of convolution, linear layers and attention: an outer-product tile held in
// registers. Rows of A are reached through pointers, so a convolution needs no im2col: its rows are
// pixels, and its zero padding is a pointer to zeros. Columns of B are contiguous.
#pragma once
#include <type_traits>

#include "simd.h"

namespace FASTDIFF_ISA {

// A tile of Rows<V> x V vectors fills the register file without spilling: 32 registers of AVX-512
// hold 24 sums + V columns + a broadcast, 16 registers hold 12 sums.
#if defined(__AVX512F__)
constexpr int kMaxVectors = 4;
constexpr int kTileSums = 24;
constexpr int kUnrolled = 2;  // steps of the inner loop
#else
constexpr int kMaxVectors = 2;
constexpr int kTileSums = 12;
constexpr int kUnrolled = 1;  // two do not fit the registers
#endif
template <int V>
constexpr int Rows = kTileSums / V > 12 ? 12 : kTileSums / V;
constexpr int kMaxRows = 12;
constexpr int kMinRows = kTileSums / kMaxVectors;

// The type of A's rows if B is of T: float32, or bfloat16 if the instruction set multiplies that.
#if defined(__AVX512BF16__)
template <typename T>
using Factor = T;
#else
template <typename T>
using Factor = float;
#endif

// Functions that keep a tile's sums in registers must be inlined into their callers.
#define FASTDIFF_INLINE __attribute__((always_inline)) static inline

// A run of the inner dimension: `length` steps along every row of A, with consecutive rows of B.
template <typename A>
struct Run {
  const A* a[kMaxRows];
  int64_t length;
  int64_t b_row;
};

#if defined(__AVX512BF16__)
// (a[0], b[0]), (a[1], b[1]), ...
static inline vu pairs(const bf16* a, const bf16* b) {
  struct Order {
    int16_t lanes[2 * W];
    constexpr Order() : lanes() {
      for (int i = 0; i < 2 * W; ++i) lanes[i] = static_cast<int16_t>(i / 2 + i % 2 * W);
    }
  };
  static constexpr Order order;
  const auto both = _mm512_maskz_inserti64x4(
      -1,
      _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a))),
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b)), 1);
  return (vu)_mm512_maskz_permutexvar_epi16(-1, _mm512_loadu_si512(order.lanes), both);
}

// bfloat16 of B in the form that products need: pairs of two steps.
struct Pair {
  uint32_t bits;
};
static inline vu load(const Pair* p) { return (vu)load(reinterpret_cast<const float*>(p)); }
static inline void store(Pair* p, vu v) { store(reinterpret_cast<float*>(p), (vf)v); }

// acc += pairs of A's rows at `a` (`bytes` bytes; the rest of a pair is zero) times B's pairs.
template <int bytes, int V, int R>
FASTDIFF_INLINE void multiply_pair(const bf16* const* a, int64_t k, const vu (&value)[V],
                                   vf (&acc)[R][V]) {
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    uint32_t pair = 0;
    std::memcpy(&pair, a[r] + k, bytes);
    const vu scalar = pair - vu{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v)
      acc[r][v] = (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)scalar, (__m512bh)value[v]);
  }
}
#endif

// The element type of a copy of B for many rows: pairs, if the instruction set multiplies those.
#if defined(__AVX512BF16__)
template <typename T>
using Packed = std::conditional_t<std::is_same_v<T, bf16>, Pair, T>;
#else
template <typename T>
using Packed = float;
#endif

// The rows in a copy of `length` rows of B.
template <typename T>
constexpr int64_t packed_rows(int64_t length) {
  return std::is_same_v<Packed<T>, float> ? length : (length + 1) / 2;
}

// Copies `length` rows of a panel's B to `to`, from row `b_row` on.
template <int V, typename T>
static inline void pack(const T* const* b, int64_t ld_b, int64_t b_row, int64_t length,
                        Packed<T>* to) {
  const T* at[V];
  for (int v = 0; v < V; ++v) at[v] = b[v] + b_row * ld_b;
  int64_t k = 0;
  if constexpr (std::is_same_v<Packed<T>, float>) {
    for (; k < length; ++k)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(to + (k * V + v) * W, load(at[v] + k * ld_b));
  } else {
#if defined(__AVX512BF16__)
    for (; k + 2 <= length; k += 2)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        store(to + (k / 2 * V + v) * W, pairs(at[v] + k * ld_b, at[v] + (k + 1) * ld_b));
    for (int v = 0; v < V && k < length; ++v)
      store(to + (k / 2 * V + v) * W, widen(at[v] + k * ld_b));
#endif
  }
}

// B in place: V vectors of columns, `ld` elements from one row to the next. The processor does not
// predict rows that are far apart, so what comes `distance` rows later is prefetched, unless 0.
template <int V, typename T, int64_t distance = 32>
struct Columns {
  const T* at[V];
  int64_t ld;

  Columns(const T* const* b, int64_t ld_b, int64_t row = 0) : ld(ld_b) {
    for (int v = 0; v < V; ++v) at[v] = b[v] + row * ld;
  }
  Columns from(int64_t row) const { return {at, ld, row}; }
  vf operator()(int64_t k, int v) const {
    ahead(k, v);
    return load(at[v] + k * ld);
  }
  __attribute__((always_inline)) void ahead(int64_t k, int v) const {
    if (distance > 0 && v * W * sizeof(T) % 64 == 0)
      __builtin_prefetch(at[v] + (k + distance) * ld, 0, 3);
  }
#if defined(__AVX512BF16__)
  vu pair(int64_t k, int v) const {
    ahead(k, v);
    ahead(k + 1, v);
    return pairs(at[v] + k * ld, at[v] + (k + 1) * ld);
  }
  vu half(int64_t k, int v) const { return widen(at[v] + k * ld); }
#endif
};

// B as copied by `pack`; its rows are pairs if it holds those.
template <int V, typename P>
struct Copy {
  const P* at;

  Copy from(int64_t row) const { return {at + row * V * W}; }
  vf operator()(int64_t k, int v) const { return load(at + (k * V + v) * W); }
#if defined(__AVX512BF16__)
  vu pair(int64_t k, int v) const { return load(at + (k / 2 * V + v) * W); }
  vu half(int64_t k, int v) const { return pair(k, v); }
#endif
};

// acc += a . b over a run, for the first R rows
template <int V, int R, typename B>
FASTDIFF_INLINE void multiply(const Run<float>& run, const B& b, vf (&acc)[R][V]) {
  const float* a[R];
  for (int r = 0; r < R; ++r) a[r] = run.a[r];
#pragma GCC unroll kUnrolled
  for (int64_t k = 0; k < run.length; ++k) {
    vf value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = b(k, v);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const vf scalar = splat(a[r][k]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] += scalar * value[v];
    }
  }
}

#if defined(__AVX512BF16__)
template <int V, int R, typename B>
FASTDIFF_INLINE void multiply(const Run<bf16>& run, const B& b, vf (&acc)[R][V]) {
  const bf16* a[R];
  for (int r = 0; r < R; ++r) a[r] = run.a[r];
  vu value[V];
  int64_t k = 0;
#pragma GCC unroll kUnrolled
  for (; k + 2 <= run.length; k += 2) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = b.pair(k, v);
    multiply_pair<4>(a, k, value, acc);
  }
  if (k == run.length) return;
  for (int v = 0; v < V; ++v) value[v] = b.half(k, v);
  multiply_pair<2>(a, k, value, acc);
}
#endif

// sums (+)= a . b over all segments, for the first R rows. Each segment is summed from zero, so that rounding errors grow
// with the length of a segment, not of the inner dimension.
template <int V, int R, typename A, typename B>
static inline void tile(const Run<A>* segments, int count, const B& b,
                        float* sums /* [R][V * W] */, bool accumulate) {
  for (int s = 0; s < count; ++s) {
    vf acc[R][V] = {};
    multiply<V>(segments[s], b.from(segments[s].b_row), acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        float* to = sums + (r * V + v) * W;
        store(to, accumulate || s > 0 ? load(to) + acc[r][v] : acc[r][v]);
      }
  }
}

// f(std::integral_constant<int, vectors>()) for a panel of this many vectors
template <typename F>
static inline void by_vectors(int vectors, const F& f) {
  switch (vectors) {
    case 1: return f(std::integral_constant<int, 1>());
    case 2: return f(std::integral_constant<int, 2>());
#if defined(__AVX512F__)
    case 3: return f(std::integral_constant<int, 3>());
    case 4: return f(std::integral_constant<int, 4>());
#endif
  }
}

static inline int rows_of(int vectors) {
  const int rows[] = {0, Rows<1>, Rows<2>, Rows<3>, Rows<4>};
  return rows[vectors];
}

// How many vectors the next panel takes if `left` whole vectors of columns remain.
static inline int panel_vectors(int64_t left) {
  if (left <= kMaxVectors) return static_cast<int>(left);
  if (kMaxVectors == 4 && left % 4 != 0 && (left % 3 == 0 || left == 5)) return 3;
  return kMaxVectors;
}

}  // namespace FASTDIFF_ISA
