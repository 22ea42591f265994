// A thread's part of a product: blocks of A's rows times copies of B, then the epilogue.
//
// B's rows are as far apart as the weight is wide. So they are copied together, one chunk of a
// panel at a time, for the hundreds of rows of A that use the copy; meanwhile the next data to copy
// or read is prefetched. A thread keeps about 1 MiB for this.
#pragma once
#include <optional>

#include "scratch.h"
#include "window.h"

namespace FASTDIFF_ISA {

constexpr int64_t kChunk = 384;            // inner steps of B per copy
constexpr int64_t kBlockRows = 528;        // rows that share a copy of B; a multiple of any tile's
constexpr int64_t kGroup = 5;              // panels that share a chunk's rows, which stay in L2
constexpr int64_t kFew = 4;                // tiles of rows: with fewer, no rows of B are prefetched

// Inner steps summed at once: few, for small rounding errors (which bfloat16 hides) and small
// copies of rows.
template <typename T>
constexpr int64_t kSlice = std::is_same_v<Packed<T>, float> ? 128 : kChunk;

// The least tiles of rows for which a copy of B pays; bfloat16 needs one to form pairs (or
// convert).
template <typename T>
constexpr int64_t kReused = std::is_same_v<T, Packed<T>> ? 16 : 4;

// Columns [begin, begin + columns) of the output, with the addresses of their weights.
template <typename T>
struct Panel {
  int64_t begin, columns;
  int vectors;             // of B: with GEGLU twice the output's (value, then gate columns)
  const T* b[kMaxVectors];
  int64_t ld_b;
};

template <typename T>
struct Epilogue {
  const Conv& p;

  // Prefetches what is added to a row of sums, and the memory that it is written to. Must be
  // inlined, as in Window.
  __attribute__((always_inline)) void ahead(const Panel<T>& panel, int64_t pixel) const {
    constexpr int64_t kLine = 64 / sizeof(T);
    const int64_t wide = fastdiff::is_gated(p.act) ? p.n / 2 : p.n;
    const T* to = static_cast<const T*>(p.out) + pixel * wide + panel.begin;
    for (int64_t c = 0; c < panel.columns; c += kLine) __builtin_prefetch(to + c, 1, 3);
    if (!p.residual) return;
    const auto* from =
        static_cast<const T*>(p.residual) + pixel % p.residual_pixels * wide + panel.begin;
    for (int64_t c = 0; c < panel.columns; c += kLine) __builtin_prefetch(from + c, 0, 3);
  }

  // Whether `write` can finish a panel: sums then go from registers to the output.
  bool straight(const Panel<T>& panel) const {
    return p.act == fastdiff::kNone && panel.columns == panel.vectors * W;
  }

  // Finishes the first `rows` rows of a tile. Must be inlined: the sums are in registers.
  template <int V>
  __attribute__((always_inline)) void write(const Panel<T>& panel, int64_t pixel, int64_t rows,
                                            vf (&sums)[Rows<V>][V]) const {
    const auto* bias = static_cast<const T*>(p.bias);
    const auto* residual = static_cast<const T*>(p.residual);
    auto* out = static_cast<T*>(p.out) + pixel * p.n + panel.begin;
    int64_t other = residual ? pixel % p.residual_pixels : 0;
    vf added[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) added[v] = bias ? load(bias + panel.begin + v * W) : vf{};
#pragma GCC unroll 16
    for (int r = 0; r < Rows<V>; ++r, out += p.n) {
      if (r >= rows) return;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] += added[v];
      if (residual) {
        const T* from = residual + other * p.n + panel.begin;
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sums[r][v] += load(from + v * W);
        if (++other == p.residual_pixels) other = 0;
      }
      store_all(out, sums[r]);
    }
  }

