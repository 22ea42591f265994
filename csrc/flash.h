// The products and the softmax of attention, for a block of queries and a chunk of keys.
//
// Everything is transposed: scores are [keys, queries], the result [width, queries], so each lane
// of a vector holds one query. Then both products broadcast from the rows of K and V in place, a
// softmax needs no sums across a vector, and the result is rescaled lane by lane. If the
// instruction set multiplies pairs of bfloat16, a step along the inner dimension is a pair.
#pragma once
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>
#include <utility>

#include "gemm.h"

// Not inlined: each keeps its working set in registers, for which all three together are too large.
#define FASTDIFF_APART __attribute__((noinline))

namespace FASTDIFF_ISA {

#if defined(__AVX512F__)
constexpr int kQueryVectors = 4;
#else
constexpr int kQueryVectors = 2;
#endif
constexpr int64_t kQueries = kQueryVectors * W;
constexpr int64_t kKeys = 128;   // per chunk: its scores stay in the L1 and L2 caches
constexpr int64_t kInner = 128;  // inner steps summed at once, to limit rounding errors
constexpr int kTall = 6;         // rows of a tile; kTall - 1 if that leaves fewer rows over

// The unit of products of T: one float32, or a pair of bfloat16.
#if defined(__AVX512BF16__)
// The first n <= 2 W elements unchanged, two per lane; the rest is zero.
static inline vu bits_n(const bf16* p, int64_t n) {
  return (vu)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << n) - 1), p);
}
template <typename T>
constexpr bool kPaired = std::is_same_v<T, bf16>;
template <typename T>
using Step = std::conditional_t<kPaired<T>, Pair, float>;
#else
template <typename T>
constexpr bool kPaired = false;
template <typename T>
using Step = float;
#endif
template <typename T>
constexpr int64_t kStep = kPaired<T> ? 2 : 1;  // elements of T per step

// Uninitialised memory aligned to a cache line.
struct Freed {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};
template <typename E>
using Scratch = std::unique_ptr<E[], Freed>;
template <typename E>
static Scratch<E> scratch(int64_t count) {
  return Scratch<E>(static_cast<E*>(::operator new(count * sizeof(E), std::align_val_t(64))));
}

// Transposes W vectors: first single lanes, then blocks of 2, 4, ...
template <int S, bool high, int... I>
static inline vf exchange(vf a, vf b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(
      a, b, (I & S ? I + W - (high ? 0 : S) : I + (high ? S : 0))...);
}
template <int S = 1>
static inline void transpose(vf (&rows)[W]) {
  if constexpr (S < W) {
    constexpr std::make_integer_sequence<int, W> lanes{};
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if ((i & S) == 0) {
        const vf a = rows[i], b = rows[i + S];
        rows[i] = exchange<S, false>(a, b, lanes);
        rows[i + S] = exchange<S, true>(a, b, lanes);
      }
    transpose<2 * S>(rows);
  }
}

constexpr float kLog2e = 1.44269504f;

// (x rounded to an integer n, p) -> 2^n p
struct Power {
#if defined(__AVX512F__)
  vf n;
  explicit Power(vf x)
      : n((vf)_mm512_maskz_roundscale_ps(-1, (__m512)x, _MM_FROUND_TO_NEAREST_INT)) {}
  vf operator()(vf p) const { return (vf)_mm512_maskz_scalef_ps(-1, (__m512)p, (__m512)n); }
#else
  static constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  vf shifted, n;
  explicit Power(vf x) : shifted(x + magic), n(shifted - magic) {}
  vf operator()(vf p) const { return p * (vf)(((vi)shifted + (127 - 0x4b400000)) << 23); }
#endif
};

// e^x for x <= 0 by a fit of 2^r, |r| <= 1/2, with relative error 9e-8. Below -87: about e^-87,
// which is negligible beside the largest weight of 1. NaN stays NaN.
static inline vf exp_fine(vf x) {
  const vf y = max(splat(-87.0f), x);
  const Power power(y * kLog2e);
  const vf r = y * kLog2e - power.n;
  vf p = splat(0.001326472723f);
  p = p * r + 0.009671512673f;
  p = p * r + 0.05550733743f;
  p = p * r + 0.2402224208f;
  p = p * r + 0.6931469776f;
  return power(p * r + 1.0f);
}

// 2^x for x <= 0, to 8e-5, which is enough for a bfloat16. Below -126: about 2^-126.
static inline vf exp2_coarse(vf x) {
  const vf y = max(splat(-126.0f), x);
  const Power power(y);
  const vf r = y - power.n;
  vf p = splat(0.05517166954f);
  p = p * r + 0.2426111254f;
  p = p * r + 0.6932609857f;
  return power(p * r + 0.9999280733f);
}

// acc = sum over steps of a[r * row + s * step] * b[s], r < R, b[s] of V vectors
template <int V, int R, typename E>
static inline void product(const E* a, int64_t row, int64_t step, const E* b, int64_t steps,
                           vf (&acc)[R][V]) {
  const E* at[R];
  for (int r = 0; r < R; ++r, a += row) at[r] = a;
  for (int64_t s = 0; s < steps; ++s) {
    const float* column = reinterpret_cast<const float*>(b + s * V * W);
    vf value[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) value[v] = load(column + v * W);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      if constexpr (std::is_same_v<E, float>) {
        const vf scalar = splat(at[r][s * step]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] += scalar * value[v];
      } else {
#if defined(__AVX512BF16__)
        const vu scalar = at[r][s * step].bits - vu{};
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v)
          acc[r][v] =
              (vf)_mm512_dpbf16_ps((__m512)acc[r][v], (__m512bh)scalar, (__m512bh)value[v]);
#endif
      }
    }
  }
}

