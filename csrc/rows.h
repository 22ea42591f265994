// Operations on rows of tokens: LayerNorm and RMSNorm with what precedes and follows them, RMSNorm
// of heads, gated sums, and pooling. Each row is read from memory once.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace FASTDIFF_ISA {

using fastdiff::AdaNorm;
using fastdiff::MeanPool;
using fastdiff::QkNorm;
using fastdiff::Residual;

constexpr int64_t kRowsSerialBelow = 1 << 14;  // elements that one core does while another wakes up

template <typename F>
static void each_row(int64_t rows, int64_t width, const F& body) {
  if (rows * width < kRowsSerialBelow) body(0, rows);
  else fastdiff::parallel_for(rows, body);
}

// sums[i] = the total that add(c, elements, i-th vector) adds; with four partial sums each, since
// an addition waits for the one before.
template <int N, typename F>
static inline void sum_row(int64_t width, float (&sums)[N], const F& add) {
  constexpr int kAtOnce = 4;
  vf parts[kAtOnce][N] = {};
  int64_t c = 0;
  for (; c + kAtOnce * W <= width; c += kAtOnce * W)
#pragma GCC unroll 4
    for (int i = 0; i < kAtOnce; ++i) add(c + i * W, W, parts[i]);
  for (; c + W <= width; c += W) add(c, W, parts[0]);
  if (c < width) add(c, static_cast<int>(width - c), parts[1]);
  for (int n = 0; n < N; ++n)
    sums[n] = sum((parts[0][n] + parts[1][n]) + (parts[2][n] + parts[3][n]));
}

// d, zero beyond its first n elements
static inline vf first_of(vf d, int n) {
  for (int i = n; i < W; ++i) d[i] = 0;
  return d;
}

// y = norm * factor + offset for one sample: weight and bias, combined with scale and shift.
template <typename T>
static void combine(const AdaNorm& p, int64_t sample, float* factor, float* offset) {
  const auto row = [&](const void* rows, int64_t ld, int64_t c, int n, float otherwise) {
    return rows ? load_n(static_cast<const T*>(rows) + sample * ld + c, n) : splat(otherwise);
  };
  each_vector(p.width, [&](int64_t c, int n) {
    const vf scale = 1.0f + row(p.scale, p.ld_scale, c, n, 0);
    store_n(factor + c, row(p.weight, 0, c, n, 1) * scale, n);
    store_n(offset + c, row(p.bias, 0, c, n, 0) * scale + row(p.shift, p.ld_shift, c, n, 0), n);
  });
}

template <typename T>
static void ada_norm(const AdaNorm& p) {
  const int64_t D = p.width;
  const auto count = static_cast<float>(D);
  const bool plain = !p.weight && !p.bias && !p.scale && !p.shift;
  each_row(p.batch * p.tokens, D, [&](int64_t first, int64_t last) {
    std::vector<float> whole(D), factor(plain ? 0 : D), offset(plain ? 0 : D);
    int64_t ready = -1;  // the sample of factor and offset
    for (int64_t i = first; i < last; ++i) {
      const int64_t sample = i / p.tokens;
      if (!plain && sample != ready) combine<T>(p, sample, factor.data(), offset.data());
      ready = sample;
      const T* x = static_cast<const T*>(p.x) + i * D;
      const float* t = whole.data();
      float total[1];  // of t, or of its squares
      const auto collect = [&](const auto& value) {
        sum_row(D, total, [&](int64_t c, int n, vf* parts) {
          const vf v = value(c, n);
          parts[0] += p.rms ? v * v : v;
        });
      };
      if (p.residual) {
        const T* residual = static_cast<const T*>(p.residual) + i % (p.samples * p.tokens) * D;
        const T* gate = p.gate ? static_cast<const T*>(p.gate) + sample * p.ld_gate : nullptr;
        T* kept = static_cast<T*>(p.total) + i * D;
        collect([&](int64_t c, int n) {
          vf v = load_n(x + c, n);
          if (gate) v *= load_n(gate + c, n);
          v += load_n(residual + c, n);
          store_n(&whole[c], v, n);
          store_n(kept + c, v, n);
          return v;
        });
      } else if constexpr (std::is_same_v<T, float>) {
        t = x;
        collect([&](int64_t c, int n) { return load_n(x + c, n); });
      } else {
        collect([&](int64_t c, int n) {
          const vf v = load_n(x + c, n);
          store_n(&whole[c], v, n);
          return v;
        });
      }
      float mean = 0, correction = 0, variance = total[0] / count;
      if (!p.rms) {  // around the mean, whose rounding error is the correction
        float sums[2];
        mean = total[0] / count;
        sum_row(D, sums, [&](int64_t c, int n, vf* parts) {
          const vf d = first_of(load_n(t + c, n) - mean, n);
          parts[0] += d * d;
          parts[1] += d;
        });
        correction = sums[1] / count;
        variance = sums[0] / count - correction * correction;
      }
      const float rstd = 1.0f / std::sqrt(variance + p.eps);
      T* y = static_cast<T*>(p.y) + i * D;
      const auto normed = [&](int64_t c, int n) {
        return (load_n(t + c, n) - mean - correction) * rstd;
      };
      if (plain) {
        each_vector(D, [&](int64_t c, int n) { store_n(y + c, normed(c, n), n); });
      } else {
        each_vector(D, [&](int64_t c, int n) {
          store_n(y + c, normed(c, n) * load_n(&factor[c], n) + load_n(&offset[c], n), n);
        });
      }
    }
  });
}

