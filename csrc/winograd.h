// Convolution by Winograd's minimal filtering: 3x3, stride 1, pad 1. Tiles of the picture and the
// filters are transformed, multiplied position by position (at each a matrix product over the
// channels), and transformed back. F(2x2) takes 16 products for 4 outputs where the direct loop
// takes 36; F(2x4) takes 24 for 8 outputs where the direct loop takes 72.
//
// Filters are transformed block by block into the cache at every call: they are borrowed, and a
// copy would be more than twice as large. An Inf in a pixel becomes a NaN (Inf - Inf) in all
// outputs of the tiles that read it, so a check for non-finite values still works.
#pragma once
#include <algorithm>

#include "few.h"
#include "product.h"
#include "scratch.h"
#include "transform.h"

namespace FASTDIFF_ISA {

struct Tiles {
  int64_t first, count;
};
static inline Tiles part(int64_t tiles, int64_t i, int64_t parts) {
  const int64_t first = tiles * i / parts;
  return {first, tiles * (i + 1) / parts - first};
}

// T: type of the picture and the filters; A: of the products; F: the transform along a row.
template <typename T, typename A, typename F>
class Winograd {
 public:
  using B = Packed<A>;
  static constexpr int kIn = F::kIn, kPositions = F2::kIn * F::kIn;
  static constexpr int kOut = F::kOut, kOutputs = F2::kOut * F::kOut;
  using Product = PositionProduct<A>;
  static constexpr int64_t kDepth = Product::kDepth, kColumns = Product::kColumns;
  static constexpr int64_t kPerRow = Product::kPerRow;
  // The stride between positions: not a power of two, or all would share one set of the cache
  static constexpr int64_t kPad = 64;
  static constexpr int64_t kFilters = kDepth / kPerRow * kColumns + kPad / sizeof(B);

  explicit Winograd(const Conv& conv)
      : p(conv),
        across((p.out_width + kOut - 1) / kOut),
        tiles(p.batch * ((p.out_height + F2::kOut - 1) / F2::kOut) * across),
        depths((p.channels + kDepth - 1) / kDepth),
        rows(nearest(p.height, p.up_height)),
        columns(nearest(p.width, p.up_width)),
        zeros(p.channels),
        finish{p} {}

  // Elements of transformed pixels and of sums, at one position of `count` tiles.
  static int64_t pixel_stride(int64_t count) { return count * kDepth + kPad / sizeof(A); }
  static int64_t sum_stride(int64_t count) { return count * kColumns + kPad / sizeof(float); }
  int64_t pixels(int64_t count) const { return depths * kPositions * pixel_stride(count); }

  // Transforms tiles [begin, end) of a block to v[depth][position][tile][channel].
  void transform_pixels(const Tiles& block, int64_t begin, int64_t end, A* v) const {
    const int64_t stride = pixel_stride(block.count);
    for (int64_t t = begin; t < end; ++t) {
      const T* from[kPositions];
      look(block.first + t, from);
      each_vector(p.channels, [&](int64_t c, int n) {
        A* to = v + c / kDepth * kPositions * stride + t * kDepth + c % kDepth;
        vf d[kPositions];
#pragma GCC unroll 24
        for (int i = 0; i < kPositions; ++i) d[i] = load_n(from[i] + c, n);
        pixels_2d<F>(d);
#pragma GCC unroll 24
        for (int i = 0; i < kPositions; ++i) store(to + i * stride, d[i]);
      });
    }
  }

  // The outputs of tiles [begin, end) of a block with pixels v, in the columns from `column` on.
  void compute(const Tiles& block, int64_t begin, int64_t end, int64_t column, const A* v, B* u,
               float* m) const {
    const int64_t wide = std::min(kColumns, p.n - column), count = end - begin;
    const Panel<T> panel{column, wide, static_cast<int>((wide + W - 1) / W), {}, 0};
    for (int64_t depth = 0; depth < depths; ++depth) {
      const int64_t length = std::min(kDepth, p.channels - depth * kDepth);
      transform_filters(panel, depth * kDepth, length, u);
      for (int i = 0; i < kPositions; ++i) {
        const A* a =
            v + (depth * kPositions + i) * pixel_stride(block.count) + begin * kDepth;
        Product::run(a, u + i * kFilters, length, count, panel.vectors, m + i * sum_stride(count),
                     depth > 0);
      }
    }
    for (int64_t t = 0; t < count; ++t)
      transform_sums(panel, block.first + begin + t, m + t * kColumns, count);
  }

