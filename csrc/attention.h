// Attention without a score matrix: blocks of queries against chunks of keys, softmax on the way.
//
// Scores are kept transposed, [keys, queries]: their product reads K's rows where they are (they are
// rows of A in `gemm.h`), a vector holds W queries, so the softmax needs no sums across a vector,
// and the second product reads V's rows where they are (they are rows of B).
#pragma once
#include <algorithm>
#include <limits>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Attention;

constexpr int64_t kKeys = 192;   // keys in a chunk: its scores stay in L1
constexpr int64_t kInner = 128;  // inner steps summed at once, for the rounding errors' sake
constexpr int kQueryVectors = 2;
constexpr int64_t kQueries = kQueryVectors * W;

// A head's rows in float32 with `ld` between them: the tensor itself, or a converted copy of it.
struct Rows32 {
  const float* data;
  int64_t ld;
};

static Rows32 rows32(const float* p, int64_t ld, int64_t, int64_t, std::vector<float>&) {
  return {p, ld};
}
static Rows32 rows32(const bf16* p, int64_t ld, int64_t rows, int64_t width,
                     std::vector<float>& copy) {
  copy.resize(rows * width);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += W) {
      const int n = static_cast<int>(std::min<int64_t>(W, width - c));
      store_n(&copy[i * width + c], load_n(p + i * ld + c, n), n);
    }
  return {copy.data(), width};
}

// scores[j, i] = k[j] . q[:, i] for keys [0, keys), W * kQueryVectors queries
static void score(Rows32 k, int64_t keys, int64_t width, const float* q, float* scores) {
  constexpr int tall = Rows<kQueryVectors>;
  const float* columns[kQueryVectors];
  for (int v = 0; v < kQueryVectors; ++v) columns[v] = q + v * W;
  float sums[tall * kQueries];
  for (int64_t first = 0; first < keys; first += tall) {
    for (int64_t d = 0; d < width; d += kInner) {
      Segment segment{{}, std::min(kInner, width - d), d};
      for (int r = 0; r < tall; ++r)
        segment.a[r] = k.data + std::min(first + r, keys - 1) * k.ld + d;
      tile<kQueryVectors>(&segment, 1, columns, kQueries, sums, d > 0, 1);
    }
    const int64_t valid = std::min<int64_t>(tall, keys - first);
    std::memcpy(scores + first * kQueries, sums, valid * kQueries * sizeof(float));
  }
}

// out[i, d] (+)= sum over j of weights[j, i] v[j, d]
static void weigh(const float* weights, Rows32 v, int64_t keys, int64_t width, float* out,
                  int64_t ld_out, bool accumulate) {
  float sums[kTileSums * W];
  for (int64_t d = 0; d < width;) {
    const int vectors = panel_vectors((width - d) / W), tall = rows_of(vectors);
    const float* columns[kMaxVectors];
    for (int i = 0; i < vectors; ++i) columns[i] = v.data + d + i * W;
    for (int64_t first = 0; first < kQueries; first += tall) {
      const int64_t valid = std::min<int64_t>(tall, kQueries - first);
      Segment segment{{}, keys, 0};
      for (int r = 0; r < tall; ++r) segment.a[r] = weights + std::min(first + r, kQueries - 1);
      for (int r = 0; r < valid && accumulate; ++r)
        std::memcpy(sums + r * vectors * W, out + (first + r) * ld_out + d, vectors * W * 4);
      tile(vectors, &segment, 1, columns, v.ld, sums, accumulate, kQueries);
      for (int r = 0; r < valid; ++r)
        std::memcpy(out + (first + r) * ld_out + d, sums + r * vectors * W, vectors * W * 4);
    }
    d += vectors * W;
  }
}

// Softmax over a chunk of keys as they come: turns scores into weights relative to the largest
// score so far, and says by how much what was summed before must shrink. A lane is a query.
struct Softmax {
  vf top[kQueryVectors], total[kQueryVectors];

  Softmax() {
    for (int v = 0; v < kQueryVectors; ++v) {
      top[v] = splat(-std::numeric_limits<float>::infinity());
      total[v] = vf{};
    }
  }