template <typename T>
static void qk_norm(const QkNorm& p) {
  const int64_t K = p.width;
  const auto one = [&](const void* from, const int64_t* stride, const void* weight, void* to,
                       int64_t token) {
    const T* x = static_cast<const T*>(from) + token / p.tokens * stride[0] +
                 token % p.tokens * stride[1];
    T* y = static_cast<T*>(to) + token * p.heads * K;
    const float* cos = p.cos ? p.cos + token % p.tokens * K : nullptr;
    const float* sin = p.cos ? p.sin + token % p.tokens * K : nullptr;
    for (int64_t h = 0; h < p.heads; ++h, x += stride[2], y += K) {
      float squares[1];
      sum_row(K, squares, [&](int64_t c, int n, vf* parts) {
        const vf v = load_n(x + c, n);
        parts[0] += v * v;
      });
      const float rrms = 1.0f / std::sqrt(squares[0] / static_cast<float>(K) + p.eps);
      each_vector(K, [&](int64_t c, int n) {
        vf v = load_n(x + c, n) * rrms;
        if (weight) v *= load_n(static_cast<const T*>(weight) + c, n);
        if (cos) v = v * load_n(cos + c, n) + turned(v) * load_n(sin + c, n);
        store_n(y + c, v, n);
      });
    }
  };
  each_row(p.batch * p.tokens, 2 * p.heads * K, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      one(p.q, p.q_stride, p.q_weight, p.q_out, i);
      one(p.k, p.k_stride, p.k_weight, p.k_out, i);
    }
  });
}

// y = scale * (x + shift + gate * other) for `count` elements; `terms` says which terms there are.
enum Terms { kOther = 1, kShift = 2, kGate = 4 };
template <int terms, typename T>
static void add_row(int64_t count, float scale, const T* x, const T* other, const T* shift,
                    const T* gate, T* y) {
  each_vector(count, [=](int64_t c, int n) {
    vf v = load_n(x + c, n);
    if (terms & kShift) v += load_n(shift + c, n);
    if (terms & kGate) v += load_n(other + c, n) * load_n(gate + c, n);
    else if (terms & kOther) v += load_n(other + c, n);
    store_n(y + c, v * scale, n);
  });
}

template <typename T>
static void residual(const Residual& p) {
  const auto* shift = static_cast<const T*>(p.shift);
  const auto with_shift = p.gate    ? add_row<kOther | kShift | kGate, T>
                          : p.other ? add_row<kOther | kShift, T>
                                    : add_row<kShift, T>;
  const auto without = p.gate    ? add_row<kOther | kGate, T>
                       : p.other ? add_row<kOther, T>
                                 : add_row<0, T>;
  const auto add = shift ? with_shift : without;
  // rows that share nothing are cut again, into longer ones
  const int64_t times = p.enlarge;
  const bool whole = !p.gate && !shift && times == 1;
  const int64_t all = p.batch * p.tokens * p.width;
  const int64_t D = whole ? std::min<int64_t>(all, 1 << 12) : p.width;
  each_row((all + D - 1) / D, D * times * times, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      // the pictures' rows are numbered through
      const int64_t at = (i / p.columns * times * p.columns + i % p.columns) * times;
      T* y = static_cast<T*>(p.y) + (times > 1 ? at : i) * D;
      const int64_t count = std::min(D, all - i * D);
      add(count, p.scale, static_cast<const T*>(p.x) + i * D,
          p.other ? static_cast<const T*>(p.other) + i * D : nullptr, shift,
          p.gate ? static_cast<const T*>(p.gate) + i / p.tokens * p.ld_gate : nullptr, y);
      for (int64_t copy = 1; copy < times * times; ++copy)
        std::copy_n(y, count, y + (copy / times * times * p.columns + copy % times) * D);
    }
  });
}

template <typename T>
static void mean_pool(const MeanPool& p) {
  const int64_t C = p.channels, rows = p.height / 2, columns = p.width / 2;
  each_row(p.batch * rows, 4 * columns * C, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / rows * p.height + i % rows * 2;
      const T *above = static_cast<const T*>(p.x) + row * p.width * C, *below = above + p.width * C;
      T* y = static_cast<T*>(p.y) + i * columns * C;
      for (int64_t j = 0; j < columns; ++j, above += 2 * C, below += 2 * C, y += C)
        each_vector(C, [&](int64_t c, int n) {
          const vf top = load_n(above + c, n) + load_n(above + C + c, n);
          store_n(y + c, (top + (load_n(below + c, n) + load_n(below + C + c, n))) * 0.25f, n);
        });
    }
  });
}

}  // namespace FASTDIFF_ISA