  const Conv& p;
  const int64_t across, tiles, depths;

 private:
  // Pointers to the pixels that a tile reads, or to zeros outside of the picture.
  void look(int64_t tile, const T** from) const {
    const int64_t down = (p.out_height + F2::kOut - 1) / F2::kOut;
    const int64_t top = tile / across % down * F2::kOut - 1, left = tile % across * kOut - 1;
    const T* picture =
        static_cast<const T*>(p.x) + tile / across / down * p.height * p.width * p.channels;
    for (int64_t i = 0; i < F2::kIn; ++i)
      for (int64_t j = 0; j < kIn; ++j) {
        const int64_t y = top + i, x = left + j;
        const bool inside = y >= 0 && y < p.up_height && x >= 0 && x < p.up_width;
        from[i * kIn + j] =
            inside ? picture + (rows[y] * p.width + columns[x]) * p.channels : zeros.data();
      }
  }

  // Transforms `length` channels of the panel's filters to u[position][row][column].
  void transform_filters(const Panel<T>& panel, int64_t channel, int64_t length, B* u) const {
    for (int64_t k = 0; k < length; k += kPerRow)
      for (int64_t c = 0; c < panel.columns; c += W) {
        const int n = static_cast<int>(std::min<int64_t>(W, panel.columns - c));
        B* to = u + k / kPerRow * kColumns + c;
        vf first[kPositions];
        filter(channel + k, panel.begin + c, n, first);
        if constexpr (kPerRow == 1) {
#pragma GCC unroll 24
          for (int i = 0; i < kPositions; ++i) store(to + i * kFilters, first[i]);
        } else {
          vf second[kPositions] = {};
          if (k + 1 < length) filter(channel + k + 1, panel.begin + c, n, second);
#pragma GCC unroll 24
          for (int i = 0; i < kPositions; ++i) store(to + i * kFilters, first[i], second[i]);
        }
      }
  }

  void filter(int64_t channel, int64_t column, int n, vf (&to)[kPositions]) const {
    const int64_t tap = p.channels * p.ld_w;
    const T* w = static_cast<const T*>(p.w) + channel * p.ld_w + column;
    vf g[9];
#pragma GCC unroll 9
    for (int i = 0; i < 9; ++i) {
      __builtin_prefetch(w + i * tap + 2 * kPerRow * p.ld_w);
      g[i] = load_n(w + i * tap, n);
    }
    filter_2d<F>(g, to);
  }

  // Writes the outputs of a tile with sums m[position][column].
  void transform_sums(const Panel<T>& panel, int64_t tile, const float* m, int64_t count) const {
    float out[kOutputs][kColumns];
    for (int64_t c = 0; c < panel.columns; c += W) {
      vf d[kPositions], y[kOutputs];
#pragma GCC unroll 24
      for (int i = 0; i < kPositions; ++i) d[i] = load(m + i * sum_stride(count) + c);
      sums_2d<F>(d, y);
#pragma GCC unroll 8
      for (int i = 0; i < kOutputs; ++i) store(out[i] + c, y[i]);
    }
    const int64_t down = (p.out_height + F2::kOut - 1) / F2::kOut;
    const int64_t top = tile / across % down * F2::kOut, left = tile % across * kOut;
    const int64_t picture = tile / across / down * p.out_height;
    for (int64_t i = 0; i < F2::kOut && top + i < p.out_height; ++i)
      for (int64_t j = 0; j < kOut && left + j < p.out_width; ++j)
        finish(panel, (picture + top + i) * p.out_width + left + j, out[i * kOut + j]);
  }

