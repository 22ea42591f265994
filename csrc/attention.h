// Attention without a score matrix: blocks of queries against chunks of keys, softmax on the way.
//
// Scores are kept transposed, [keys, queries]: their product reads K's rows where they are (they are
// rows of A in `gemm.h`), a vector holds W queries, so the softmax needs no sums across a vector,
// and the second product reads V's rows where they are (they are rows of B).
#pragma once
#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "gemm.h"
#include "kernels.h"
#include "parallel.h"

namespace FASTDIFF_ISA {

using fastdiff::Attention;
using fastdiff::JointAttention;

constexpr int64_t kKeys = 192;   // keys in a chunk: its scores stay in L1
constexpr int64_t kInner = 128;  // inner steps summed at once, for the rounding errors' sake
constexpr int kQueryVectors = 2;
constexpr int64_t kQueries = kQueryVectors * W;

// A head's rows in float32 with `ld` between them: the tensor itself, or a converted copy of it.
struct Rows32 {
  const float* data;
  int64_t ld;

  Rows32 from(int64_t row) const { return {data + row * ld, ld}; }
};

// The rows copied to whole vectors, zero beyond the width.
template <typename T>
static Rows32 copied(const T* p, int64_t ld, int64_t rows, int64_t width,
                     std::vector<float>& copy) {
  const int64_t padded = (width + W - 1) / W * W;
  copy.resize(rows * padded);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t c = 0; c < width; c += W)
      store(&copy[i * padded + c],
            load_n(p + i * ld + c, static_cast<int>(std::min<int64_t>(W, width - c))));
  return {copy.data(), padded};
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

// The keys and values of one head, ready for the products.
template <typename T>
struct Head {
  Rows32 k{}, v{};

  void read(const T* k_at, int64_t k_ld, const T* v_at, int64_t v_ld, int64_t keys,
            int64_t width) {
    if constexpr (std::is_same_v<T, float>) {
      k = {k_at, k_ld};
      v = {v_at, v_ld};
      if (width % W != 0) v = copied(v_at, v_ld, keys, width, v_copy_);  // B: whole vectors
    } else {
      k = copied(k_at, k_ld, keys, width, k_copy_);
      v = copied(v_at, v_ld, keys, width, v_copy_);
    }
  }

 private:
  std::vector<float> k_copy_, v_copy_;
};

// A block of queries on its way past the keys.
template <typename T>
class Block {
 public:
  explicit Block(int64_t width)
      : width_(width),
        padded_((width + W - 1) / W * W),
        q_(width * kQueries),
        scores_(kKeys * kQueries),
        out_(kQueries * padded_) {}

  void begin(const T* rows, int64_t ld, int64_t count, float scale) {
    for (int64_t i = 0; i < kQueries; ++i) {
      const T* row = rows + std::min(i, count - 1) * ld;
      for (int64_t d = 0; d < width_; ++d) q_[d * kQueries + i] = load1(row + d) * scale;
    }
    softmax_ = Softmax();
    met_ = false;
  }

  // add(scores, from, keys) may add to the scores [keys, kQueries] of the keys that begin at `from`.
  template <typename Add>
  void meet(const Head<T>& head, int64_t all, const Add& add) {
    float shrink[kQueries];
    for (int64_t from = 0; from < all; from += kKeys, met_ = true) {
      const int64_t keys = std::min(kKeys, all - from);
      score(head.k.from(from), keys, width_, q_.data(), scores_.data());
      add(scores_.data(), from, keys);
      softmax_(scores_.data(), keys, shrink);
      if (met_)
        for (int64_t i = 0; i < kQueries; ++i)
          for (int64_t d = 0; d < padded_; d += W)
            store(&out_[i * padded_ + d], load(&out_[i * padded_ + d]) * shrink[i]);
      weigh(scores_.data(), head.v.from(from), keys, padded_, out_.data(), padded_, met_);
    }
  }

  void write(T* to, int64_t ld, int64_t count) const {
    float total[kQueries];
    for (int i = 0; i < kQueryVectors; ++i) store(total + i * W, softmax_.total[i]);
    for (int64_t i = 0; i < count; ++i)
      each_vector(width_, [&](int64_t d, int n) {
        store_n(to + i * ld + d, load(&out_[i * padded_ + d]) * (1.0f / total[i]), n);
      });
  }