  void operator()(float* scores, int64_t keys, float* shrink) {
    const vf lowest = splat(-std::numeric_limits<float>::max());
    for (int v = 0; v < kQueryVectors; ++v) {
      vf now = top[v];
      for (int64_t j = 0; j < keys; ++j) now = max(now, load(scores + j * kQueries + v * W));
      const vf base = max(now, lowest);  // finite even where every key so far is masked out
      const vf factor = exp(top[v] - base);
      vf sum = {};
      for (int64_t j = 0; j < keys; ++j) {
        float* at = scores + j * kQueries + v * W;
        const vf weight = exp(load(at) - base);
        store(at, weight);
        sum += weight;
      }
      total[v] = total[v] * factor + sum;
      top[v] = now;
      store(shrink + v * W, factor);
    }
  }
};

template <typename T>
static void attention(const Attention& p) {
  const int64_t padded = (p.width + W - 1) / W * W;
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  fastdiff::parallel_for(p.batch * p.heads * blocks, [&](int64_t first, int64_t last) {
    std::vector<float> q(p.width * kQueries), scores(kKeys * kQueries), out(kQueries * padded);
    std::vector<float> k_copy, v_copy, v_padded;
    Rows32 k{}, v{};
    int64_t ready = -1;  // the head that k and v are of
    for (int64_t task = first; task < last; ++task) {
      const int64_t pair = task / blocks, b = pair / p.heads, h = pair % p.heads;
      if (pair != ready) {
        const auto head = [&](const void* tensor, const int64_t* stride) {
          return static_cast<const T*>(tensor) + b * stride[0] + h * stride[2];
        };
        k = rows32(head(p.k, p.k_stride), p.k_stride[1], p.keys, p.width, k_copy);
        v = rows32(head(p.v, p.v_stride), p.v_stride[1], p.keys, p.width, v_copy);
        if (padded != p.width) {  // B is read in whole vectors
          v_padded.assign(p.keys * padded, 0.0f);
          for (int64_t j = 0; j < p.keys; ++j)
            std::memcpy(&v_padded[j * padded], v.data + j * v.ld, p.width * sizeof(float));
          v = {v_padded.data(), padded};
        }
        ready = pair;
      }
      const int64_t begin = task % blocks * kQueries;
      const int64_t count = std::min(kQueries, p.queries - begin);
      const T* q_rows = static_cast<const T*>(p.q) + b * p.q_stride[0] + h * p.q_stride[2];
      for (int64_t i = 0; i < kQueries; ++i) {
        const T* row = q_rows + (begin + std::min(i, count - 1)) * p.q_stride[1];
        for (int64_t d = 0; d < p.width; ++d) q[d * kQueries + i] = load1(row + d) * p.scale;
      }
      Softmax softmax;
      float shrink[kQueries];
      for (int64_t from = 0; from < p.keys; from += kKeys) {
        const int64_t keys = std::min(kKeys, p.keys - from);
        score({k.data + from * k.ld, k.ld}, keys, p.width, q.data(), scores.data());
        if (p.mask) {
          const T* mask = static_cast<const T*>(p.mask) + b * p.mask_stride[0] +
                          h * p.mask_stride[1] + begin * p.mask_stride[2] +
                          from * p.mask_stride[3];
          for (int64_t j = 0; j < keys; ++j)
            for (int64_t i = 0; i < count; ++i)
              scores[j * kQueries + i] += load1(mask + i * p.mask_stride[2] + j * p.mask_stride[3]);
        }
        softmax(scores.data(), keys, shrink);
        if (from > 0)
          for (int64_t i = 0; i < kQueries; ++i)
            for (int64_t d = 0; d < padded; d += W)
              store(&out[i * padded + d], load(&out[i * padded + d]) * shrink[i]);
        weigh(scores.data(), {v.data + from * v.ld, v.ld}, keys, padded, out.data(), padded,
              from > 0);
      }
      float total[kQueries];
      for (int i = 0; i < kQueryVectors; ++i) store(total + i * W, softmax.total[i]);
      for (int64_t i = 0; i < count; ++i) {
        T* to = static_cast<T*>(p.out) + ((b * p.queries + begin + i) * p.heads + h) * p.width;
        for (int64_t d = 0; d < p.width; d += W)
          store_n(to + d, load(&out[i * padded + d]) * (1.0f / total[i]),
                  static_cast<int>(std::min<int64_t>(W, p.width - d)));
      }
    }
  });
}

}  // namespace FASTDIFF_ISA