  const std::vector<int64_t> rows, columns;
  const std::vector<T> zeros;
  const Epilogue<T> finish;
};

constexpr int64_t kSumBytes = 768 << 10;  // of a task's sums: they stay in L2
constexpr int64_t kPixelBytes = 8 << 20;  // of a thread's transformed pixels: they stay in L3
constexpr int64_t kFilterTiles = 16;      // transforming filters takes as long as this many tiles

// Into how many parts to cut each of `panels` for `threads`, with at most `most` tiles per part:
// few parts transform filters rarely, many keep all threads busy.
static inline int64_t cuts_of(int64_t tiles, int64_t most, int64_t panels, int64_t threads) {
  const int64_t least = (tiles + most - 1) / most;
  int64_t best = least, best_time = INT64_MAX;
  for (int64_t cuts = least; cuts <= std::max(least, std::min(threads, tiles)); ++cuts) {
    const int64_t rounds = (cuts * panels + threads - 1) / threads;
    const int64_t time = rounds * ((tiles + cuts - 1) / cuts + kFilterTiles);
    if (time < best_time) best = cuts, best_time = time;
  }
  return best;
}

// If every thread has its own tiles, it transforms and multiplies these; otherwise the threads
// share the transformed data.
template <typename T, typename A, typename F>
static void winograd(const Conv& p) {
  using Kind = Winograd<T, A, F>;
  using B = typename Kind::B;
  const Kind kind(p);
  const int64_t threads = fastdiff::num_threads();
  const int64_t panels = (p.n + Kind::kColumns - 1) / Kind::kColumns;
  constexpr int64_t kTiles = kSumBytes / sizeof(float) / (Kind::kPositions * Kind::kColumns);
  const int64_t fit = kPixelBytes / sizeof(A) / kind.pixels(1);
  const auto compute = [&](const Tiles& block, int64_t begin, int64_t end, int64_t panel,
                           const A* v) {
    B* u = kept<B, kKeptWeights>(Kind::kPositions * Kind::kFilters);
    float* m = kept<float, kKeptSums>(Kind::kPositions * Kind::sum_stride(kTiles));
    kind.compute(block, begin, end, panel * Kind::kColumns, v, u, m);
  };
  if (kind.tiles >= threads * kTiles && fit >= kTiles) {
    const int64_t blocks = threads * ((kind.tiles + threads * kTiles - 1) / (threads * kTiles));
    fastdiff::parallel_for(blocks, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const Tiles block = part(kind.tiles, i, blocks);
        A* v = kept<A, kKeptPixels>(kind.pixels(block.count));
        kind.transform_pixels(block, 0, block.count, v);
        for (int64_t panel = 0; panel < panels; ++panel) compute(block, 0, block.count, panel, v);
      }
    });
    return;
  }
  const int64_t most = std::max<int64_t>(1, std::max<int64_t>(2, threads) * fit);
  const int64_t blocks = (kind.tiles + most - 1) / most;
  for (int64_t i = 0; i < blocks; ++i) {
    const Tiles block = part(kind.tiles, i, blocks);
    A* v = kept<A, kKeptPixels>(kind.pixels(block.count));
    fastdiff::parallel_for(block.count, [&](int64_t begin, int64_t end) {
      kind.transform_pixels(block, begin, end, v);
    });
    const int64_t cuts = cuts_of(block.count, kTiles, panels, threads);
    fastdiff::parallel_for(cuts * panels, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const Tiles cut = part(block.count, task / panels, cuts);
        compute(block, cut.first, cut.first + cut.count, task % panels, v);
      }
    });
  }
}

// Uses the requested algorithm, except that F(2x4) in bfloat16 would round too much: it uses
// float32.
template <typename T>
static void convolve(const Conv& p) {
  switch (p.algorithm) {
    case fastdiff::kWinograd2x2: return winograd<T, Factor<T>, F2>(p);
    case fastdiff::kWinograd2x4: return winograd<T, float, F4>(p);
    default: return direct<T>(p);
  }
}

}  // namespace FASTDIFF_ISA
