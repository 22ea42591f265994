// The transforms of Winograd's convolutions, on a vector of channels at once: F(2, 3) along
// columns, F(2, 3) or F(4, 3) along rows. Each reads all its inputs before it writes.
#pragma once
#include "simd.h"

namespace FASTDIFF_ISA {

// Two outputs of a filter of three by four products: points 0, 1, -1, infinity.
struct F2 {
  static constexpr int kIn = 4, kOut = 2;

  template <int step>
  static void pixels(vf* d) {
    const vf d0 = d[0], d1 = d[step], d2 = d[2 * step], d3 = d[3 * step];
    d[0] = d0 - d2;
    d[step] = d1 + d2;
    d[2 * step] = d2 - d1;
    d[3 * step] = d1 - d3;
  }
  template <int step_g, int step>
  static void filter(const vf* g, vf* u) {
    const vf even = 0.5f * (g[0] + g[2 * step_g]), odd = 0.5f * g[step_g];
    u[0] = g[0];
    u[step] = even + odd;
    u[2 * step] = even - odd;
    u[3 * step] = g[2 * step_g];
  }
  template <int step_m, int step>
  static void sums(const vf* m, vf* y) {
    y[0] = m[0] + (m[step_m] + m[2 * step_m]);
    y[step] = (m[step_m] - m[2 * step_m]) - m[3 * step_m];
  }
};

// Four outputs by six products: points 0, +-a, +-b, infinity with a^2 = 1/2 and b^2 = 2. The errors
// are half of those with the points +-1, +-2, which exceed our budget.
struct F4 {
  static constexpr int kIn = 6, kOut = 4;
  static constexpr float a = 0.70710678118654752f, b = 1.41421356237309505f;

  template <int step>
  static void pixels(vf* d) {
    const vf d0 = d[0], d1 = d[step], d2 = d[2 * step];
    const vf d3 = d[3 * step], d4 = d[4 * step], d5 = d[5 * step];
    const vf even_a = d4 - 2.0f * d2, odd_a = a * (d3 - 2.0f * d1);
    const vf even_b = d4 - 0.5f * d2, odd_b = b * (d3 - 0.5f * d1);
    d[0] = (d0 + d4) - 2.5f * d2;
    d[step] = even_a + odd_a;
    d[2 * step] = even_a - odd_a;
    d[3 * step] = even_b + odd_b;
    d[4 * step] = even_b - odd_b;
    d[5 * step] = (d1 + d5) - 2.5f * d3;
  }
  template <int step_g, int step>
  static void filter(const vf* g, vf* u) {
    const vf g0 = g[0], g1 = g[step_g], g2 = g[2 * step_g];
    const vf even_a = (-2.0f / 3) * (g0 + 0.5f * g2), odd_a = (-2.0f / 3 * a) * g1;
    const vf even_b = (1.0f / 6) * (g0 + 2.0f * g2), odd_b = (b / 6) * g1;
    u[0] = g0;
    u[step] = even_a + odd_a;
    u[2 * step] = even_a - odd_a;
    u[3 * step] = even_b + odd_b;
    u[4 * step] = even_b - odd_b;
    u[5 * step] = g2;
  }
  template <int step_m, int step>
  static void sums(const vf* m, vf* y) {
    const vf even_a = m[step_m] + m[2 * step_m], odd_a = a * (m[step_m] - m[2 * step_m]);
    const vf even_b = m[3 * step_m] + m[4 * step_m], odd_b = b * (m[3 * step_m] - m[4 * step_m]);
    y[0] = m[0] + (even_a + even_b);
    y[step] = odd_a + odd_b;
    y[2 * step] = 0.5f * even_a + 2.0f * even_b;
    y[3 * step] = (0.5f * odd_a + 2.0f * odd_b) + m[5 * step_m];
  }
};

// 4 x F::kIn pixels, in place.
template <typename F>
static inline void pixels_2d(vf* d) {
#pragma GCC unroll 6
  for (int j = 0; j < F::kIn; ++j) F2::pixels<F::kIn>(d + j);
#pragma GCC unroll 4
  for (int i = 0; i < F2::kIn; ++i) F::template pixels<1>(d + i * F::kIn);
}

// From 3 x 3 taps to 4 x F::kIn.
template <typename F>
static inline void filter_2d(const vf* g, vf* u) {
  vf half[F2::kIn * 3];
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) F2::filter<3, 3>(g + j, half + j);
#pragma GCC unroll 4
  for (int i = 0; i < F2::kIn; ++i) F::template filter<1, 1>(half + i * 3, u + i * F::kIn);
}

// From 4 x F::kIn sums to 2 x F::kOut outputs.
template <typename F>
static inline void sums_2d(const vf* m, vf* y) {
  vf half[F2::kOut * F::kIn];
#pragma GCC unroll 6
  for (int j = 0; j < F::kIn; ++j) F2::sums<F::kIn, F::kIn>(m + j, half + j);
#pragma GCC unroll 2
  for (int i = 0; i < F2::kOut; ++i) F::template sums<1, 1>(half + i * F::kIn, y + i * F::kOut);
}

}  // namespace FASTDIFF_ISA
