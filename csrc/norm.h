// GroupNorm, with modulation and activation, of channels-last pictures.
#pragma once
#include <algorithm>
#include <cmath>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "simd.h"

namespace FASTDIFF_ISA {

using fastdiff::GroupNorm;

struct Moments {
  double count, mean, m2;
};

// Chan's rule: the joint moments of two samples, without subtracting large squares.
static inline Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count, delta = b.mean - a.mean;
  if (count == 0) return a;
  return {count, a.mean + delta * b.count / count,
          a.m2 + b.m2 + delta * delta * a.count * b.count / count};
}

// x + row + residual at one pixel; `adds`: whether there is anything to add.
template <typename T, bool adds>
struct Summed {
  const T *x, *row, *residual;

  Summed(const GroupNorm& p, int64_t picture, int64_t pixel) {
    const int64_t at = (picture * p.pixels + pixel) * p.channels;
    x = static_cast<const T*>(p.x) + at;
    row = p.row ? static_cast<const T*>(p.row) + picture * p.ld_row : nullptr;
    residual = p.residual ? static_cast<const T*>(p.residual) + at : nullptr;
  }
  // channels [c, c + n)
  vf operator()(int64_t c, int n) const {
    vf v = load_n(x + c, n);
    if constexpr (adds) {
      if (row) v += load_n(row + c, n);
      if (residual) v += load_n(residual + c, n);
    }
    return v;
  }
};

// f(four pixels, or one) over [begin, end), so that each sum is read and written once per four.
template <typename T, bool adds, typename F>
static inline void each_few(const GroupNorm& p, int64_t picture, int64_t begin, int64_t end,
                            const F& f) {
  using Pixel = Summed<T, adds>;
  for (; begin + 4 <= end; begin += 4) {
    const Pixel four[] = {{p, picture, begin}, {p, picture, begin + 1}, {p, picture, begin + 2},
                          {p, picture, begin + 3}};
    f(four);
  }
  for (; begin < end; ++begin) {
    const Pixel one[] = {{p, picture, begin}};
    f(one);
  }
}