 private:
  int64_t width_, padded_;
  std::vector<float> q_, scores_, out_;
  Softmax softmax_;
  bool met_ = false;  // any keys so far
};

template <typename T>
static const T* head_at(const void* tensor, const int64_t* stride, int64_t b, int64_t h) {
  return static_cast<const T*>(tensor) + b * stride[0] + h * stride[2];
}

template <typename T>
static void attention(const Attention& p) {
  const int64_t blocks = (p.queries + kQueries - 1) / kQueries;
  fastdiff::parallel_for(p.batch * p.heads * blocks, [&](int64_t first, int64_t last) {
    Head<T> head;
    Block<T> block(p.width);
    int64_t ready = -1;  // the head that is read
    for (int64_t task = first; task < last; ++task) {
      const int64_t pair = task / blocks, b = pair / p.heads, h = pair % p.heads;
      if (pair != ready)
        head.read(head_at<T>(p.k, p.k_stride, b, h), p.k_stride[1],
                  head_at<T>(p.v, p.v_stride, b, h), p.v_stride[1], p.keys, p.width);
      ready = pair;
      const int64_t begin = task % blocks * kQueries;
      const int64_t count = std::min(kQueries, p.queries - begin);
      block.begin(head_at<T>(p.q, p.q_stride, b, h) + begin * p.q_stride[1], p.q_stride[1], count,
                  p.scale);
      block.meet(head, p.keys, [&](float* scores, int64_t from, int64_t keys) {
        if (!p.mask) return;
        const T* mask = static_cast<const T*>(p.mask) + b * p.mask_stride[0] +
                        h * p.mask_stride[1] + begin * p.mask_stride[2] + from * p.mask_stride[3];
        for (int64_t j = 0; j < keys; ++j)
          for (int64_t i = 0; i < count; ++i)
            scores[j * kQueries + i] += load1(mask + i * p.mask_stride[2] + j * p.mask_stride[3]);
      });
      block.write(static_cast<T*>(p.out) + ((b * p.queries + begin) * p.heads + h) * p.width,
                  p.heads * p.width, count);
    }
  });
}

template <typename T>
static void joint_attention(const JointAttention& p) {
  const int64_t picture_blocks = (p.picture.queries + kQueries - 1) / kQueries;
  const int64_t blocks = picture_blocks + (p.text.queries + kQueries - 1) / kQueries;
  fastdiff::parallel_for(p.batch * p.heads * blocks, [&](int64_t first, int64_t last) {
    Head<T> picture, text;
    Block<T> block(p.width);
    int64_t ready = -1;  // the head that is read
    for (int64_t task = first; task < last; ++task) {
      const int64_t pair = task / blocks, b = pair / p.heads, h = pair % p.heads;
      const auto read = [&](Head<T>& head, const JointAttention::Sequence& s) {
        head.read(head_at<T>(s.k, s.k_stride, b, h), s.k_stride[1],
                  head_at<T>(s.v, s.v_stride, b, h), s.v_stride[1], s.keys, p.width);
      };
      if (pair != ready) read(picture, p.picture), read(text, p.text);
      ready = pair;
      const bool of_picture = task % blocks < picture_blocks;
      const JointAttention::Sequence& s = of_picture ? p.picture : p.text;
      const int64_t begin = (task % blocks - (of_picture ? 0 : picture_blocks)) * kQueries;
      const int64_t count = std::min(kQueries, s.queries - begin);
      block.begin(head_at<T>(s.q, s.q_stride, b, h) + begin * s.q_stride[1], s.q_stride[1], count,
                  p.scale);
      block.meet(picture, p.picture.keys, [](float*, int64_t, int64_t) {});
      block.meet(text, p.text.keys, [&](float* scores, int64_t from, int64_t keys) {
        if (!p.text_bias) return;
        for (int64_t j = 0; j < keys; ++j)
          for (int64_t i = 0; i < kQueries; i += W)
            store(scores + j * kQueries + i,
                  load(scores + j * kQueries + i) + p.text_bias[from + j]);
      });
      block.write(static_cast<T*>(s.out) + ((b * s.queries + begin) * p.heads + h) * p.width,
                  p.heads * p.width, count);
    }
  });
}

}  // namespace FASTDIFF_ISA
