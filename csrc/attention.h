// Attention without a score matrix: blocks of queries against chunks of keys, softmax on the way.
// Both products are `gemm.h`: K is transposed once so that keys are its columns.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Attention;

constexpr int64_t kKeys = 256;    // keys in a chunk: a block of scores stays in L1
constexpr int64_t kQueries = 24;  // queries in a block: a multiple of every tile height
constexpr int64_t kInner = 128;   // inner steps summed at once, for the rounding errors' sake

static inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// c[rows, columns] (+)= a[rows, inner] . b[inner, columns]; rows up to kQueries, ld_a and ld_c in
// floats, columns a multiple of W.
static void small_gemm(const float* a, int64_t ld_a, int64_t inner, const float* b, int64_t ld_b,
                       int64_t columns, float* c, int64_t ld_c, bool accumulate) {
  float sums[kTileSums * W];
  for (int64_t n = 0; n < columns;) {
    const int vectors = panel_vectors((columns - n) / W), tall = rows_of(vectors);
    const float* b_columns[kMaxVectors];
    for (int v = 0; v < vectors; ++v) b_columns[v] = b + n + v * W;
    for (int64_t first = 0; first < kQueries; first += tall) {
      if (accumulate)
        for (int r = 0; r < tall; ++r)
          std::memcpy(sums + r * vectors * W, c + (first + r) * ld_c + n, vectors * W * 4);
      for (int64_t k = 0; k < inner; k += kInner) {
        Segment segment{{}, std::min(kInner, inner - k), k};
        for (int r = 0; r < tall; ++r) segment.a[r] = a + (first + r) * ld_a + k;
        tile(vectors, &segment, 1, b_columns, ld_b, sums, accumulate || k > 0);
      }
      for (int r = 0; r < tall; ++r)
        std::memcpy(c + (first + r) * ld_c + n, sums + r * vectors * W, vectors * W * 4);
    }
    n += vectors * W;
  }
}

template <typename T>
static void attention(const Attention& p) {
  const int64_t keys = round_up(p.keys, W), width = round_up(p.width, W);
  const int64_t pairs = p.batch * p.heads;
  // K transposed to [width, keys] and V as [keys, width], float32, zero-padded, for every head
  std::vector<float> k_columns(pairs * p.width * keys), v_rows(pairs * p.keys * width);
  fastdiff::parallel_for(pairs, [&](int64_t first, int64_t last) {
    for (int64_t pair = first; pair < last; ++pair) {
      const int64_t b = pair / p.heads, h = pair % p.heads;
      const T* k = static_cast<const T*>(p.k) + b * p.k_stride[0] + h * p.k_stride[2];
      const T* v = static_cast<const T*>(p.v) + b * p.v_stride[0] + h * p.v_stride[2];
      float* columns = &k_columns[pair * p.width * keys];
      float* rows = &v_rows[pair * p.keys * width];
      for (int64_t j = 0; j < p.keys; ++j)
        for (int64_t d = 0; d < p.width; ++d) {
          columns[d * keys + j] = load1(k + j * p.k_stride[1] + d);
          rows[j * width + d] = load1(v + j * p.v_stride[1] + d);
        }
    }
  });

  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  const float minus_infinity = -std::numeric_limits<float>::infinity();
  fastdiff::parallel_for(pairs * blocks, [&](int64_t first, int64_t last) {
    std::vector<float> q(kQueries * p.width), scores(kQueries * kKeys), out(kQueries * width);
    float top[kQueries], total[kQueries];
    for (int64_t task = first; task < last; ++task) {
      const int64_t pair = task / blocks, b = pair / p.heads, h = pair % p.heads;
      const int64_t begin = task % blocks * kQueries;
      const int64_t count = std::min(kQueries, p.queries - begin);
      const T* q_from = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[2];
      std::fill(q.begin(), q.end(), 0.0f);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t d = 0; d < p.width; ++d)
          q[i * p.width + d] = load1(q_from + (begin + i) * p.q_stride[1] + d) * p.scale;
      std::fill(out.begin(), out.end(), 0.0f);
      std::fill(top, top + kQueries, minus_infinity);
      std::fill(total, total + kQueries, 0.0f);
      for (int64_t from = 0; from < p.keys; from += kKeys) {
        const int64_t chunk = std::min(kKeys, p.keys - from), padded = round_up(chunk, W);
        small_gemm(q.data(), p.width, p.width, &k_columns[pair * p.width * keys + from], keys,
                   padded, scores.data(), kKeys, false);
        for (int64_t i = 0; i < count; ++i) {
          float* row = &scores[i * kKeys];
          if (p.mask) {
            const T* mask = static_cast<const T*>(p.mask) + b * p.mask_stride[0] +
                            h * p.mask_stride[1] + (begin + i) * p.mask_stride[2];
            for (int64_t j = 0; j < chunk; ++j) row[j] += load1(mask + (from + j) * p.mask_stride[3]);
          }
          for (int64_t j = chunk; j < padded; ++j) row[j] = minus_infinity;
          vf most = load(row);
          for (int64_t j = W; j < padded; j += W) most = max(most, load(row + j));
          const float now = std::max(top[i], largest(most));
          const float base = now == minus_infinity ? 0.0f : now;  // every key so far is masked out
          const float shrink = top[i] == minus_infinity ? 0.0f : std::exp(top[i] - base);
          vf sums = {};
          for (int64_t j = 0; j < padded; j += W) {
            const vf e = exp(load(row + j) - base);
            store(row + j, e);
            sums += e;
          }
          total[i] = total[i] * shrink + sum(sums);
          top[i] = now;
          if (from > 0)
            for (int64_t d = 0; d < width; d += W)
              store(&out[i * width + d], load(&out[i * width + d]) * shrink);
        }
        small_gemm(scores.data(), kKeys, chunk, &v_rows[(pair * p.keys + from) * width], width,
                   width, out.data(), width, from > 0);
      }
      for (int64_t i = 0; i < count; ++i) {
        T* to = static_cast<T*>(p.out) + ((b * p.queries + begin + i) * p.heads + h) * p.width;
        const float scale = 1.0f / total[i];
        for (int64_t d = 0; d < p.width; d += W) {
          const vf value = load(&out[i * width + d]) * scale;
          const int n = static_cast<int>(std::min<int64_t>(W, p.width - d));
          if (n == W) store(to + d, value);
          else store_some(to + d, value, n);
        }
      }
    }
  });
}

}  // namespace FASTDIFF_ISA
