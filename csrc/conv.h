// Convolution and linear layers: `gemm.h` with rows gathered from a channels-last picture.
#pragma once
#include <memory>
#include <span>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Conv;

constexpr int64_t kChunk = 384;            // inner steps between passes over the rows: 96 KiB of B
constexpr int64_t kBlocks = 64;            // row blocks that share a pass over the chunks of B
constexpr int64_t kReused = 4;             // row blocks from which on a copy of B pays
constexpr int64_t kSerialBelow = 1 << 15;  // multiply-adds; waking a thread costs about as much

// Whether B is copied to pairs where many rows share it.
template <typename T>
constexpr bool kPacks = !std::is_same_v<Packed<T>, T>;
// Inner steps summed at once: few for the rounding errors' sake, which bfloat16 hides.
template <typename T>
constexpr int64_t kSlice = kPacks<T> ? kChunk : 128;

// Columns [begin, begin + columns) of the output, and where their weights are.
template <typename T>
struct Panel {
  int64_t begin, columns;
  int vectors;             // of B: twice the output's with GEGLU (value columns, then gate columns)
  const T* b[kMaxVectors];
  int64_t ld_b;
};

// The last columns, when they do not fill a vector, are copied to a zero-padded [inner, W] panel.
template <typename T>
static std::vector<Panel<T>> split_columns(const Conv& p, int64_t inner, std::vector<T>& padded) {
  const auto* w = static_cast<const T*>(p.w);
  const int halves = p.act == fastdiff::kGeglu ? 2 : 1;
  const int64_t width = p.n / halves;
  std::vector<Panel<T>> panels;
  int64_t begin = 0;
  while (width - begin >= W) {
    const int wanted = panel_vectors((width - begin) / W * halves);
    const int vectors = halves == 2 ? wanted / 2 * 2 : wanted;
    Panel<T> panel{begin, vectors / halves * W, vectors, {}, p.ld_w};
    for (int v = 0; v < vectors; ++v)
      panel.b[v] = w + v / (vectors / halves) * width + begin + v % (vectors / halves) * W;
    panels.push_back(panel);
    begin += panel.columns;
  }
  if (const int64_t rest = width - begin; rest > 0) {
    padded.assign(inner * halves * W, T{});
    for (int64_t k = 0; k < inner; ++k)
      for (int h = 0; h < halves; ++h)
        std::memcpy(&padded[(k * halves + h) * W], w + k * p.ld_w + h * width + begin,
                    rest * sizeof(T));
    Panel<T> panel{begin, rest, halves, {padded.data(), padded.data() + W}, halves * W};
    panels.push_back(panel);
  }
  return panels;
}

// Rows for the inner loop: x itself, or a converted copy.
template <typename T>
static const Factor<T>* factors(const T* x, int64_t count, std::vector<Factor<T>>& copy) {
  if constexpr (std::is_same_v<T, Factor<T>>) {
    return x;
  } else {
    copy.resize(count);
    each_vector(count, [&](int64_t i, int n) { store_n(&copy[i], load_n(x + i, n), n); });
    return copy.data();
  }
}

// Which source row (or column) the nearest-neighbour enlargement shows at each position; the
// arithmetic is float32 because torch's is, and they must agree on every pixel.
static std::vector<int64_t> nearest(int64_t from, int64_t to) {
  std::vector<int64_t> source(to);
  const float scale = static_cast<float>(from) / static_cast<float>(to);
  for (int64_t i = 0; i < to; ++i) {
    const auto at = static_cast<int64_t>(static_cast<float>(i) * scale);
    source[i] = at < from ? at : from - 1;
  }
  return source;
}

// A slice of the inner dimension: channels [first, first + length) under one tap.
struct Slice {
  int64_t tap_y, tap_x, first, length, b_row;
};

static std::vector<Slice> split_inner(const Conv& p, int64_t longest) {
  std::vector<Slice> slices;
  int64_t b_row = 0;
  for (int64_t y = 0; y < p.kernel; ++y)
    for (int64_t x = 0; x < p.kernel; ++x)
      for (int64_t c = 0; c < p.channels; c += longest) {
        const int64_t length = std::min(longest, p.channels - c);
        slices.push_back({y, x, c, length, b_row});
        b_row += length;
      }
  return slices;
}

template <typename T>
struct Epilogue {
  const Conv& p;

  void operator()(const Panel<T>& panel, int64_t pixel, const float* sums) const {
    const bool gated = p.act == fastdiff::kGeglu;
    const int64_t wide = gated ? p.n / 2 : p.n, at = pixel * wide + panel.begin;
    const auto* bias = static_cast<const T*>(p.bias);
    const T* residual = nullptr;
    if (p.residual)
      residual = static_cast<const T*>(p.residual) + pixel % p.residual_pixels * wide + panel.begin;
    auto* out = static_cast<T*>(p.out) + at;
    for (int64_t c = 0; c < panel.columns; c += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, panel.columns - c));
      const int64_t column = panel.begin + c;
      vf value = load(sums + c);
      if (bias) value += load_n(bias + column, n);
      if (gated) {
        vf gate = load(sums + panel.vectors / 2 * W + c);
        if (bias) gate += load_n(bias + p.n / 2 + column, n);
        value *= gelu(gate);
      } else if (p.act == fastdiff::kSilu) {
        value = silu(value);
      } else if (p.act == fastdiff::kGelu) {
        value = gelu(value);
      } else if (p.act == fastdiff::kGeluTanh) {
        value = gelu_tanh(value);
      }
      if (residual) value += load_n(residual + c, n);
      store_n(out + c, value, n);
    }
  }
};

