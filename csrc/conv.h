// Convolution and linear layers: divides a product into panels, chunks and threads' parts.
#pragma once
#include "blocks.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

constexpr int64_t kCopyRows = 12;          // rows whose sums take about as long as a copy of B
constexpr int64_t kSerialBelow = 1 << 15;  // multiply-adds; waking a thread costs about as much

// The last columns, if they do not fill a vector, are copied to a zero-padded [inner, W] panel.
template <typename T>
static std::vector<Panel<T>> split_columns(const Conv& p, int64_t inner, std::vector<T>& padded) {
  const auto* w = static_cast<const T*>(p.w);
  const int halves = fastdiff::is_gated(p.act) ? 2 : 1;
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

// How the threads share a product: parts of the rows times parts of the panels.
struct Cut {
  int64_t rows, panels;
};

// The cut with the least work per thread; copying a panel costs as much as some of its rows.
static Cut cut(int64_t pixels, int64_t panels, int64_t threads) {
  Cut best{1, 1};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const Cut now{std::min(threads / parts, pixels), parts};  // no thread has zero rows
    const int64_t tiles = (pixels / now.rows + kMinRows - 1) / kMinRows, rows = tiles * kMinRows;
    const int64_t work = (panels + parts - 1) / parts *
                         (rows + kCopyRows * ((rows + kBlockRows - 1) / kBlockRows));
    if (work < least) least = work, best = now;
  }
  return best;
}

template <typename T>
static void conv(const Conv& p) {
  const int64_t pixels = p.batch * p.out_height * p.out_width;
  const int64_t inner = p.kernel * p.kernel * p.channels;
  std::vector<T> padded;
  const auto panels = split_columns<T>(p, inner, padded);
  const auto slices = split_inner(p, kSlice<T>);
  const Chunks chunks = split_chunks(slices, Window<T>::copies(p) ? kSlice<T> : kChunk);
  const bool serial = pixels * inner * p.n < kSerialBelow;
  const int64_t count = panels.size();
  const Cut parts = cut(pixels, count, serial ? 1 : fastdiff::num_threads());
  fastdiff::parallel_for(parts.rows * parts.panels, [&](int64_t first, int64_t last) {
    Product<T> product(p, panels, chunks, (pixels + parts.rows - 1) / parts.rows);
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / parts.panels, column = i % parts.panels;
      product(pixels * row / parts.rows, pixels * (row + 1) / parts.rows,
              count * column / parts.panels, count * (column + 1) / parts.panels);
    }
  });
}

}  // namespace FASTDIFF_ISA