  void operator()(const Panel<T>& panel, int64_t pixel, const float* sums) const {
    const bool gated = fastdiff::is_gated(p.act), first = p.act == fastdiff::kSwigluFirst;
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
        if (first) value = silu(value) * gate;
        else value *= p.act == fastdiff::kSwiglu ? silu(gate) : gelu(gate);
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

using Chunks = std::vector<std::span<const Slice>>;

// Consecutive slices joined to at most `most` channels.
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

// Prefetches a panel's rows of B for a chunk into L2, a few while each tile is computed: the
// processor does not predict rows that are far apart.
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

// A thread's part of a product: blocks of rows times groups of panels.
template <typename T>
class Product {
 public:
  Product(const Conv& p, std::span<const Panel<T>> panels, const Chunks& chunks, int64_t rows)
      : p_(p), panels_(panels), chunks_(chunks), whole_(chunks.size() == 1), finish_{p} {
    const int64_t most = std::min(rows, kBlockRows), tiles = most / kMinRows + 1;
    const int64_t steps = chunks.back().back().b_row + chunks.back().back().length;
    group_ = whole_ ? std::ssize(panels) : kGroup;
    const int64_t sums = kTileSums * W * (whole_ ? 1 : tiles * kGroup);
    const int64_t packed = std::min(kChunk, steps) * kMaxVectors * W;
    const int64_t copied = Window<T>::copied(p, most, kChunk);
    sums_ = kept<float, kKeptSums>(sums);
    packed_ = kept<Packed<T>, kKeptWeights>(packed);
    window_.emplace(p, most, kChunk, most_slices(), kept<Factor<T>, kKeptPixels>(copied));
    b_rows_.resize(most_slices());
  }

  // Computes output pixels [first, last) of panels [begin, end).
  void operator()(int64_t first, int64_t last, int64_t begin, int64_t end) {
    constexpr int64_t kUnit = 2 * kMaxRows;  // a multiple of any tile's rows
    const int64_t blocks = (last - first + kBlockRows - 1) / kBlockRows;
    const int64_t rows = ((last - first + blocks - 1) / blocks + kUnit - 1) / kUnit * kUnit;
    for (int64_t from = first; from < last; from += rows)
      for (int64_t panel = begin, stop; panel < end; panel = stop) {
        for (stop = panel + 1; stop < end && stop - panel < group_; ++stop)
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
        if (packs) copy(group[g], chunk);
        // prefetch the next rows of B to be copied
        const bool same = g + 1 < group.size();
        const bool straight = whole_ && window_->segments() == 1 && finish_.straight(group[g]);
        Ahead<T> ahead(group[same ? g + 1 : 0], tiles);
        if (tiles >= kFew && (same || c + 1 < chunks_.size()))
          ahead.begin(same ? chunk : chunks_[c + 1]);
        for (int64_t t = 0; t < tiles; ++t) {
          ahead();
          if (g == 0) window_->ahead(t + 1);
          const int64_t pixel = first + t * tall, stop = std::min(pixel + tall, last);
          // a single row of pairs is slower: each product waits for the sum before it
          const bool single = stop - pixel == 1 && std::is_same_v<Factor<T>, float>;
          const bool ends = c + 1 == chunks_.size();
          for (int64_t i = pixel; ends && i < stop; ++i) finish_.ahead(group[g], i + tall);
          float* to = whole_ ? sums_ : sums_ + (g * tiles + t) * sums;
          const Run<Factor<T>>* runs = window_->runs(t);
          const Panel<T>& panel = group[g];
          by_vectors(vectors, [&](auto v) {
            const auto run = [&](const auto& b) {
              if (straight) whole_tile<v>(runs[0], b, panel, pixel, stop - pixel);
              else if (single) tile<v, 1>(runs, window_->segments(), b, to, c > 0);
              else tile<v, Rows<v>>(runs, window_->segments(), b, to, c > 0);
            };
            if (packs) run(Copy<v, Packed<T>>{packed_});
            else run(Columns<v, T>(panel.b, panel.ld_b));
          });
          for (int64_t i = pixel; ends && !straight && i < stop; ++i)
            finish_(panel, i, to + (i - pixel) * vectors * W);
        }
      }
    }
  }

  // A tile whose inner dimension is a single run, without a stop in memory.
  template <int V, typename B>
  void whole_tile(const Run<Factor<T>>& run, const B& b, const Panel<T>& panel, int64_t pixel,
                  int64_t rows) const {
    vf acc[Rows<V>][V] = {};
    multiply<V>(run, b.from(run.b_row), acc);
    finish_.template write<V>(panel, pixel, rows, acc);
  }

  // Copies a panel's rows of B for a chunk to packed_.
  void copy(const Panel<T>& panel, std::span<const Slice> chunk) {
    by_vectors(panel.vectors, [&](auto v) {
      const int64_t first = chunk[0].b_row, last = chunk.back().b_row + chunk.back().length;
      if (Window<T>::copies(p_))  // the chunk's rows of A are joined, too
        return pack<v>(panel.b, panel.ld_b, first, last - first, packed_);
      for (size_t s = 0; s < chunk.size(); ++s)
        pack<v>(panel.b, panel.ld_b, chunk[s].b_row, chunk[s].length,
                packed_ + b_rows_[s] * v * W);
    });
  }

  const Conv& p_;
  const std::span<const Panel<T>> panels_;
  const Chunks& chunks_;
  const bool whole_;  // whether one chunk is the whole inner dimension
  const Epilogue<T> finish_;
  std::optional<Window<T>> window_;
  std::vector<int64_t> b_rows_;  // the row of B at which each slice of the chunk begins
  int64_t group_;  // the most panels that share a chunk's rows
  float* sums_;
  Packed<T>* packed_;
};

}  // namespace FASTDIFF_ISA
