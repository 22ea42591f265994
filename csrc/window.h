// Finds the pixels that form the rows of a product. A convolution's rows of A are read in place, so
// there is no im2col; only short or converted rows are copied, one block of rows at a time.
#pragma once
#include <algorithm>
#include <limits>
#include <span>
#include <vector>

#include "gemm.h"
#include "kernels.h"

namespace FASTDIFF_ISA {

using fastdiff::Conv;

// A slice of the inner dimension: channels [first, first + length) under one tap.
struct Slice {
  int64_t tap_y, tap_x, first, length, b_row;
};

// Slices of at most `longest` channels; those under one tap have about equal length.
static std::vector<Slice> split_inner(const Conv& p, int64_t longest) {
  std::vector<Slice> slices;
  const int64_t parts = (p.channels + longest - 1) / longest;
  const int64_t most = ((p.channels + parts - 1) / parts + 1) / 2 * 2;  // even: bfloat16 in pairs
  int64_t b_row = 0;
  for (int64_t y = 0; y < p.kernel; ++y)
    for (int64_t x = 0; x < p.kernel; ++x)
      for (int64_t c = 0; c < p.channels; c += most) {
        const int64_t length = std::min(most, p.channels - c);
        slices.push_back({y, x, c, length, b_row});
        b_row += length;
      }
  return slices;
}

// The source row (or column) at each position after nearest-neighbour enlargement. The arithmetic
// is float32 because torch's is, and they must agree on every pixel.
static std::vector<int64_t> nearest(int64_t from, int64_t to) {
  std::vector<int64_t> source(to);
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t i = 0; i < to; ++i) {
    const auto at = static_cast<int64_t>(static_cast<float>(i) * scale);
    source[i] = at < from ? at : from - 1;
  }
  return source;
}

// Whether the rows of A are the picture's pixels, one after another.
static bool in_order(const Conv& p) {
  return p.kernel == 1 && p.pad == 0 && p.up_height == p.height && p.up_width == p.width &&
         p.out_height * p.out_width == p.height * p.width;
}

// Copies up to a vector of a row; memory after it in `to` may be overwritten.
template <typename A, typename T>
static inline void copy_vector(A* to, const T* from, int n, const T* end) {
  if constexpr (std::is_same_v<A, T>) {
    if (from + W <= end) std::memcpy(to, from, W * sizeof(T));
    else std::memcpy(to, from, n * sizeof(T));
  } else {
    store(to, from + W <= end ? load(from) : load_n(from, n));
  }
}

// The rows of A for one block of output pixels: pointers to them, one chunk of slices at a time.
template <typename T>
class Window {
 public:
  using A = Factor<T>;

  // Whether rows are copied: if they are converted, or so short that inner loops would be short.
  static bool copies(const Conv& p) {
    return !std::is_same_v<T, A> || (p.kernel > 1 && p.channels < kShort) || p.channels % 2 != 0;
  }

  // Elements of memory for copies of `rows` rows; `longest`: inner steps per chunk.
  static int64_t copied(const Conv& p, int64_t rows, int64_t longest) {
    return copies(p) ? (rows + kMaxRows) * (longest + 2 * W) : 0;
  }

  // copy: memory of as many elements as `copied` returns.
  Window(const Conv& p, int64_t rows, int64_t longest, size_t most_slices, A* copy)
      : p_(p),
        x_(static_cast<const T*>(p.x)),
        end_(x_ + p.batch * p.height * p.width * p.channels),
        copies_(copies(p)),
        plain_(p.up_height == p.height && p.up_width == p.width),
        ld_(longest + 2 * W),
        row_(plain_ ? std::vector<int64_t>() : nearest(p.height, p.up_height)),
        column_(plain_ ? std::vector<int64_t>() : nearest(p.width, p.up_width)),
        pixels_(rows + kMaxRows),
        runs_((rows / kMinRows + 1) * (copies_ ? 1 : most_slices)),
        zeros_(longest),
        copy_(copy) {}

  // Output pixels [first, last), `tall` per tile; rows beyond the last are zeros.
  void block(int64_t first, int64_t last, int tall) {
    tall_ = tall;
    tiles_ = (last - first + tall - 1) / tall;
    const int64_t area = p_.out_height * p_.out_width;
    if (in_order(p_)) {
      for (int64_t r = 0; r < tiles_ * tall; ++r)
        pixels_[r] = first + r < last ? Pixel{0, 0, 0, x_ + (first + r) * p_.channels}
                                      : Pixel{kOutside, 0, 0, nullptr};
      return;
    }
    int64_t picture = first / area, y = first % area / p_.out_width, x = first % p_.out_width;
    for (int64_t r = 0; r < tiles_ * tall; ++r) {
      if (first + r >= last) {
        pixels_[r] = {kOutside, 0, 0, nullptr};
        continue;
      }
      Pixel& pixel = pixels_[r];
      pixel = {y * p_.stride - p_.pad, x * p_.stride - p_.pad, picture * p_.height * p_.width,
               nullptr};
      if (plain_ && pixel.top >= 0 && pixel.top + p_.kernel <= p_.height && pixel.left >= 0 &&
          pixel.left + p_.kernel <= p_.width)
        pixel.inside = seen(pixel, {});
      if (++x == p_.out_width) {
        x = 0;
        if (++y == p_.out_height) y = 0, ++picture;
      }
    }
  }