// In double, with four partial sums, since an addition waits for the one before.
static inline double sum_of(const float* x, int64_t n) {
  double parts[4] = {};
  int64_t i = 0;
  for (; i + 4 <= n; i += 4)
    for (int k = 0; k < 4; ++k) parts[k] += x[i + k];
  for (; i < n; ++i) parts[0] += x[i];
  return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

template <typename T, bool adds>
static void group_norm(const GroupNorm& p) {
  const int64_t C = p.channels, padded = (C + W - 1) / W * W, per_group = C / p.groups;
  // Slabs of pixels that fit L2 (256 KiB), as many for each thread.
  const int64_t threads = fastdiff::num_threads(), fits = std::max<int64_t>(1, (1 << 16) / C);
  const int64_t even = threads / std::gcd(threads, p.batch);
  const int64_t slabs = std::min(((p.pixels + fits - 1) / fits + even - 1) / even * even, p.pixels);
  std::vector<Moments> moments(p.batch * slabs * p.groups);

  fastdiff::parallel_for(p.batch * slabs, [&](int64_t first, int64_t last) {
    std::vector<float> sums(3 * padded);
    float *const totals = sums.data(), *const squares = totals + padded;
    float* const centres = squares + padded;
    for (int64_t task = first; task < last; ++task) {
      const int64_t picture = task / slabs, slab = task % slabs;
      const int64_t begin = p.pixels * slab / slabs, end = p.pixels * (slab + 1) / slabs;
      const double count = static_cast<double>((end - begin) * per_group);
      // Around the mean of the first pixels. They are an eighth, so it is at most sqrt(7) standard
      // deviations from the mean, and the total corrects the squares for that.
      const int64_t part = (end - begin + 7) / 8;
      std::fill_n(totals, padded, 0.0f);
      each_few<T, adds>(p, picture, begin, begin + part, [&](const auto& pixels) {
        each_vector(C, [&](int64_t c, int n) {
          vf total = load(totals + c);
          for (const auto& pixel : pixels) total += pixel(c, n);
          store(totals + c, total);
        });
      });
      Moments* groups = &moments[task * p.groups];
      for (int64_t g = 0; g < p.groups; ++g) {
        const double total = sum_of(totals + g * per_group, per_group);
        const auto centre = static_cast<float>(total / static_cast<double>(part * per_group));
        std::fill_n(centres + g * per_group, per_group, centre);
      }
      std::fill_n(totals, 2 * padded, 0.0f);  // and squares
      each_few<T, adds>(p, picture, begin, end, [&](const auto& pixels) {
        each_vector(C, [&](int64_t c, int n) {
          vf total = load(totals + c), square = load(squares + c);
          const vf centre = load(centres + c);
          for (const auto& pixel : pixels) {
            const vf d = pixel(c, n) - centre;
            total += d;
            square += d * d;
          }
          store(totals + c, total);
          store(squares + c, square);
        });
      });
      for (int64_t g = 0; g < p.groups; ++g) {
        const double total = sum_of(totals + g * per_group, per_group);
        const double square = sum_of(squares + g * per_group, per_group);
        groups[g] = {count, static_cast<double>(centres[g * per_group]) + total / count,
                     square - total * total / count};
      }
    }
  });

  fastdiff::parallel_for(p.batch * slabs, [&](int64_t first, int64_t last) {
    // (t - centre) * scale + shift; the centre is a float near the mean, shift includes the rest
    std::vector<float> factors(3 * padded);
    float *const centres = factors.data(), *const scales = centres + padded;
    float* const shifts = scales + padded;
    const auto prepare = [&](int64_t picture) {
      for (int64_t g = 0; g < p.groups; ++g) {
        Moments all{0, 0, 0};
        for (int64_t slab = 0; slab < slabs; ++slab)
          all = merge(all, moments[(picture * slabs + slab) * p.groups + g]);
        const double rstd = 1.0 / std::sqrt(std::max(all.m2, 0.0) / all.count + p.eps);
        const auto centre = static_cast<float>(all.mean);
        for (int64_t c = g * per_group; c < (g + 1) * per_group; ++c) {
          double weight = load1(static_cast<const T*>(p.weight) + c);
          double bias = load1(static_cast<const T*>(p.bias) + c);
          if (p.scale_shift) {
            const T* row = static_cast<const T*>(p.scale_shift) + picture * p.ld_scale_shift;
            const double scale = 1.0 + load1(row + c);
            weight *= scale;
            bias = bias * scale + load1(row + p.channels + c);
          }
          centres[c] = centre;
          scales[c] = static_cast<float>(rstd * weight);
          shifts[c] = static_cast<float>(bias + (centre - all.mean) * rstd * weight);
        }
      }
    };
    const auto act = p.act;
    int64_t ready = -1;  // the picture that is prepared
    // From the last on, which the caches still hold.
    for (int64_t task = last; task-- > first;) {
      const int64_t picture = task / slabs, slab = task % slabs;
      if (picture != ready) prepare(picture);
      ready = picture;
      const int64_t begin = p.pixels * slab / slabs, end = p.pixels * (slab + 1) / slabs;
      for (int64_t i = begin; i < end; ++i) {
        const Summed<T, adds> pixel(p, picture, i);
        const int64_t at = (picture * p.pixels + i) * C;
        T* const y = static_cast<T*>(p.y) + at;
        T* const total = p.total ? static_cast<T*>(p.total) + at : nullptr;  // only if it adds
        each_vector(C, [&](int64_t c, int n) {
          const vf t = pixel(c, n);
          vf v = (t - load(centres + c)) * load(scales + c) + load(shifts + c);
          if (act == fastdiff::kSilu) v = silu(v);
          else if (act == fastdiff::kGelu) v = gelu(v);
          store_n(y + c, v, n);
          if (adds && total) store_n(total + c, t, n);
        });
      }
    }
  });
}

template <typename T>
static void group_norm(const GroupNorm& p) {
  p.row || p.residual ? group_norm<T, true>(p) : group_norm<T, false>(p);
}

}  // namespace FASTDIFF_ISA
