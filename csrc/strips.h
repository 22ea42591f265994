// GroupNorm of a picture that is computed in strips: moments strip by strip, then lines.
#pragma once
#include <algorithm>
#include <vector>

#include "kernels.h"
#include "rows.h"
#include "simd.h"

namespace FASTDIFF_ISA {

using fastdiff::LineSilu;
using fastdiff::SlabMoments;

// Mean (with its float rounding error) and centred squares of each channel in each slab. Float sums
// cover a few pixels each, then doubles add them up.
template <typename T>
static void moments(const SlabMoments& p) {
  constexpr int64_t kPixels = 16;
  const int64_t C = p.width, padded = (C + W - 1) / W * W;
  const int64_t slabs = (p.rows + p.slab - 1) / p.slab;
  fastdiff::parallel_for(slabs, [&](int64_t first, int64_t last) {
    std::vector<float> sums(padded), squares(padded), centres(padded);
    std::vector<double> total(C), square(C);
    for (int64_t slab = first; slab < last; ++slab) {
      const int64_t begin = slab * p.slab, end = std::min(begin + p.slab, p.rows);
      const auto count = static_cast<double>(end - begin);
      // Adds the pixels minus `centres` to total and square.
      const auto add = [&] {
        std::fill(total.begin(), total.end(), 0.0);
        std::fill(square.begin(), square.end(), 0.0);
        for (int64_t from = begin; from < end; from += kPixels) {
          std::fill(sums.begin(), sums.end(), 0.0f);
          std::fill(squares.begin(), squares.end(), 0.0f);
          for (int64_t i = from; i < std::min(from + kPixels, end); ++i)
            each_vector(C, [&](int64_t c, int n) {
              const vf d = load_n(static_cast<const T*>(p.x) + i * C + c, n) - load(&centres[c]);
              store(&sums[c], load(&sums[c]) + d);
              store(&squares[c], load(&squares[c]) + d * d);
            });
          for (int64_t c = 0; c < C; ++c) {
            total[c] += sums[c];
            square[c] += squares[c];
          }
        }
      };
      std::fill(centres.begin(), centres.end(), 0.0f);
      add();
      for (int64_t c = 0; c < C; ++c) centres[c] = static_cast<float>(total[c] / count);
      add();
      float* out = p.out + slab * 3 * C;
      for (int64_t c = 0; c < C; ++c) {
        const double rest = total[c] / count;
        out[c] = centres[c];
        out[C + c] = static_cast<float>(rest);
        out[2 * C + c] = static_cast<float>(std::max(square[c] - rest * rest * count, 0.0));
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
