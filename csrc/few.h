// Convolutions from few channels and to few channels, without im2col. A picture of few channels is
// copied with the zeros around it, so that each row of a window covers contiguous pixels. For
// few output channels, whose columns would not fill a vector, a vector holds input channels.
#pragma once
#include "blocks.h"
#include "conv.h"
#include "flash.h"
#include "parallel.h"
#include "scratch.h"
#include "stream.h"

namespace FASTDIFF_ISA {

constexpr int64_t kFewChannels = 48;  // with more, a pixel's channels are a run that is long enough

// Calls body(first output row, last) on the threads' parts of all pictures' rows.
template <typename F>
static void each_rows(const Conv& p, const F& body) {
  const int64_t rows = p.batch * p.out_height;
  const int64_t products = rows * p.out_width * p.kernel * p.kernel * p.channels * p.n;
  if (products < kSerialBelow) body(0, rows);
  else fastdiff::parallel_for(rows, body);
}

// From few channels: the products of a window's row are one run.
template <typename T>
class FromFew {
 public:
  using A = Factor<T>;

  static bool takes(const Conv& p) {
    return p.kernel > 1 && p.up_height == p.height && p.up_width == p.width &&
           !fastdiff::is_gated(p.act) && p.channels < kFewChannels &&
           p.kernel * p.channels <= kSlice<T>;
  }

  explicit FromFew(const Conv& p)
      : p_(p),
        steps_(packed_rows<T>(p.channels)),
        wide_(std::is_same_v<Packed<T>, float> ? p.channels : 2 * steps_),
        ld_(((p.out_width - 1) * p.stride + p.kernel) * wide_),
        panels_(split_columns<T>(p, p.kernel * p.kernel * p.channels, padded_)),
        finish_{p} {}

  // Computes rows [first, last) of all pictures.
  void operator()(int64_t first, int64_t last) const {
    const int64_t row = p_.out_width * p_.n * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::clamp<int64_t>(kStripBytes / row, 1, p_.out_height);
    auto* weights = kept<Packed<T>, kKeptWeights>(weights_of(std::ssize(panels_)));
    for (int64_t i = 0; i < std::ssize(panels_); ++i) pack(panels_[i], weights + weights_of(i));
    A* copy = kept<A, kKeptPixels>(((most - 1) * p_.stride + p_.kernel) * ld_ + W);
    std::vector<const A*> pixels(most * p_.out_width + kMaxRows);
    while (first < last) {
      const int64_t y = first % p_.out_height;
      const int64_t rows = std::min({most, last - first, p_.out_height - y});
      read(first / p_.out_height, y * p_.stride - p_.pad, rows, copy);
      const int64_t count = rows * p_.out_width;
      for (int64_t r = 0, i = 0; r < rows; ++r)
        for (int64_t x = 0; x < p_.out_width; ++x, ++i)
          pixels[i] = copy + r * p_.stride * ld_ + x * p_.stride * wide_;
      std::fill_n(&pixels[count], kMaxRows, pixels[count - 1]);
      for (int64_t from = 0; from < count; from += kPixels)
        for (int64_t i = 0; i < std::ssize(panels_); ++i)
          by_vectors(panels_[i].vectors, [&](auto v) {
            compute<v>(panels_[i], weights + weights_of(i), &pixels[from],
                       std::min(kPixels, count - from), first * p_.out_width + from);
          });
      first += rows;
    }
  }

 private:
  static constexpr int64_t kStripBytes = 256 << 10;  // of outputs that share a copy
  // Outputs whose columns are computed in turn, so that memory is written in order; whole tiles.
  static constexpr int64_t kPixels = 2 * kMaxRows;

  int64_t weights_of(int64_t panels) const {
    return panels * p_.kernel * p_.kernel * steps_ * kMaxVectors * W;
  }

  void pack(const Panel<T>& panel, Packed<T>* to) const {
    by_vectors(panel.vectors, [&](auto v) {
      for (int64_t tap = 0; tap < p_.kernel * p_.kernel; ++tap)
        FASTDIFF_ISA::pack<v>(panel.b, panel.ld_b, tap * p_.channels, p_.channels,
                              to + tap * steps_ * v * W);
    });
  }

  // Copies what `rows` rows of outputs read, from row `top` of a picture on, with the zeros around.
  void read(int64_t picture, int64_t top, int64_t rows, A* to) const {
    const int64_t left = p_.pad * wide_, inside = std::min(p_.width, ld_ / wide_ - p_.pad);
    const T* from = static_cast<const T*>(p_.x) + picture * p_.height * p_.width * p_.channels;
    for (int64_t y = top; y < top + (rows - 1) * p_.stride + p_.kernel; ++y, to += ld_) {
      const bool outside = y < 0 || y >= p_.height;
      std::memset(to, 0, (outside ? ld_ : left) * sizeof(A));
      if (outside) continue;
      A* end = read(from + y * p_.width * p_.channels, inside, to + left);
      std::memset(end, 0, (to + ld_ - end) * sizeof(A));
    }
  }

