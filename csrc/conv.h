// Convolution and linear layers: `gemm.h` with rows gathered from a channels-last picture.
#pragma once
#include <memory>
#include <new>
#include <optional>

#include "parallel.h"
#include "scratch.h"
#include "window.h"

namespace FASTDIFF_ISA {

constexpr int64_t kChunk = 384;            // inner steps whose B is copied at once
constexpr int64_t kBlockRows = 528;        // rows that share a copy of B; a multiple of any tile's
constexpr int64_t kGroup = 4;              // panels that share a chunk's rows, which stay in L2
constexpr int64_t kCopyRows = 12;          // rows whose sums take about as long as a copy of B
constexpr int64_t kSerialBelow = 1 << 15;  // multiply-adds; waking a thread costs about as much

// Inner steps summed at once: few for the rounding errors' sake, which bfloat16 hides, and so that
// copies of rows are small.
template <typename T>
constexpr int64_t kSlice = std::is_same_v<Packed<T>, float> ? 128 : kChunk;

// Tiles of rows from which on a copy of B pays: bfloat16 is made into pairs (or converted) by it.
template <typename T>
constexpr int64_t kReused = std::is_same_v<T, Packed<T>> ? 16 : 4;

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

// How the threads share a product: parts of the rows times parts of the panels.
struct Cut {
  int64_t rows, panels;
};

// The cut with the least work for a thread: a panel that is copied costs as much as some rows of it.
static Cut cut(int64_t pixels, int64_t panels, int64_t threads) {
  Cut best{1, 1};
  int64_t least = std::numeric_limits<int64_t>::max();
  for (int64_t parts = 1; parts <= threads; ++parts) {
    const Cut now{threads / parts, parts};
    const int64_t tiles = (pixels / now.rows + kMinRows - 1) / kMinRows, rows = tiles * kMinRows;
    const int64_t work = (panels + parts - 1) / parts *
                         (rows + kCopyRows * ((rows + kBlockRows - 1) / kBlockRows));
    if (work < least) least = work, best = now;
  }
  return best;
}

// Brings a panel's rows of B under a chunk into L2, a few while each tile is computed: rows that lie
// far apart are not foreseen by the processor.
template <typename T>
class Ahead {
 public:
  Ahead(const Panel<T>& panel, int64_t tiles) : panel_(panel), tiles_(tiles) {}
  void begin(std::span<const Slice> chunk) {
    row_ = chunk[0].b_row;
    last_ = chunk.back().b_row + chunk.back().length;
    each_ = (last_ - row_ + tiles_ - 1) / tiles_;
  }
  void operator()() {
    for (const int64_t stop = std::min(row_ + each_, last_); row_ < stop; ++row_)
      for (int v = 0; v < panel_.vectors; ++v)
        __builtin_prefetch(panel_.b[v] + row_ * panel_.ld_b, 0, 2);
  }

 private:
  const Panel<T>& panel_;
  const int64_t tiles_;
  int64_t row_ = 0, last_ = 0, each_ = 0;
};

using Chunks = std::vector<std::span<const Slice>>;

// Consecutive slices of at most `most` channels together.
static Chunks split_chunks(std::span<const Slice> slices, int64_t most) {
  Chunks chunks;
  for (size_t begin = 0, end; begin < slices.size(); begin = end) {
    int64_t length = slices[begin].length;
    for (end = begin + 1; end < slices.size() && length + slices[end].length <= most; ++end)
      length += slices[end].length;
    chunks.push_back(slices.subspan(begin, end - begin));
  }
  return chunks;
}

// A thread's part of a product: blocks of rows against groups of panels.
template <typename T>
class Product {
 public:
  Product(const Conv& p, std::span<const Panel<T>> panels, const Chunks& chunks, int64_t rows)
      : p_(p), panels_(panels), chunks_(chunks), finish_{p} {
    const int64_t most = std::min(rows, kBlockRows), tiles = most / kMinRows + 1;
    const int64_t sums = kTileSums * W * (chunks.size() == 1 ? 1 : tiles * kGroup);
    const int64_t packed = std::min(kChunk, chunks_steps()) * kMaxVectors * W;
    const int64_t copied = Window<T>::copied(p, most, kChunk);
    sums_ = kept<float, kKeptSums>(sums);
    packed_ = kept<Packed<T>, kKeptWeights>(packed);
    for (int v = 0; v < kMaxVectors; ++v) near_[v] = packed_ + v * W;
    window_.emplace(p, most, kChunk, most_slices(), kept<Factor<T>, kKeptPixels>(copied));
    b_rows_.resize(most_slices());
  }

