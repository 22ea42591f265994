// Products of few rows take as long as reading the weight. So it is read once and in the order of
// memory: a few of its rows at a time, all their columns. The sums of each slice of the inner
// dimension wait in a cache and are added at the end, in the order that blocks.h adds them.
#pragma once
#include <numeric>

#include "blocks.h"
#include "conv.h"
#include "parallel.h"
#include "scratch.h"

namespace FASTDIFF_ISA {

template <typename T>
class Streamed {
 public:
  static bool takes(const Conv& p) {
    const int64_t rows = p.batch * p.height * p.width;
    return in_order(p) && rows <= kMinRows &&
           p.channels * p.n * static_cast<int64_t>(sizeof(T)) >= kLeast;
  }

  explicit Streamed(const Conv& p)
      : p_(p),
        rows_(p.batch * p.height * p.width),
        x_(factors(p)),
        panels_(split_columns<T>(p, p.channels, padded_)),
        slices_(split_inner(p, kSlice<T>)),
        finish_{p} {
    for (const Panel<T>& panel : panels_) {
      begins_.push_back(columns_);
      columns_ += panel.vectors * W;
    }
    sums_ = kept<float, kKeptSums>(std::ssize(slices_) * columns_ * kMaxRows);
  }

  void run() const {
    // Parts of a slice: as many for each thread, and what is prefetched stays in L2.
    const int64_t slices = slices_.size(), panels = panels_.size();
    const int64_t even = fastdiff::num_threads() / std::gcd(slices, fastdiff::num_threads());
    const int64_t least = (columns_ + kMostColumns - 1) / kMostColumns;
    const int64_t parts = std::min((least + even - 1) / even * even, panels);
    fastdiff::parallel_for(slices * parts, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t part = i % parts;
        const int64_t begin = panels * part / parts, end = panels * (part + 1) / parts;
        multiply_slice(slices_[i / parts], sums_ + i / parts * columns_ * kMaxRows, begin, end);
        for (int64_t j = begin; slices == 1 && j < end; ++j) add_slices(j);
      }
    });
    if (slices == 1) return;
    fastdiff::parallel_for(panels, [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) add_slices(i);
    });
  }

 private:
  using A = Factor<T>;
  static constexpr int64_t kLeast = 1 << 20;  // bytes; a smaller weight is rather in a cache
  static constexpr int64_t kDepth = 16;       // rows of the weight at once; as many are prefetched
  static constexpr int64_t kMostColumns = 4096;  // of a part

  static const A* factors(const Conv& p) {
    if constexpr (std::is_same_v<A, T>) return static_cast<const T*>(p.x);
    const int64_t count = p.batch * p.height * p.width * p.channels;
    A* copy = kept<A, kKeptPixels>(count);
    each_vector(count, [&](int64_t i, int n) {
      store_n(copy + i, load_n(static_cast<const T*>(p.x) + i, n), n);
    });
    return copy;
  }

  // sums: [columns_][kMaxRows], of which each panel uses [its rows][its columns].
  void multiply_slice(const Slice& slice, float* sums, int64_t begin, int64_t end) const {
    for (int64_t k = 0; k < slice.length; k += kDepth)
      for (int64_t i = begin; i < end; ++i)
        by_vectors(panels_[i].vectors, [&](auto v) {
          const Panel<T>& panel = panels_[i];
          // What lies beyond the slice is the next one's beginning.
          for (int64_t row = slice.b_row + k + kDepth; row < slice.b_row + k + 2 * kDepth; ++row)
            for (int j = 0; j < v; ++j) __builtin_prefetch(panel.b[j] + row * panel.ld_b, 0, 2);
          float* to = sums + begins_[i] * kMaxRows;
          const bool single = rows_ == 1 && std::is_same_v<A, float>;  // as in blocks.h
          if (single) multiply_rows<v, 1>(slice, k, panel, to);
          else multiply_rows<v, Rows<v>>(slice, k, panel, to);
        });
  }

  // Adds kDepth products to the sums of R rows, the first to zero. Rows beyond the last repeat it.
  template <int V, int R>
  void multiply_rows(const Slice& slice, int64_t k, const Panel<T>& panel, float* sums) const {
    Run<A> run;
    for (int r = 0; r < R; ++r)
      run.a[r] = x_ + std::min<int64_t>(r, rows_ - 1) * p_.channels + slice.first + k;
    run.length = std::min(kDepth, slice.length - k);
    vf acc[R][V] = {};
    if (k > 0) {
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) acc[r][v] = load(sums + (r * V + v) * W);
    }
    multiply<V>(run, Columns<V, T, 0>(panel.b, panel.ld_b, slice.b_row + k), acc);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) store(sums + (r * V + v) * W, acc[r][v]);
  }

  void add_slices(int64_t panel) const {
    const int64_t wide = panels_[panel].vectors * W, slice = columns_ * kMaxRows;
    float total[kMaxVectors * W];
    for (int64_t row = 0; row < rows_; ++row) {
      const float* sums = sums_ + begins_[panel] * kMaxRows + row * wide;
      for (int64_t c = 0; c < wide; c += W) {
        vf sum = load(sums + c);
        for (int64_t s = 1; s < std::ssize(slices_); ++s) sum += load(sums + s * slice + c);
        store(total + c, sum);
      }
      finish_(panels_[panel], row, total);
    }
  }

  const Conv& p_;
  const int64_t rows_;
  const A* const x_;
  std::vector<T> padded_;
  const std::vector<Panel<T>> panels_;
  const std::vector<Slice> slices_;
  const Epilogue<T> finish_;
  std::vector<int64_t> begins_;  // of each panel: its first column, of columns_ with padding
  int64_t columns_ = 0;
  float* sums_;
};

}  // namespace FASTDIFF_ISA