  // Copies pixels, with a zero after each if its channels are odd and products are of pairs.
  A* read(const T* from, int64_t pixels, A* to) const {
    if constexpr (!std::is_same_v<A, T>) {
      each_vector(pixels * p_.channels, [&](int64_t c, int n) {
        store_n(to + c, load_n(from + c, n), n);
      });
    } else if (wide_ == p_.channels) {
      std::memcpy(to, from, pixels * wide_ * sizeof(A));
    } else {
      for (int64_t i = 0; i < pixels; ++i) {
        for (int64_t c = 0; c < p_.channels; ++c) to[i * wide_ + c] = from[i * p_.channels + c];
        to[i * wide_ + p_.channels] = A{};
      }
    }
    return to + pixels * wide_;
  }

  // Computes a panel of `count` outputs, the first of which is number `output`.
  template <int V>
  void compute(const Panel<T>& panel, const Packed<T>* weights, const A* const* pixels,
               int64_t count, int64_t output) const {
    constexpr int R = Rows<V>;
    const Copy<V, Packed<T>> b{weights};
    const int64_t length = p_.kernel * wide_, chain = std::max<int64_t>(1, kSlice<T> / length);
    const bool straight = chain >= p_.kernel && finish_.straight(panel);
    float sums[R * V * W];
    for (int64_t i = 0; i < count; i += R) {
      for (int r = 0; r < R; ++r) finish_.ahead(panel, output + i + R + r);
      const auto multiply_rows = [&](int64_t y, int64_t stop, vf (&acc)[R][V]) {
        for (; y < stop; ++y) {
          Run<A> run;
          for (int r = 0; r < R; ++r) run.a[r] = pixels[i + r] + y * ld_;
          run.length = length;
          multiply<V>(run, b.from(y * p_.kernel * steps_), acc);
        }
      };
      if (straight) {
        vf acc[R][V] = {};
        multiply_rows(0, p_.kernel, acc);
        finish_.template write<V>(panel, output + i, count - i, acc);
        continue;
      }
      for (int64_t y = 0; y < p_.kernel; y += chain) {
        vf acc[R][V] = {};
        multiply_rows(y, std::min(y + chain, p_.kernel), acc);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) {
            float* to = sums + (r * V + v) * W;
            store(to, y > 0 ? load(to) + acc[r][v] : acc[r][v]);
          }
      }
      for (int r = 0; r < R && i + r < count; ++r)
        finish_(panel, output + i + r, sums + r * V * W);
    }
  }

  const Conv& p_;
  const int64_t steps_, wide_, ld_;  // of a pixel, its numbers, and those in a row of the copy
  std::vector<T> padded_;
  const std::vector<Panel<T>> panels_;
  const Epilogue<T> finish_;
};

// To few channels: each pixel's channels times those of each column of the weights, summed across
// the vector at the end.
template <typename T>
class ToFew {
 public:
  using A = Factor<T>;

  static bool takes(const Conv& p) {
    return p.kernel > 1 && p.n <= kMost && p.channels >= kLanes && p.up_height == p.height &&
           p.up_width == p.width && !fastdiff::is_gated(p.act);
  }

  explicit ToFew(const Conv& p)
      : p_(p),
        taps_(p.kernel * p.kernel),
        padded_((p.channels + kLanes - 1) / kLanes * kLanes),
        zeros_(p.channels),
        weights_(p.n * taps_ * padded_),
        finish_{p} {
    const T* w = static_cast<const T*>(p.w);
    for (int64_t tap = 0; tap < taps_; ++tap)
      for (int64_t c = 0; c < p.channels; ++c)
        for (int64_t n = 0; n < p.n; ++n) {
          const T& from = w[(tap * p.channels + c) * p.ld_w + n];
          A& to = weights_[(tap * p.n + n) * padded_ + c];
          if constexpr (std::is_same_v<A, T>) to = from;
          else to = load1(&from);
        }
  }

  // Computes rows [first, last) of all pictures.
  void operator()(int64_t first, int64_t last) const {
    for (int64_t row = first; row < last; ++row)
      for (int64_t n = 0; n < p_.n; n += kColumns) {
        const Panel<T> panel{n, std::min<int64_t>(kColumns, p_.n - n), 1, {}, 0};
        switch (panel.columns) {
          case 1: line<1>(panel, row); break;
          case 2: line<2>(panel, row); break;
          case 3: line<3>(panel, row); break;
          default: line<4>(panel, row);
        }
      }
  }