// f(first row, rows of the tile as a constant) over n rows; the last tile may extend beyond by
// kTall - 2.
template <typename F>
static inline void each_tile(int64_t n, const F& f) {
  const int64_t tiles = (n + kTall - 1) / kTall, shorter = std::min(tiles, tiles * kTall - n);
  int64_t first = 0;
  for (int64_t i = 0; i < tiles - shorter; ++i, first += kTall)
    f(first, std::integral_constant<int, kTall>());
  for (int64_t i = 0; i < shorter; ++i, first += kTall - 1)
    f(first, std::integral_constant<int, kTall - 1>());
}

// scores[j, i] (+)= k[j] . q[:, i] over `steps` steps for `keys` keys and V vectors of queries. If
// these are the `last` steps, top[i] becomes the largest of the sums and its former value.
template <int V, bool sum, bool last, typename E>
static inline void score_slice(const E* k, int64_t ld_k, int64_t keys, int64_t steps, const E* q,
                               float* scores, vf (&top)[V]) {
  each_tile(keys, [=, &top](int64_t first, auto rows) {
    constexpr int R = decltype(rows)::value;
    vf acc[R][V] = {}, most[V];
    product<V, R>(k + first * ld_k, ld_k, 1, q, steps, acc);
    float* to = scores + first * V * W;
    for (int v = 0; v < V; ++v) most[v] = top[v];
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v, to += W) {
        if (sum) acc[r][v] += load(to);
        if (last) most[v] = max(most[v], acc[r][v]);
        store(to, acc[r][v]);
      }
    for (int v = 0; v < V; ++v) top[v] = most[v];
  });
}

// scores[j, i] = k[j] . q[:, i], by slices of the inner dimension; top[i] becomes the largest of
// them and its former value.
template <int V, typename E>
FASTDIFF_APART static void score(const E* k, int64_t keys, int64_t steps, const E* q,
                                 float* scores, vf (&top)[V]) {
  const int64_t slices = (steps + kInner - 1) / kInner;
  const auto begin = [&](int64_t slice) { return steps * slice / slices; };
  if (slices == 1) return score_slice<V, false, true>(k, steps, keys, steps, q, scores, top);
  score_slice<V, false, false>(k, steps, keys, begin(1), q, scores, top);
  for (int64_t i = 1; i < slices; ++i) {
    const E *k_at = k + begin(i), *q_at = q + begin(i) * V * W;
    const int64_t count = begin(i + 1) - begin(i);
    if (i < slices - 1)
      score_slice<V, true, false>(k_at, steps, keys, count, q_at, scores, top);
    else
      score_slice<V, true, true>(k_at, steps, keys, count, q_at, scores, top);
  }
}

// result[d, i] = sum over steps of v[s, d] * weights[s, i], plus, if there were keys `before`,
// shrink[i] times its former value.
template <int V, bool before, typename E>
FASTDIFF_APART static void weigh(const E* weights, int64_t steps, const E* v, int64_t width,
                                 const vf (&shrink)[V], float* result) {
  each_tile(width, [=, &shrink](int64_t first, auto rows) {
    constexpr int R = decltype(rows)::value;
    vf acc[R][V] = {};
    product<V, R>(v + first, 1, width, weights, steps, acc);
    float* to = result + first * V * W;
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < V; ++i, to += W)
        store(to, before ? load(to) * shrink[i] + acc[r][i] : acc[r][i]);
  });
}

// Turns scores [keys, queries] into weights e^(score - base) in place, and adds them up in `sum`.
template <int V>
FASTDIFF_APART static void weights_of(float* scores, int64_t keys, float, const vf (&base)[V],
                                      vf (&sum)[V], float) {
  for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      float* at = scores + (j * V + v) * W;
      const vf weight = exp_fine(load(at) - base[v]);
      store(at, weight);
      sum[v] += weight;
    }
}
#if defined(__AVX512BF16__)
// (a, b) of each lane
static inline vu pair_of(vf a, vf b) {
  const auto both = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  struct Order {
    int16_t lanes[2 * W];
    constexpr Order() : lanes() {
      for (int i = 0; i < 2 * W; ++i) lanes[i] = static_cast<int16_t>(i / 2 + i % 2 * W);
    }
  };
  static constexpr Order order;
  return (vu)_mm512_maskz_permutexvar_epi16(-1, _mm512_loadu_si512(order.lanes), both);
}
// Turns scores into weights 2^(factor * score - base), in pairs of keys; an odd last key is paired
// with zero.
template <int V>
FASTDIFF_APART static void weights_of(float* scores, int64_t keys, float factor,
                                      const vf (&base)[V], vf (&sum)[V], Pair) {
  const auto rows = [&](int64_t j, auto second) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const float* at = scores + (j * V + v) * W;
      const vf a = exp2_coarse(load(at) * factor - base[v]);
      vf b{};
      if constexpr (decltype(second)::value) b = exp2_coarse(load(at + V * W) * factor - base[v]);
      sum[v] += a + b;
      store(scores + (j / 2 * V + v) * W, (vf)pair_of(a, b));
    }
  };
  int64_t j = 0;
  for (; j + 2 <= keys; j += 2) rows(j, std::true_type());
  if (j < keys) rows(j, std::false_type());
}
#endif

}  // namespace FASTDIFF_ISA