// Points the rows of each segment at the pixels that output pixels [first, first + count) see
// through the slice's tap; at zeros where the window leaves the picture or no pixel is left.
template <typename A>
static void gather(const Conv& p, const A* x, int64_t first, int count,
                   std::span<const Slice> slices, const std::vector<int64_t>& rows,
                   const std::vector<int64_t>& columns, const A* zeros, Run<A>* segments) {
  const int64_t area = p.out_height * p.out_width;
  const bool linear = p.kernel == 1 && p.stride == 1 && p.pad == 0 && p.up_height == p.height &&
                      p.up_width == p.width;  // a pixel sees itself
  for (int r = 0; linear && r < count; ++r) {
    const bool inside = first + r < p.batch * area;
    for (size_t s = 0; s < slices.size(); ++s)
      segments[s].a[r] = inside ? x + (first + r) * p.channels + slices[s].first : zeros;
  }
  for (int r = 0; !linear && r < count; ++r) {
    const int64_t pixel = first + r, within = pixel % area;
    const int64_t picture = pixel / area * p.height * p.width;
    const int64_t top = within / p.out_width * p.stride - p.pad;
    const int64_t left = within % p.out_width * p.stride - p.pad;
    for (size_t s = 0; s < slices.size(); ++s) {
      const int64_t y = top + slices[s].tap_y, x_at = left + slices[s].tap_x;
      const bool inside = pixel < p.batch * area && y >= 0 && y < p.up_height && x_at >= 0 &&
                          x_at < p.up_width;
      const int64_t source = inside ? picture + rows[y] * p.width + columns[x_at] : 0;
      segments[s].a[r] = inside ? x + source * p.channels + slices[s].first : zeros;
    }
  }
}

template <typename T>
static void conv(const Conv& p) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t inner = p.kernel * p.kernel * p.channels;
  std::vector<Factor<T>> copy;
  const Factor<T>* x = factors(static_cast<const T*>(p.x),
                               p.batch * p.height * p.width * p.channels, copy);
  std::vector<T> padded;
  const auto panels = split_columns<T>(p, inner, padded);
  const auto slices = split_inner(p, kSlice<T>);
  const auto rows = nearest(p.height, p.up_height), columns = nearest(p.width, p.up_width);
  const std::vector<Factor<T>> zeros(kSlice<T>);
  const Epilogue<T> finish{p};

  // Panels are split among the threads first (each reads only its weights), rows if need be.
  const int64_t threads = fastdiff::num_threads(), count = panels.size();
  const int64_t cuts = count % threads ? threads : 1;
  const auto body = [&](int64_t first_task, int64_t last_task) {
    const auto sums = std::make_unique_for_overwrite<float[]>(std::min(kBlocks, pixels) *
                                                              kTileSums * W);
    std::vector<Run<Factor<T>>> segments(slices.size());
    const auto packed = std::make_unique_for_overwrite<Packed<T>[]>(std::min(kChunk, inner) *
                                                                   kMaxVectors * W);
    const Packed<T>* near[kMaxVectors];  // the columns of `packed`
    for (int v = 0; v < kMaxVectors; ++v) near[v] = &packed[v * W];
    for (int64_t task = first_task; task < last_task; ++task) {
      const Panel<T>& panel = panels[task / cuts];
      const int tall = rows_of(panel.vectors), wide = panel.vectors * W;
      const int64_t blocks = (pixels + tall - 1) / tall, cut = task % cuts;
      const int64_t stop = blocks * (cut + 1) / cuts;
      for (int64_t first = blocks * cut / cuts; first < stop; first += kBlocks) {
        const int64_t last = std::min(first + kBlocks, stop);
        for (size_t begin = 0, end; begin < slices.size(); begin = end) {
          int64_t length = slices[begin].length;
          for (end = begin + 1; end < slices.size() && length + slices[end].length <= kChunk; ++end)
            length += slices[end].length;
          const std::span<const Slice> chunk(&slices[begin], end - begin);
          for (size_t i = 0; i < chunk.size(); ++i) {
            segments[i].length = chunk[i].length;
            segments[i].b_row = chunk[i].b_row;
          }
          // The float32 loop gains nothing by it: it reads B half as often for its work.
          const bool packs = kPacks<T> && last - first >= kReused;
          if constexpr (kPacks<T>)
            for (int64_t i = 0, row = 0; packs && i < std::ssize(chunk); ++i) {
              segments[i].b_row = row;
              row += pack(panel.b, panel.vectors, panel.ld_b, chunk[i].b_row, chunk[i].length,
                          &packed[row * wide]);
            }
          for (int64_t block = first; block < last; ++block) {
            gather(p, x, block * tall, tall, chunk, rows, columns, zeros.data(), segments.data());
            float* to = &sums[(block - first) * tall * wide];
            const int count = static_cast<int>(chunk.size());
            if (packs) tile(panel.vectors, segments.data(), count, near, wide, to, begin > 0);
            else tile(panel.vectors, segments.data(), count, panel.b, panel.ld_b, to, begin > 0);
            if (end == slices.size())
              for (int r = 0; r < tall && block * tall + r < pixels; ++r)
                finish(panel, block * tall + r, to + r * wide);
          }
        }
      }
    }
  };
  if (pixels * inner * p.n < kSerialBelow) body(0, count * cuts);
  else fastdiff::parallel_for(count * cuts, body);
}

}  // namespace FASTDIFF_ISA