  // Output pixels [first, last) of panels [begin, end).
  void operator()(int64_t first, int64_t last, int64_t begin, int64_t end) {
    constexpr int64_t kUnit = 2 * kMaxRows;  // a multiple of any tile's rows
    const int64_t blocks = (last - first + kBlockRows - 1) / kBlockRows;
    const int64_t rows = ((last - first + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit;
    for (int64_t from = first; from < last; from += rows)
      for (int64_t panel = begin, stop; panel < end; panel = stop) {
        for (stop = panel + 1; stop < end && stop - panel < kGroup; ++stop)
          if (panels_[stop].vectors != panels_[panel].vectors) break;
        block(from, std::min(from + rows, last), panels_.subspan(panel, stop - panel));
      }
  }

 private:
  size_t most_slices() const {
    size_t most = 0;
    for (const auto& chunk : chunks_) most = std::max(most, chunk.size());
    return most;
  }
  int64_t chunks_steps() const { return chunks_.back().back().b_row + chunks_.back().back().length; }

  void block(int64_t first, int64_t last, std::span<const Panel<T>> group) {
    const int vectors = group[0].vectors, tall = rows_of(vectors);
    const int64_t sums = tall * vectors * W;
    window_->block(first, last, tall);
    const int64_t tiles = window_->tiles();
    const bool packs = tiles >= kReused<T>;
    for (size_t c = 0; c < chunks_.size(); ++c) {
      const std::span<const Slice> chunk = chunks_[c];
      int64_t b_row = 0;
      for (size_t s = 0; s < chunk.size(); ++s) {
        b_rows_[s] = packs ? b_row : chunk[s].b_row;
        b_row += packed_rows<T>(chunk[s].length);
      }
      window_->chunk(chunk, b_rows_.data());
      for (size_t g = 0; g < group.size(); ++g) {
        const Panel<T>& panel = group[g];
        if (packs) copy(panel, chunk);
        // Meanwhile the next rows of B that will be copied come near.
        const bool same = g + 1 < group.size();
        Ahead<T> ahead(group[same ? g + 1 : 0], tiles);
        if (tiles > 1 && (same || c + 1 < chunks_.size())) ahead.begin(same ? chunk : chunks_[c + 1]);
        for (int64_t t = 0; t < tiles; ++t) {
          ahead();
          float* to = chunks_.size() == 1 ? sums_ : sums_ + (g * tiles + t) * sums;
          const Run<Factor<T>>* runs = window_->runs(t);
          if (packs) tile(vectors, runs, window_->segments(), near_, vectors * W, to, c > 0);
          else tile(vectors, runs, window_->segments(), panel.b, panel.ld_b, to, c > 0);
          if (c + 1 == chunks_.size())
            for (int64_t r = 0, pixel = first + t * tall; r < tall && pixel < last; ++r, ++pixel)
              finish_(panel, pixel, to + r * vectors * W);
        }
      }
    }
  }

  // Copies a panel's rows of B under a chunk to packed_.
  void copy(const Panel<T>& panel, std::span<const Slice> chunk) {
    if (Window<T>::copies(p_)) {  // the chunk's rows of A are joined, too
      const int64_t steps = chunk.back().b_row + chunk.back().length - chunk[0].b_row;
      pack(panel.b, panel.vectors, panel.ld_b, chunk[0].b_row, steps, packed_);
      return;
    }
    for (size_t s = 0; s < chunk.size(); ++s)
      pack(panel.b, panel.vectors, panel.ld_b, chunk[s].b_row, chunk[s].length,
           packed_ + b_rows_[s] * panel.vectors * W);
  }

  const Conv& p_;
  const std::span<const Panel<T>> panels_;
  const Chunks& chunks_;
  const Epilogue<T> finish_;
  std::optional<Window<T>> window_;
  std::vector<int64_t> b_rows_;  // at which row of B each slice of the chunk begins
  float* sums_;
  Packed<T>* packed_;
  const Packed<T>* near_[kMaxVectors];  // the columns of packed_
};

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