 private:
  static constexpr int64_t kMost = 8;   // columns
  static constexpr int kColumns = 4;    // at once
  static constexpr int kLanes = W * sizeof(float) / sizeof(A);  // channels in a vector

  template <int N>
  void line(const Panel<T>& panel, int64_t row) const {
    constexpr int P = kTileSums / kColumns;  // pixels at once
    const int64_t picture = row / p_.out_height;
    const T* x = static_cast<const T*>(p_.x) + picture * p_.height * p_.width * p_.channels;
    const int64_t top = row % p_.out_height * p_.stride - p_.pad;
    for (int64_t i = 0; i < p_.out_width; i += P) {
      const int count = static_cast<int>(std::min<int64_t>(P, p_.out_width - i));
      const int64_t left = i * p_.stride - p_.pad;
      const bool within = left >= 0 && left + (P - 1) * p_.stride + p_.kernel <= p_.width;
      vf acc[P][N] = {};
      for (int64_t tap = 0; tap < taps_; ++tap) {
        const int64_t y = top + tap / p_.kernel, first = left + tap % p_.kernel;
        const bool outside = y < 0 || y >= p_.height;
        const T* from[P];
        for (int q = 0; q < P; ++q) {
          const int64_t at = first + q * p_.stride;
          from[q] = x + (y * p_.width + at) * p_.channels;
          if (outside || (!within && (at < 0 || at >= p_.width))) from[q] = zeros_.data();
        }
        const A* w = &weights_[(tap * p_.n + panel.begin) * padded_];
        int64_t c = 0;
        for (; c + kLanes <= p_.channels; c += kLanes) multiply<N, P>(from, w, c, kLanes, acc);
        if (c < p_.channels) multiply<N, P>(from, w, c, static_cast<int>(p_.channels - c), acc);
      }
      float sums[P][W];
#pragma GCC unroll 12
      for (int q = 0; q < P; ++q) sum_across(acc[q], sums[q]);
      for (int q = 0; q < count; ++q) finish_(panel, row * p_.out_width + i + q, sums[q]);
    }
  }

  // Sums of lanes that are S apart: of a in the lanes whose number lacks that bit, of b in others.
  template <int S>
  static vf neighbours(vf a, vf b) {
    constexpr std::make_integer_sequence<int, W> lanes{};
    return exchange<S, false>(a, b, lanes) + exchange<S, true>(a, b, lanes);
  }
  template <int S>
  static vf folded(vf v) {
    if constexpr (S < W) return folded<2 * S>(neighbours<S>(v, v));
    else return v;
  }

  // to[n] = the sum across the n-th vector
  template <int N>
  static void sum_across(const vf (&of)[N], float* to) {
    vf four[kColumns] = {};
    for (int n = 0; n < N; ++n) four[n] = of[n];
    const vf low = neighbours<1>(four[0], four[1]), high = neighbours<1>(four[2], four[3]);
    store(to, folded<4>(neighbours<2>(low, high)));
  }

  // acc += `count` channels of P pixels times those of N columns
  template <int N, int P>
  __attribute__((always_inline)) void multiply(const T* const (&from)[P], const A* w, int64_t c,
                                               int count, vf (&acc)[P][N]) const {
#if defined(__AVX512BF16__)
    if constexpr (std::is_same_v<T, bf16>) {
      vu weight[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n)
        weight[n] = load(reinterpret_cast<const Pair*>(w + n * padded_ + c));
#pragma GCC unroll 12
      for (int q = 0; q < P; ++q) {
        const vu pixel = bits_n(from[q] + c, count);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n)
          acc[q][n] = (vf)_mm512_dpbf16_ps((__m512)acc[q][n], (__m512bh)pixel, (__m512bh)weight[n]);
      }
      return;
    }
#endif
    if constexpr (std::is_same_v<A, float>) {
      vf weight[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; ++n) weight[n] = load(w + n * padded_ + c);
#pragma GCC unroll 12
      for (int q = 0; q < P; ++q) {
        const vf pixel = load_n(from[q] + c, count);
#pragma GCC unroll 4
        for (int n = 0; n < N; ++n) acc[q][n] += pixel * weight[n];
      }
    }
  }

  const Conv& p_;
  const int64_t taps_, padded_;
  const std::vector<T> zeros_;
  std::vector<A> weights_;  // [taps][n][channels]
  const Epilogue<T> finish_;
};

// Direct products, in the order of memory that suits the numbers of channels and rows.
template <typename T>
static void direct(const Conv& p) {
  if (Streamed<T>::takes(p)) Streamed<T>(p).run();
  else if (ToFew<T>::takes(p)) each_rows(p, ToFew<T>(p));
  else if (FromFew<T>::takes(p)) each_rows(p, FromFew<T>(p));
  else conv<T>(p);
}

}  // namespace FASTDIFF_ISA
