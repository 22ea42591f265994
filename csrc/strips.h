// GroupNorm of a picture that is never there as a whole: moments strip by strip, then lines.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace FASTDIFF_ISA {

using fastdiff::LineSilu;
using fastdiff::SlabMoments;

// Mean and centred squares of each channel in each slab. Float sums are of a few pixels each, then
// doubles add them up: the squares are as exact as the mean that they are taken around.
template <typename T>
static void moments(const SlabMoments& p) {
  constexpr int64_t kPixels = 16;
  const int64_t C = p.width, padded = (C + W - 1) / W * W;
  const int64_t slabs = (p.rows + p.slab - 1) / p.slab;
  fastdiff::parallel_for(slabs, [&](int64_t first, int64_t last) {
    std::vector<float> sums(padded), centres(padded);
    std::vector<double> totals(C), squares(C);
    // adds the sums over [begin, end) of term(pixel, c, n) to `all`
    const auto add = [&](int64_t begin, int64_t end, std::vector<double>& all, const auto& term) {
      for (int64_t from = begin; from < end; from += kPixels) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t i = from; i < std::min(from + kPixels, end); ++i)
          each_vector(C, [&](int64_t c, int n) {
            store(&sums[c], load(&sums[c]) + term(i, c, n));
          });
        for (int64_t c = 0; c < C; ++c) all[c] += sums[c];
      }
    };
    for (int64_t slab = first; slab < last; ++slab) {
      const int64_t begin = slab * p.slab, end = std::min(begin + p.slab, p.rows);
      const auto count = static_cast<double>(end - begin);
      const T* x = static_cast<const T*>(p.x);
      std::fill(totals.begin(), totals.end(), 0.0);
      std::fill(squares.begin(), squares.end(), 0.0);
      add(begin, end, totals, [&](int64_t i, int64_t c, int n) { return load_n(x + i * C + c, n); });
      for (int64_t c = 0; c < C; ++c) centres[c] = static_cast<float>(totals[c] / count);
      add(begin, end, squares, [&](int64_t i, int64_t c, int n) {
        const vf d = load_n(x + i * C + c, n) - load(&centres[c]);
        return d * d;
      });
      float* out = p.out + slab * 2 * C;
      for (int64_t c = 0; c < C; ++c) {
        const double off = totals[c] / count - centres[c];  // what a float misses of the mean
        out[c] = centres[c];
        out[C + c] = static_cast<float>(std::max(squares[c] - off * off * count, 0.0));
      }
    }
  });
}

template <typename T>
static void line_silu(const LineSilu& p) {
  const int64_t C = p.width;
  const float *centre = p.line, *slope = p.line + C, *offset = p.line + 2 * C;
  each_row(p.rows, C, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const T* x = static_cast<const T*>(p.x) + i * C;
      T* y = static_cast<T*>(p.y) + i * C;
      each_vector(C, [&](int64_t c, int n) {
        vf v = (load_n(x + c, n) - load_n(centre + c, n)) * load_n(slope + c, n);
        v += load_n(offset + c, n);
        if (p.silu) v = silu(v);
        store_n(y + c, v, n);
      });
    }
  });
}

}  // namespace FASTDIFF_ISA