  int64_t tiles() const { return tiles_; }
  int segments() const { return segments_; }
  Run<A>* runs(int64_t tile) { return &runs_[tile * segments_]; }

  // Prefetches a tile's rows while the one before is computed. Must be inlined: gcc leaves out
  // calls of a function that only prefetches.
  __attribute__((always_inline)) void ahead(int64_t tile) const {
    constexpr int64_t kLine = 64 / sizeof(A);
    if (tile >= tiles_ || copies_) return;
    for (int s = 0; s < segments_; ++s) {
      const Run<A>& run = runs_[tile * segments_ + s];
      for (int r = 0; r < tall_; ++r)
        for (int64_t k = 0; k < run.length; k += kLine) __builtin_prefetch(run.a[r] + k, 0, 3);
    }
  }

  // Points the runs of each tile at the pixels that the slices' taps cover.
  // b_rows: the row of B at which each slice begins.
  void chunk(std::span<const Slice> slices, const int64_t* b_rows) {
    if (copies_) return copy(slices, b_rows[0]);
    if constexpr (std::is_same_v<T, A>) {
      segments_ = static_cast<int>(slices.size());
      for (int s = 0; s < segments_; ++s) {
        const Slice& slice = slices[s];
        const int64_t shift = offset(slice);
        const Pixel* pixel = pixels_.data();
        for (int64_t tile = 0; tile < tiles_; ++tile) {
          Run<A>& run = runs_[tile * segments_ + s];
          run.length = slice.length;
          run.b_row = b_rows[s];
          for (int r = 0; r < tall_; ++r, ++pixel) {
            const T* from = pixel->inside ? pixel->inside + shift : seen(*pixel, slice);
            run.a[r] = from ? from : zeros_.data();
          }
        }
      }
    }
  }

 private:
  static constexpr int64_t kShort = 48;
  static constexpr int64_t kOutside = std::numeric_limits<int64_t>::min() / 2;
  struct Pixel {
    int64_t top, left, picture;  // where the window begins, and the picture's first pixel
    const T* inside;             // the window's first element if it is inside the picture, or null
  };

  const T* seen(const Pixel& pixel, const Slice& slice) const {
    const int64_t y = pixel.top + slice.tap_y, x = pixel.left + slice.tap_x;
    if (y < 0 || y >= p_.up_height || x < 0 || x >= p_.up_width) return nullptr;
    const int64_t source = plain_ ? y * p_.width + x : row_[y] * p_.width + column_[x];
    return x_ + (pixel.picture + source) * p_.channels + slice.first;
  }

  // The offset from the window's first element to a slice, in a picture that is not enlarged.
  int64_t offset(const Slice& slice) const {
    return (slice.tap_y * p_.width + slice.tap_x) * p_.channels + slice.first;
  }

  // Copies what each row reads through the slices, one after another: one run per tile.
  void copy(std::span<const Slice> slices, int64_t b_row) {
    segments_ = 1;
    const int64_t length = slices.back().b_row + slices.back().length - slices[0].b_row;
    for (int64_t row = 0; row < tiles_ * tall_; ++row) {
      const Pixel& pixel = pixels_[row];
      A* to = copy_ + row * ld_;
      Run<A>& run = runs_[row / tall_];
      run.a[row % tall_] = to;
      run.length = length;
      run.b_row = b_row;
      for (size_t s = 0; s < slices.size();) {
        const Slice& slice = slices[s];
        // joined with the slices that follow it directly in both the picture and the copy
        int64_t whole = slice.length;
        for (++s; pixel.inside && s < slices.size() &&
                  offset(slices[s]) == offset(slice) + whole; ++s)
          whole += slices[s].length;
        copy(to, pixel.inside ? pixel.inside + offset(slice) : seen(pixel, slice), whole);
        to += whole;
      }
    }
  }

  void copy(A* to, const T* from, int64_t length) const {
    for (int64_t c = 0; c < length; c += W) {
      if (from)
        copy_vector(to + c, from + c, static_cast<int>(std::min<int64_t>(W, length - c)), end_);
      else
        std::memset(to + c, 0, W * sizeof(A));
    }
  }

  const Conv& p_;
  const T *x_, *end_;
  const bool copies_, plain_;  // plain: the picture is not enlarged
  const int64_t ld_;
  const std::vector<int64_t> row_, column_;
  std::vector<Pixel> pixels_;
  std::vector<Run<A>> runs_;
  std::vector<A> zeros_;
  A* copy_;
  int tall_ = 1, segments_ = 1;
  int64_t tiles_ = 0;
};

}  // namespace FASTDIFF_ISA
